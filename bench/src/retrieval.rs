//! Evidence recall, no language model in the loop: for each question, which part of the turns that answer it are among the
//! first k results (recall_acc of Maharana et al. 2024), averaged over all questions that name evidence.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aeterna::import::{Conversation, conversations};
use aeterna_proto::common::v1::Scope;
use aeterna_proto::embedding::v1::ListModelsRequest;
use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_proto::memory::v1::batch_add_result::Result as ItemResult;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{AddRequest, BatchAddRequest, Fusion, SearchMode, SearchRequest, StatsRequest};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::Program;
use anyhow::{Context as _, bail};
use serde_json::{Value, json};

/// What `retrieval` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// LoCoMo-form conversations with questions
    #[arg(long)]
    data: PathBuf,
    /// The `aeterna` binary to measure
    #[arg(long)]
    server: PathBuf,
    /// Model directory; left out: the `hash` model, which compares words only
    #[arg(long)]
    model_dir: Option<PathBuf>,
    /// Directory of a cross-encoder, to measure the default with it, too
    #[arg(long)]
    reranker_dir: Option<PathBuf>,
}

/// Cut-offs.
const AT: [usize; 4] = [1, 5, 10, 25];
const MODES: [(&str, SearchMode, Fusion, bool); 5] = [
    ("bm25", SearchMode::Lexical, Fusion::Unspecified, false),
    ("dense", SearchMode::Dense, Fusion::Unspecified, false),
    ("rrf", SearchMode::Hybrid, Fusion::Rrf, false),
    ("default", SearchMode::Unspecified, Fusion::Unspecified, false),
    ("reranked", SearchMode::Unspecified, Fusion::Unspecified, true),
];
/// Memories in one call.
const BATCH: usize = 200;
/// How long no vector may come before the model counts as gone.
const STALLED: Duration = Duration::from_secs(60);

type Client = MemoryServiceClient<AnyChannel>;

pub async fn run(args: Args) -> anyhow::Result<Value> {
    let shown = args.data.display();
    let text = std::fs::read_to_string(&args.data)
        .with_context(|| format!("read `{shown}`; pass LoCoMo-form conversations with DATA=<file>"))?;
    let conversations = conversations(&text).with_context(|| format!("read `{shown}`"))?;
    let data = tempfile::tempdir()?;
    let dir = args.model_dir.map(|dir| dir.display().to_string()).unwrap_or_default();
    let reranker = args
        .reranker_dir
        .map(|dir| dir.display().to_string())
        .unwrap_or_default();
    let mut flags = vec!["serve", "--embedding.model_dirs", &dir, "--log.filter", "warn"];
    flags.extend(["--embedding.reranker_dir", &reranker]);
    let server = Program::start(&args.server, &flags, data.path()).await;
    let report = measure(&server, &conversations, !reranker.is_empty()).await;
    server.stop().await;
    report
}

async fn measure(server: &Program, conversations: &[Conversation], reranker: bool) -> anyhow::Result<Value> {
    let models = EmbeddingServiceClient::new(server.channel())
        .list_models(ListModelsRequest {})
        .await?;
    let model = models.into_inner().models.into_iter().find(|model| model.default);
    let model = model.context("the server has a default model")?;
    let mut client = MemoryServiceClient::new(server.channel());
    for conversation in conversations {
        let began = Instant::now();
        import(&mut client, conversation).await?;
        eprintln!(
            "{}: {} turns in {:.1?}",
            conversation.id,
            conversation.turns.len(),
            began.elapsed()
        );
    }
    indexed(&mut client).await?;
    let mut modes = serde_json::Map::new();
    let mut questions = 0;
    for (name, mode, fusion, rerank) in MODES.into_iter().filter(|(.., rerank)| reranker || !rerank) {
        let began = Instant::now();
        let mut scores = Scores::default();
        for conversation in conversations {
            ask(&mut client, conversation, (mode, fusion, rerank), &mut scores).await?;
        }
        questions = scores.all.count;
        let each = began.elapsed().as_secs_f64() * 1e3 / questions.max(1) as f64;
        eprintln!("{name}: {} at {AT:?}, {each:.1} ms a question", scores.all.percent());
        modes.insert(name.into(), scores.report());
    }
    Ok(json!({"bench": "retrieval", "model": model.name, "questions": questions, "modes": modes}))
}

/// Each conversation is a session of its own.
fn scope(conversation: &Conversation) -> Option<Scope> {
    Some(Scope {
        session: conversation.id.clone(),
        ..Default::default()
    })
}

async fn import(client: &mut Client, conversation: &Conversation) -> anyhow::Result<()> {
    for turns in conversation.turns.chunks(BATCH) {
        let requests = turns.iter().map(|turn| {
            let mut memory = turn.clone();
            memory.scope = scope(conversation);
            AddRequest {
                memory: Some(memory),
                request_id: String::new(),
            }
        });
        let requests = requests.collect();
        let answer = client
            .batch_add(BatchAddRequest {
                requests,
                ..Default::default()
            })
            .await?
            .into_inner();
        for result in answer.results {
            if let Some(ItemResult::Error(error)) = result.result {
                bail!("a turn of {} was refused: {}", conversation.id, error.message);
            }
        }
    }
    Ok(())
}

