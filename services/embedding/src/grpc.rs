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
pub struct Embedding {
    app: App,
    /// Largest message.
    message_bytes: usize,
}

impl Embedding {
    pub fn new(app: App, message_bytes: usize) -> Self {
        Self { app, message_bytes }
    }
}

#[tonic::async_trait]
impl EmbeddingService for Embedding {
    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let context = RequestContext::of(&request)?;
        let (text, wanted) = convert::embed_request(request.into_inner(), |model| self.app.sizes(model))?;
        let batch = self.app.embed(&context, vec![text], wanted).await;
        let batch = batch.map_err(|error| Error::from(error.alone()))?;
        Ok(Response::new(convert::embed_response(batch)))
    }

    async fn batch_embed(&self, request: Request<BatchEmbedRequest>) -> Result<Response<BatchEmbedResponse>, Status> {
        let context = RequestContext::of(&request)?;
        let (texts, wanted) = convert::batch_request(request.into_inner(), |model| self.app.sizes(model))?;
        let dimension = self.app.dimension(&wanted).map_err(Error::from)?;
        convert::check_room(texts.len(), dimension, self.message_bytes)?;
        let batch = self.app.embed(&context, texts, wanted).await.map_err(Error::from)?;
        Ok(Response::new(convert::batch_response(batch)))
    }

    async fn rerank(&self, request: Request<RerankRequest>) -> Result<Response<RerankResponse>, Status> {
        let (query, texts) = convert::rerank_request(request.into_inner())?;
        let reranked = self.app.rerank(query, texts).await.map_err(Error::from)?;
        Ok(Response::new(convert::rerank_response(reranked)))
    }

    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.app.models().into_iter().map(convert::model).collect();
        Ok(Response::new(ListModelsResponse { models }))
    }

    async fn select_dimension(
        &self,
        request: Request<SelectDimensionRequest>,
    ) -> Result<Response<SelectDimensionResponse>, Status> {
        let request = convert::select_request(request.into_inner())?;
        let selection = self.app.select(&request).map_err(Error::from)?;
        Ok(Response::new(convert::select_response(selection)))
    }
}
