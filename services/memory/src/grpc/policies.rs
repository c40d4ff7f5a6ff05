//! PolicyService.

use std::sync::Arc;

use aeterna_proto::memory::v1 as wire;
use aeterna_proto::memory::v1::policy_service_server::PolicyService;
use aeterna_rpc::RequestContext;
use tonic::{Request, Response};

use super::Answer;
use crate::app::App;
use crate::convert;

/// The contract, served.
pub struct Policies(pub Arc<App>);

#[tonic::async_trait]
impl PolicyService for Policies {
    async fn put_policy(&self, request: Request<wire::PutPolicyRequest>) -> Answer<wire::PutPolicyResponse> {
        let context = RequestContext::of(&request)?;
        let new = convert::put_policy_request(request.into_inner())?;
        let policy = Some(convert::policy(self.0.put_policy(&context, new).await?));
        Ok(Response::new(wire::PutPolicyResponse { policy }))
    }

    async fn get_policy(&self, request: Request<wire::GetPolicyRequest>) -> Answer<wire::GetPolicyResponse> {
        let context = RequestContext::of(&request)?;
        let name = request.into_inner().name;
        convert::policy_name(&name)?;
        let policy = Some(convert::policy(self.0.policy(&context, &name).await?));
        Ok(Response::new(wire::GetPolicyResponse { policy }))
    }

    async fn list_policies(&self, request: Request<wire::ListPoliciesRequest>) -> Answer<wire::ListPoliciesResponse> {
        let context = RequestContext::of(&request)?;
        let (after, limit, binding) =
            convert::list_policies_request(request.into_inner(), &context.principal().tenant)?;
        let (policies, more) = self.0.policies(&context, &after, limit).await?;
        Ok(Response::new(convert::list_policies_response(policies, more, &binding)))
    }

    async fn delete_policy(&self, request: Request<wire::DeletePolicyRequest>) -> Answer<wire::DeletePolicyResponse> {
        let context = RequestContext::of(&request)?;
        let request = request.into_inner();
        convert::policy_name(&request.name)?;
        let etag = Some(request.etag).filter(|etag| !etag.is_empty());
        self.0.delete_policy(&context, &request.name, etag).await?;
        Ok(Response::new(wire::DeletePolicyResponse {}))
    }

    async fn get_effective_policy(
        &self,
        request: Request<wire::GetEffectivePolicyRequest>,
    ) -> Answer<wire::GetEffectivePolicyResponse> {
        let context = RequestContext::of(&request)?;
        let (scope, layer) = convert::effective_request(request.into_inner())?;
        let effective = self.0.effective_policy(&context, &scope, layer).await?;
        Ok(Response::new(convert::effective_response(effective)))
    }
}
