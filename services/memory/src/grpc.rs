//! Decode, call, encode.

mod knowledge;
mod policies;

use std::sync::Arc;

use aeterna_error::{Error, Reason, item_error};
use aeterna_proto::memory::v1 as wire;
use aeterna_proto::memory::v1::memory_service_server::MemoryService;
use aeterna_rpc::RequestContext;
use futures::StreamExt as _;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use crate::app::App;
use crate::convert;

pub use knowledge::Knowledge;
pub use policies::Policies;

/// The contract, served.
pub struct Memories(pub Arc<App>);

type Answer<T> = Result<Response<T>, Status>;

impl App {
    fn is_too_large(&self, answer: &impl prost::Message) -> bool {
        answer.encoded_len() > self.message_bytes
    }

    /// An answer that is larger than a message may be is refused with the limit, and what to do.
    fn fitting<T: prost::Message>(&self, answer: T, advice: &str) -> Answer<T> {
        if !self.is_too_large(&answer) {
            return Ok(Response::new(answer));
        }
        let (bytes, limit) = (answer.encoded_len(), self.message_bytes);
        let message = format!("the answer has {bytes} bytes, and `limits.message_bytes` is {limit}; {advice}");
        Err(Error::new(Reason::MessageTooLarge, message).with("limit", limit).into())
    }
}

#[tonic::async_trait]
impl MemoryService for Memories {
    async fn add(&self, request: Request<wire::AddRequest>) -> Answer<wire::AddResponse> {
        let context = RequestContext::of(&request)?;
        let item = convert::add_request(request.into_inner(), "")?;
        let added = self.0.add(&context, vec![Ok(item)], true).await?.pop();
        let added = added.ok_or_else(|| Error::internal("an addition has no result"))??;
        Ok(Response::new(convert::add_response(added)))
    }