/// Waits until every memory has its vector and the index holds it: a model that is slower than a write may wait leaves
/// vectors to be made later, and a measurement before that is one of words alone.
async fn indexed(client: &mut Client) -> anyhow::Result<()> {
    let mut last = (0, 0);
    let mut changed = Instant::now();
    loop {
        let stats = client.stats(StatsRequest::default()).await?.into_inner();
        let left = (stats.pending_embeddings, stats.index_lag);
        if left == (0, 0) {
            return Ok(());
        }
        if left != last {
            (last, changed) = (left, Instant::now());
            eprintln!(
                "{} vectors are pending, {} changes to be indexed",
                stats.pending_embeddings, stats.index_lag
            );
        }
        if changed.elapsed() > STALLED {
            bail!("vectors are still missing, and for {STALLED:?} none has come; see the server's log above");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// `D8:6; D9:17` names two turns; `D3:05` is turn 5. What names no turn stays as it is, and is never found.
fn evidence(list: &[String]) -> BTreeSet<String> {
    let parts = list
        .iter()
        .flat_map(|text| text.split([';', ',', ' ']))
        .filter(|part| !part.is_empty());
    let plain = |part: &str| {
        let (session, turn) = part.strip_prefix('D')?.split_once(':')?;
        Some(format!(
            "D{}:{}",
            session.parse::<u32>().ok()?,
            turn.parse::<u32>().ok()?
        ))
    };
    parts
        .map(|part| plain(part).unwrap_or_else(|| part.to_owned()))
        .collect()
}

async fn ask(
    client: &mut Client,
    conversation: &Conversation,
    (mode, fusion, rerank): (SearchMode, Fusion, bool),
    scores: &mut Scores,
) -> anyhow::Result<()> {
    for question in &conversation.questions {
        let wanted = evidence(&question.evidence);
        if wanted.is_empty() {
            continue;
        }
        let request = SearchRequest {
            scope: scope(conversation),
            query: question.question.clone(),
            top_k: AT[AT.len() - 1] as i32,
            mode: mode.into(),
            fusion: fusion.into(),
            rerank,
            ..Default::default()
        };
        let found = client.search(request).await?.into_inner();
        if found.degraded {
            bail!("a search was degraded: {:?}", found.degraded_reasons);
        }
        let references: Vec<String> = found
            .results
            .into_iter()
            .filter_map(|result| Some(result.memory?.source?.reference))
            .collect();
        let recall = AT.map(|k| {
            let hits = references
                .iter()
                .take(k)
                .filter(|reference| wanted.contains(*reference))
                .count();
            hits as f64 / wanted.len() as f64
        });
        scores.add(question.category, &conversation.id, recall);
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Mean {
    sums: [f64; AT.len()],
    count: usize,
}

impl Mean {
    fn add(&mut self, recall: [f64; AT.len()]) {
        self.sums.iter_mut().zip(recall).for_each(|(sum, one)| *sum += one);
        self.count += 1;
    }

    fn percent(&self) -> Value {
        let mean = |sum: &f64| ((sum / self.count.max(1) as f64) * 1e4).round() / 1e2;
        AT.iter()
            .zip(&self.sums)
            .map(|(k, sum)| (k.to_string(), mean(sum).into()))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }
}

#[derive(Debug, Default)]
struct Scores {
    all: Mean,
    by_category: BTreeMap<u8, Mean>,
    by_conversation: BTreeMap<String, Mean>,
}

impl Scores {
    fn add(&mut self, category: u8, conversation: &str, recall: [f64; AT.len()]) {
        self.all.add(recall);
        self.by_category.entry(category).or_default().add(recall);
        self.by_conversation.entry(conversation.into()).or_default().add(recall);
    }

    fn report(&self) -> Value {
        let categories: serde_json::Map<_, _> = self
            .by_category
            .iter()
            .map(|(key, mean)| (key.to_string(), mean.percent()))
            .collect();
        let conversations: serde_json::Map<_, _> = self
            .by_conversation
            .iter()
            .map(|(key, mean)| (key.clone(), mean.percent()))
            .collect();
        json!({"recall": self.all.percent(), "by_category": categories, "by_conversation": conversations})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_read_however_it_is_written() {
        let list = ["D8:6; D9:17".to_owned(), "D3:05".to_owned(), "D:11:26".to_owned()];
        let wanted = ["D3:5", "D8:6", "D9:17", "D:11:26"].map(str::to_owned);
        assert_eq!(evidence(&list), BTreeSet::from(wanted));
    }

    #[test]
    fn recall_is_the_mean_over_questions() {
        let mut mean = Mean::default();
        mean.add([0.0, 0.5, 1.0, 1.0]);
        mean.add([1.0, 1.0, 1.0, 1.0]);
        assert_eq!(mean.percent(), json!({"1": 50.0, "5": 75.0, "10": 100.0, "25": 100.0}));
    }
}
