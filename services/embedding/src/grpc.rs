//! Decode, call, encode.

use aeterna_error::Error;
use aeterna_proto::embedding::v1::embedding_service_server::EmbeddingService;
use aeterna_proto::embedding::v1::{
    BatchEmbedRequest, BatchEmbedResponse, EmbedRequest, EmbedResponse, ListModelsRequest, ListModelsResponse,
    RerankRequest, RerankResponse, SelectDimensionRequest, SelectDimensionResponse,
};
use aeterna_rpc::RequestContext;
use tonic::{Request, Response, Status};

use crate::app::App;
use crate::convert;

/// The contract, served.
pub struct Embedding(App);

impl Embedding {
    pub fn new(app: App) -> Self {
        Self(app)
    }
}

#[tonic::async_trait]
impl EmbeddingService for Embedding {
    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let context = RequestContext::of(&request)?;
        let (text, wanted) = convert::embed_request(request.into_inner(), |model| self.0.sizes(model))?;
        let batch = self.0.embed(&context, vec![text], wanted).await;
        let batch = batch.map_err(|error| Error::from(error.alone()))?;
        Ok(Response::new(convert::embed_response(batch)))
    }

    async fn batch_embed(&self, request: Request<BatchEmbedRequest>) -> Result<Response<BatchEmbedResponse>, Status> {
        let context = RequestContext::of(&request)?;
        let (texts, wanted) = convert::batch_request(request.into_inner(), |model| self.0.sizes(model))?;
        let batch = self.0.embed(&context, texts, wanted).await.map_err(Error::from)?;
        Ok(Response::new(convert::batch_response(batch)))
    }

    async fn rerank(&self, request: Request<RerankRequest>) -> Result<Response<RerankResponse>, Status> {
        let (query, texts) = convert::rerank_request(request.into_inner())?;
        let reranked = self.0.rerank(query, texts).await.map_err(Error::from)?;
        Ok(Response::new(convert::rerank_response(reranked)))
    }

    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.0.models().into_iter().map(convert::model).collect();
        Ok(Response::new(ListModelsResponse { models }))
    }

    async fn select_dimension(
        &self,
        request: Request<SelectDimensionRequest>,
    ) -> Result<Response<SelectDimensionResponse>, Status> {
        let request = convert::select_request(request.into_inner())?;
        let selection = self.0.select(&request).map_err(Error::from)?;
        Ok(Response::new(convert::select_response(selection)))
    }
}
