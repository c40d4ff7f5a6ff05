//! KnowledgeService.

use std::sync::Arc;

use aeterna_proto::memory::v1 as wire;
use aeterna_proto::memory::v1::knowledge_service_server::KnowledgeService;
use aeterna_rpc::RequestContext;
use tonic::{Request, Response};

use super::Answer;
use crate::app::App;
use crate::convert;

/// The contract, served.
pub struct Knowledge(pub Arc<App>);

#[tonic::async_trait]
impl KnowledgeService for Knowledge {
    async fn put_document(&self, request: Request<wire::PutDocumentRequest>) -> Answer<wire::PutDocumentResponse> {
        let context = RequestContext::of(&request)?;
        let change = convert::put_document_request(request.into_inner())?;
        let written = self.0.change_document(&context, change).await?;
        let (document, consistency_token) = convert::written_document(written);
        Ok(Response::new(wire::PutDocumentResponse {
            document,
            consistency_token,
        }))
    }

    async fn get_document(&self, request: Request<wire::GetDocumentRequest>) -> Answer<wire::GetDocumentResponse> {
        let context = RequestContext::of(&request)?;
        let wanted = convert::get_document_request(request.into_inner())?;
        let found = self.0.document(&context, wanted).await?;
        Ok(Response::new(wire::GetDocumentResponse {
            document: Some(convert::document(found)),
        }))
    }

    async fn list_documents(
        &self,
        request: Request<wire::ListDocumentsRequest>,
    ) -> Answer<wire::ListDocumentsResponse> {
        let context = RequestContext::of(&request)?;
        let (query, binding) = convert::list_documents_request(request.into_inner(), &context.principal().tenant)?;
        let page = self.0.documents(&context, query).await?;
        let answer = convert::list_documents_response(page, &binding);
        self.0.fitting(answer, "lower `page_size`")
    }

    async fn list_document_versions(
        &self,
        request: Request<wire::ListDocumentVersionsRequest>,
    ) -> Answer<wire::ListDocumentVersionsResponse> {
        let context = RequestContext::of(&request)?;
        let query = convert::versions_request(request.into_inner(), &context.principal().tenant)?;
        let versions = self.0.document_versions(
            &context,
            &query.scope,
            &query.path,
            (query.before, query.limit),
            query.must_see,
        );
        let (versions, more) = versions.await?;
        let answer = convert::versions_response(versions, more, &query.binding);
        self.0.fitting(answer, "lower `page_size`")
    }

    async fn diff_document(&self, request: Request<wire::DiffDocumentRequest>) -> Answer<wire::DiffDocumentResponse> {
        let context = RequestContext::of(&request)?;
        let versions = convert::diff_request(request.into_inner())?;
        let diff = self.0.diff_document(&context, versions).await?;
        self.0.fitting(
            convert::diff_response(diff),
            "compare versions that lie closer together",
        )
    }

    async fn restore_document(
        &self,
        request: Request<wire::RestoreDocumentRequest>,
    ) -> Answer<wire::RestoreDocumentResponse> {
        let context = RequestContext::of(&request)?;
        let change = convert::restore_request(request.into_inner())?;
        let written = self.0.change_document(&context, change).await?;
        let (document, consistency_token) = convert::written_document(written);
        Ok(Response::new(wire::RestoreDocumentResponse {
            document,
            consistency_token,
        }))
    }

    async fn delete_document(
        &self,
        request: Request<wire::DeleteDocumentRequest>,
    ) -> Answer<wire::DeleteDocumentResponse> {
        let context = RequestContext::of(&request)?;
        let change = convert::delete_document_request(request.into_inner())?;
        let written = self.0.change_document(&context, change).await?;
        let (_, consistency_token) = convert::written_document(written);
        Ok(Response::new(wire::DeleteDocumentResponse { consistency_token }))
    }
}
