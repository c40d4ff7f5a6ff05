//! What a request carries from service to service: who calls, until when, under which id and trace.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aeterna_auth::Principal;
use aeterna_error::Error;
use aeterna_types::TenantId;
use http::HeaderMap;
use tonic::metadata::MetadataMap;
use tracing::Span;

use crate::credentials::Credentials;

/// The header with the request id.
pub(crate) const REQUEST_ID: &str = "x-request-id";

/// A caller that the same process vouches for. No request from the network can carry it.
#[derive(Clone)]
pub(crate) struct InProcess(pub Arc<Principal>);

/// The context of one request.
#[derive(Clone, Debug)]
pub struct RequestContext {
    principal: Arc<Principal>,
    request_id: Arc<str>,
    deadline: Option<Instant>,
    headers: Arc<HeaderMap>,
}

impl RequestContext {
    pub(crate) fn new(
        principal: Arc<Principal>,
        request_id: Arc<str>,
        deadline: Option<Instant>,
        headers: HeaderMap,
    ) -> Self {
        Self {
            principal,
            request_id,
            deadline,
            headers: Arc::new(headers),
        }
    }

    /// The context that the layer stack gave to a request.
    ///
    /// # Errors
    /// INTERNAL when the service is mounted without the stack.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Error> {
        request
            .extensions()
            .get()
            .cloned()
            .ok_or_else(|| Error::internal("the service is mounted without its layers"))
    }

    /// A context for a service's own background work on behalf of a tenant, with what it presents to peers that run in
    /// other processes.
    pub fn background(tenant: TenantId, credentials: &Credentials) -> Self {
        let mut headers = HeaderMap::new();
        if let Some(Ok(value)) = credentials
            .token(&tenant)
            .map(|token| format!("Bearer {token}").parse())
        {
            headers.insert(http::header::AUTHORIZATION, value);
        }
        let principal = Arc::new(Principal::service(tenant));
        Self {
            principal,
            request_id: Arc::from("background"),
            deadline: None,
            headers: Arc::new(headers),
        }
    }

    /// Who calls.
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// The id under which the log knows the request.
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// When the caller stops waiting.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// A request to a peer: with what is left of the deadline, the caller's token, the request id and the trace.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(deadline) = self.deadline {
            request.set_timeout(
                deadline
                    .saturating_duration_since(Instant::now())
                    .max(Duration::from_millis(1)),
            );
        }
        let mut headers = std::mem::take(request.metadata_mut()).into_headers();
        if let Some(token) = self.headers.get(http::header::AUTHORIZATION) {
            headers.insert(http::header::AUTHORIZATION, token.clone());
        }
        if let Ok(id) = self.request_id.parse() {
            headers.insert(REQUEST_ID, id);
        }
        aeterna_telemetry::trace::propagate(&Span::current(), Some(&self.headers), &mut headers);
        *request.metadata_mut() = MetadataMap::from_headers(headers);
        request.extensions_mut().insert(InProcess(Arc::clone(&self.principal)));
        request
    }
}