    async fn batch_add(&self, request: Request<wire::BatchAddRequest>) -> Answer<wire::BatchAddResponse> {
        let context = RequestContext::of(&request)?;
        let request = request.into_inner();
        let near = request.tell_near_duplicates;
        let items = convert::batch_request(request, self.0.message_bytes)?;
        let kept = self.0.add(&context, items, near).await?;
        let mut answer = convert::batch_response(kept, item_error);
        if self.0.is_too_large(&answer) {
            convert::shorten_additions(&mut answer);
        }
        Ok(Response::new(answer))
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Answer<wire::GetResponse> {
        let context = RequestContext::of(&request)?;
        let query = convert::get_request(request.into_inner(), self.0.clock.now())?;
        let memory = self.0.get(&context, query).await?;
        Ok(Response::new(wire::GetResponse {
            memory: Some(convert::memory(memory)),
        }))
    }

    async fn update(&self, request: Request<wire::UpdateRequest>) -> Answer<wire::UpdateResponse> {
        let context = RequestContext::of(&request)?;
        let patch = convert::update_request(request.into_inner())?;
        let kept = self.0.update(&context, patch).await?;
        Ok(Response::new(convert::update_response(kept)))
    }

    async fn delete(&self, request: Request<wire::DeleteRequest>) -> Answer<wire::DeleteResponse> {
        let context = RequestContext::of(&request)?;
        let item = convert::delete_request(request.into_inner(), "")?;
        let written = self.0.delete(&context, vec![Ok(item)]).await?.pop();
        let written = written.ok_or_else(|| Error::internal("a deletion has no result"))??;
        Ok(Response::new(convert::delete_response(written)))
    }

    async fn batch_delete(&self, request: Request<wire::BatchDeleteRequest>) -> Answer<wire::BatchDeleteResponse> {
        let context = RequestContext::of(&request)?;
        let items = convert::batch_delete_request(request.into_inner())?;
        let written = self.0.delete(&context, items).await?;
        let mut answer = convert::batch_delete_response(written, item_error);
        if self.0.is_too_large(&answer) {
            convert::shorten_deletions(&mut answer);
        }
        Ok(Response::new(answer))
    }

    async fn history(&self, request: Request<wire::HistoryRequest>) -> Answer<wire::HistoryResponse> {
        let context = RequestContext::of(&request)?;
        let query = convert::history_request(request.into_inner(), &context.principal().tenant)?;
        let page = self
            .0
            .history(&context, query.id, (query.before, query.limit), query.must_see)
            .await?;
        let answer = convert::history_response(page, &query.binding, self.0.page_bytes());
        self.0.fitting(answer, "lower `page_size`")
    }

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Answer<BoxStream<wire::WatchResponse>> {
        let context = RequestContext::of(&request)?;
        let query = convert::watch_request(request.into_inner())?;
        let watcher = self.0.watch(&context, query).await?;
        // Ended is a watcher that has told its error.
        let news = futures::stream::unfold(Some(watcher), async |watcher| {
            let mut watcher = watcher?;
            Some(match watcher.next().await {
                Ok(news) => (Ok(convert::news(news)), Some(watcher)),
                Err(error) => (Err(error.into()), None),
            })
        });
        Ok(Response::new(Box::pin(news)))
    }

    async fn export(&self, request: Request<wire::ExportRequest>) -> Answer<BoxStream<wire::ExportResponse>> {
        let context = RequestContext::of(&request)?;
        let tenant = &context.principal().tenant;
        let (query, exporting) = convert::export_request(
            request.into_inner(),
            tenant,
            (self.0.page_bytes(), self.0.message_bytes),
        )?;
        let export = self.0.export(&context, query).await?;
        // Ended is an export that has told its summary or its error.
        let chunks = futures::stream::unfold(Some((export, exporting)), async |under_way| {
            let (mut export, mut exporting) = under_way?;
            Some(match export.next().await {
                Ok(page) if page.is_empty() => (vec![Ok(exporting.end())], None),
                Ok(page) => {
                    let chunks = exporting.chunks(page);
                    let goes_on = chunks.iter().all(Result::is_ok);
                    let chunks = chunks.into_iter().map(|chunk| chunk.map_err(Status::from)).collect();
                    (chunks, goes_on.then_some((export, exporting)))
                }
                Err(error) => (vec![Err(error.into())], None),
            })
        });
        Ok(Response::new(Box::pin(chunks.flat_map(futures::stream::iter))))
    }

    async fn import(&self, request: Request<Streaming<wire::ImportRequest>>) -> Answer<wire::ImportResponse> {
        let context = RequestContext::of(&request)?;
        let mut chunks = request.into_inner();
        let (mut import, mut sent) = (None, None);
        while let Some(chunk) = chunks.message().await? {
            let under_way = match import.take() {
                Some(under_way) => under_way,
                None => self.0.import(&context, convert::import_id(&chunk.import_id)?).await?,
            };
            let under_way = import.insert(under_way);
            under_way
                .take(convert::import_items(chunk.memories, self.0.clock.now())?)
                .await?;
            sent = convert::sent(chunk.summary)?.or(sent);
        }
        let import = import.ok_or_else(|| convert::import_id("").err().unwrap_or_else(|| Error::internal("no id")))?;
        Ok(Response::new(convert::import_response(import.finish(sent).await?)))
    }

    async fn stats(&self, request: Request<wire::StatsRequest>) -> Answer<wire::StatsResponse> {
        let context = RequestContext::of(&request)?;
        let (scope, must_see) = convert::stats_request(request.into_inner())?;
        let stats = self.0.stats(&context, scope.as_ref(), must_see).await?;
        Ok(Response::new(convert::stats_response(stats)))
    }

    async fn list(&self, request: Request<wire::ListRequest>) -> Answer<wire::ListResponse> {
        let context = RequestContext::of(&request)?;
        let tenant = &context.principal().tenant;
        let (query, binding) = convert::list_request(request.into_inner(), tenant, self.0.clock.now())?;
        let page = self.0.list(&context, query).await?;
        let budget = self.0.page_bytes();
        self.0
            .fitting(convert::list_response(page, &binding, budget), "lower `page_size`")
    }

    async fn search(&self, request: Request<wire::SearchRequest>) -> Answer<wire::SearchResponse> {
        let context = RequestContext::of(&request)?;
        let query = convert::search_request(request.into_inner(), self.0.clock.now())?;
        let explain = query.explain;
        let found = self.0.search(&context, query).await?;
        let answer = convert::search_response(found, explain);
        self.0.fitting(answer, "lower `top_k`")
    }
}
