//! Models behind a server that speaks OpenAI's `POST /embeddings`: batches, back-off, fallbacks, lenient answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rand::Rng as _;
use reqwest::header::HeaderValue;
use reqwest::{Client, StatusCode, Url};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{Embedded, Model, ModelInfo, TextKind, normalise};
use crate::error::EmbeddingError;
use crate::metrics::Metrics;

/// Texts in one call, and their bytes, at most.
const BATCH: usize = 128;
const BATCH_BYTES: usize = 256 << 10;
/// Bytes of a text that every model has room for: what is refused at this length is refused for what it says.
const SHORT: usize = 128;
/// How long a text waits for others to share its call.
const GATHER: Duration = Duration::from_millis(3);
/// Calls under way at a time.
const CALLS: usize = 8;
/// Rounds over all servers before a call is given up.
const ROUNDS: u32 = 4;
/// Times that texts are divided to find those at fault, beside two for each.
const DIVISIONS: usize = 64;
/// The first pause between rounds; it doubles, with jitter.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest pause that a server may ask for with Retry-After.
const LONGEST: Duration = Duration::from_secs(20);
/// Bytes of an answer, at most: 128 vectors of 4096 values in words.
const ANSWER_BYTES: usize = 64 << 20;

/// How the model is reached.
#[derive(Clone, Debug)]
pub struct Options {
    /// Base URLs such as `https://api.openai.com/v1`, the first one first; all must serve the same model.
    pub urls: Vec<Url>,
    /// Name of the model.
    pub model: String,
    /// Dimensions of its vectors.
    pub dimension: usize,
    /// It was trained so that a prefix of a vector is a good vector, and takes `dimensions`.
    pub matryoshka: bool,
    /// Sent as a bearer token.
    pub key: Option<aeterna_config::Secret>,
    /// Time that one call may take.
    pub timeout: Duration,
    /// US dollars for a million tokens; `None`: unknown, and then no cost is counted.
    pub price: Option<f64>,
}

type Job = (String, oneshot::Sender<Result<Embedded, EmbeddingError>>);

/// The model, with a task that gathers texts into calls.
pub struct OpenAiModel {
    info: ModelInfo,
    jobs: mpsc::Sender<Job>,
}

impl OpenAiModel {
    /// Prepares the connection; nothing is sent yet.
    ///
    /// # Errors
    /// When the HTTP client can't be made.
    pub fn new(options: Options, metrics: Metrics) -> Result<Self, EmbeddingError> {
        let client = Client::builder().timeout(options.timeout).build();
        let client = client.map_err(|error| EmbeddingError::Failed(error.to_string()))?;
        let info = ModelInfo {
            name: options.model.clone(),
            provider: "openai",
            dimension: options.dimension,
            matryoshka: options.matryoshka,
            lexical: false,
            max_tokens: 0,
            revision: format!("openai-{}", options.dimension),
        };
        let (jobs, queue) = mpsc::channel(4096);
        let server = Arc::new(Server {
            client,
            options,
            metrics,
            takes: AtomicBool::new(false),
        });
        tokio::spawn(gather(server, queue));
        Ok(Self { info, jobs })
    }
}

#[async_trait]
impl Model for OpenAiModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    async fn embed(&self, text: String, _kind: TextKind) -> Result<Embedded, EmbeddingError> {
        let ended = || EmbeddingError::Failed("the task that calls the server has ended".into());
        let (answer, answered) = oneshot::channel();
        self.jobs.send((text, answer)).await.map_err(|_| ended())?;
        answered.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Gathers texts into calls, until the model is dropped.
async fn gather(server: Arc<Server>, mut queue: mpsc::Receiver<Job>) {
    let calls = Arc::new(Semaphore::new(CALLS));
    while let Some(first) = queue.recv().await {
        let mut bytes = first.0.len();
        let mut batch = vec![first];
        let deadline = tokio::time::Instant::now() + GATHER;
        while batch.len() < BATCH && bytes < BATCH_BYTES {
            match tokio::time::timeout_at(deadline, queue.recv()).await {
                Ok(Some(job)) => {
                    bytes += job.0.len();
                    batch.push(job);
                }
                Ok(None) | Err(_) => break,
            }
        }
        // Backpressure: while all calls are under way, texts wait in the queue.
        let Ok(permit) = Arc::clone(&calls).acquire_owned().await else {
            return;
        };
        // Who has given up waiting needs no vector.
        batch.retain(|(_, answer)| !answer.is_closed());
        if batch.is_empty() {
            continue;
        }
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let (texts, answers): (Vec<String>, Vec<_>) = batch.into_iter().unzip();
            let results = server.embed(&texts).await;
            for (answer, result) in answers.into_iter().zip(results) {
                // The asker may have gone; then nobody needs the vector.
                let _ = answer.send(result);
            }
            drop(permit);
        });
    }
}

struct Server {
    client: Client,
    options: Options,
    metrics: Metrics,
    /// It has taken a text: when it refuses one, the text is at fault, and not the settings.
    takes: AtomicBool,
}

/// What became of one call.
enum Outcome {
    Done(Vec<Embedded>),
    NotDone(Failure, Option<Duration>),
}

/// Why texts have no vectors.
enum Failure {
    /// The texts are at fault.
    Refused(String),
    /// This server has failed at these texts: they may be at fault or not.
    Broken(String, Url),
    /// The server is at fault, or not there.
    Away(String),
}

impl Server {
    async fn embed(&self, texts: &[String]) -> Vec<Result<Embedded, EmbeddingError>> {
        let left = AtomicUsize::new(2 * texts.len() + DIVISIONS);
        self.embed_in(texts, ROUNDS, &left).await
    }

    /// Embeds texts; one that the server refuses does not keep the others from their vectors. Servers say in many ways that a
    /// text is longer than the model's window, and not how much longer, and some fail at it: one that is refused alone is cut in
    /// half until it is taken, or too short to be too long. So many searches for those at fault are `left`.
    async fn embed_in(
        &self,
        texts: &[String],
        mut rounds: u32,
        left: &AtomicUsize,
    ) -> Vec<Result<Embedded, EmbeddingError>> {
        let error = match self.patiently(texts, rounds).await {
            Ok(embedded) => return embedded.into_iter().map(Ok).collect(),
            Err(Failure::Refused(why)) => self.whose_fault(why).await,
            Err(Failure::Broken(why, url)) => match self.breaks_at(texts, rounds, &url).await {
                true => {
                    // All of them were tried often enough; each that is found to be at fault is tried again.
                    rounds = 1;
                    EmbeddingError::Refused(why)
                }
                false => EmbeddingError::Away(why),
            },
            Err(Failure::Away(why)) => EmbeddingError::Away(why),
        };
        let spend = |left: usize| left.checked_sub(1);
        let error = match error {
            EmbeddingError::Refused(why) if left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).is_err() => {
                EmbeddingError::Away(why)
            }
            error => error,
        };
        match (texts, error) {
            ([_, _, ..], EmbeddingError::Refused(_)) => {
                let (first, second) = texts.split_at(texts.len() / 2);
                let mut results = Box::pin(self.embed_in(first, rounds, left)).await;
                results.extend(Box::pin(self.embed_in(second, rounds, left)).await);
                results
            }
            ([text], EmbeddingError::Refused(_)) if text.len() > SHORT => {
                let mut result = Box::pin(self.embed_in(&[half(text).to_owned()], rounds, left)).await;
                let cut = |embedded: &mut Embedded| embedded.truncated = true;
                result.iter_mut().flatten().for_each(cut);
                result
            }
            (texts, error) => texts.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    /// Whether it is the texts at which the server fails: it takes others meanwhile, and a text that is alone not even after
    /// several pauses.
    async fn breaks_at(&self, texts: &[String], rounds: u32, url: &Url) -> bool {
        if let [_] = texts
            && rounds < ROUNDS
            && !matches!(self.patiently(texts, ROUNDS).await, Err(Failure::Broken(..)))
        {
            return false;
        }
        matches!(self.call(url, &["a word".to_owned()]).await, Outcome::Done(_))
    }

    /// Whether a refusal is of the texts; a server that takes none is set up wrongly.
    async fn whose_fault(&self, why: String) -> EmbeddingError {
        if !self.takes.load(Ordering::SeqCst)
            && let Err(Failure::Refused(_)) = self.patiently(&["a word".to_owned()], ROUNDS).await
        {
            let what = "it refuses every text: look at `embedding.openai.model`, `.dimension` and `.matryoshka`";
            return EmbeddingError::Away(format!("{why}; {what}"));
        }
        EmbeddingError::Refused(why)
    }

    /// Asks one server after the other, and all of them again after a pause.
    async fn patiently(&self, texts: &[String], rounds: u32) -> Result<Vec<Embedded>, Failure> {
        let (mut pause, mut last) = (PAUSE, Failure::Away(String::new()));
        for round in 0..rounds {
            let mut asked: Option<Duration> = None;
            // One that has failed at the texts says more than one that is not there.
            let mut broken = false;
            for url in &self.options.urls {
                match self.call(url, texts).await {
                    Outcome::Done(embedded) => {
                        self.takes.store(true, Ordering::SeqCst);
                        return Ok(embedded);
                    }
                    Outcome::NotDone(Failure::Refused(why), _) => return Err(Failure::Refused(why)),
                    Outcome::NotDone(failure, wait) => {
                        let (Failure::Broken(why, _) | Failure::Away(why) | Failure::Refused(why)) = &failure;
                        tracing::warn!(%url, why, "an embedding server fails");
                        asked = asked.max(wait);
                        if !broken {
                            broken = matches!(failure, Failure::Broken(..));
                            last = failure;
                        }
                    }
                }
            }
            if round + 1 < rounds {
                let jitter = rand::rng().random_range(0.5..1.5);
                let own = pause.mul_f64(jitter);
                tokio::time::sleep(asked.map_or(own, |asked| asked.min(LONGEST).max(own))).await;
                pause *= 2;
            }
        }
        Err(last)
    }

    async fn call(&self, url: &Url, texts: &[String]) -> Outcome {
        let options = &self.options;
        let mut body = json!({"model": options.model, "input": texts, "encoding_format": "float"});
        if options.matryoshka {
            body["dimensions"] = options.dimension.into();
        }
        let address = format!("{}/embeddings", url.as_str().trim_end_matches('/'));
        let mut request = self.client.post(address).json(&body);
        if let Some(key) = &options.key {
            request = request.bearer_auth(key.expose());
        }
        let failed = |error: reqwest::Error| Outcome::NotDone(Failure::Away(error.without_url().to_string()), None);
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(error) => return failed(error),
        };
        let status = response.status();
        let wait = response.headers().get("retry-after").and_then(pause);
        let mut bytes = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
                Ok(None) => break,
                Err(error) => return failed(error),
            }
            if bytes.len() > ANSWER_BYTES {
                let why = format!("the answer has more than {ANSWER_BYTES} bytes");
                return Outcome::NotDone(Failure::Away(why), None);
            }
        }
        if !status.is_success() {
            let said: String = String::from_utf8_lossy(&bytes).chars().take(300).collect();
            // What it says is for the operator: it may name keys and organisations.
            tracing::warn!(%url, status = status.as_u16(), said, "an embedding server refuses");
            let why = format!("status {}", status.as_u16());
            // A wrong key or name is for an operator to mend.
            let failure = match status {
                StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
                    Failure::Refused(why)
                }
                // Some servers answer this to a text that is too long.
                StatusCode::INTERNAL_SERVER_ERROR => Failure::Broken(why, url.clone()),
                _ => Failure::Away(why),
            };
            return Outcome::NotDone(failure, wait);
        }
        match self.read(&bytes, texts, url) {
            Ok(embedded) => Outcome::Done(embedded),
            Err(failure) => Outcome::NotDone(failure, None),
        }
    }

    /// The vectors of an answer, in the order of the texts. Servers differ: places may be missing or out of order, counts of
    /// tokens may be missing.
    fn read(&self, bytes: &[u8], texts: &[String], url: &Url) -> Result<Vec<Embedded>, Failure> {
        let unusable = |why: &str| Failure::Away(why.to_owned());
        let wanted = texts.len();
        let answer: Value =
            serde_json::from_slice(bytes).map_err(|error| unusable(&format!("the answer is no JSON: {error}")))?;
        let data = answer["data"]
            .as_array()
            .ok_or_else(|| unusable("the answer has no `data`"))?;
        if data.len() != wanted {
            let why = format!("the answer has {} vectors for {wanted} texts", data.len());
            return Err(unusable(&why));
        }
        let mut vectors: Vec<Option<Vec<f32>>> = vec![None; wanted];
        for (place, item) in data.iter().enumerate() {
            let place = item["index"]
                .as_u64()
                .and_then(|index| usize::try_from(index).ok())
                .unwrap_or(place);
            let values = item["embedding"]
                .as_array()
                .ok_or_else(|| unusable("an item has no `embedding`"))?;
            let number = |value: &Value| value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
            let values: Option<Vec<f32>> = values.iter().map(number).collect();
            // As a model does at some texts.
            let why = "an embedding has a value that is no finite number";
            let broken = || Failure::Broken(why.to_owned(), url.clone());
            let mut values = values.ok_or_else(broken)?;
            let dimension = self.options.dimension;
            if values.len() != dimension {
                let found = values.len();
                let why = format!("an embedding has {found} values, and `embedding.openai.dimension` is {dimension}");
                return Err(unusable(&why));
            }
            normalise(&mut values);
            *vectors
                .get_mut(place)
                .ok_or_else(|| unusable("an item has a place beyond the texts"))? = Some(values);
        }
        let tokens = answer["usage"]["prompt_tokens"]
            .as_u64()
            .or(answer["usage"]["total_tokens"].as_u64())
            .unwrap_or(0);
        if let Some(price) = self.options.price {
            // A dollar for a million of them is a millionth for each.
            self.metrics.cost.add(tokens as f64 * price, &[]);
        }
        let embedded = vectors.into_iter().zip(shares(tokens, texts)).map(|(vector, tokens)| {
            Some(Embedded {
                vector: vector?,
                tokens,
                truncated: false,
            })
        });
        embedded
            .collect::<Option<_>>()
            .ok_or_else(|| unusable("two embeddings have the same place"))
    }
}

/// The first half of a text, cut between characters.
fn half(text: &str) -> &str {
    &text[..text.floor_char_boundary(text.len().div_ceil(2))]
}

/// A count of tokens of a whole call, divided among its texts by their length; nothing of it is lost.
fn shares(tokens: u64, texts: &[String]) -> impl Iterator<Item = u32> {
    let all: u64 = texts.iter().map(|text| text.len() as u64).sum();
    let upto = move |bytes: u64| tokens.saturating_mul(bytes) / all.max(1);
    texts.iter().scan(0, move |before, text| {
        let from = upto(*before);
        *before += text.len() as u64;
        Some(u32::try_from(upto(*before) - from).unwrap_or(u32::MAX))
    })
}

/// How long a server asks to be left alone: seconds, or a date (RFC 9110, §10.2.3).
fn pause(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        // A date that has passed asks for nothing.
        Err(_) => Some(
            httpdate::parse_http_date(text)
                .ok()?
                .duration_since(SystemTime::now())
                .unwrap_or_default(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_may_ask_for_seconds_or_name_a_date() {
        let asked = |text: &str| pause(&HeaderValue::from_str(text).unwrap());
        assert_eq!(asked("7"), Some(Duration::from_secs(7)));
        assert_eq!(asked("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(90));
        let wait = asked(&soon).unwrap();
        assert!((80..=90).contains(&wait.as_secs()), "{wait:?}");
        assert_eq!(asked("later"), None);
    }

    #[test]
    fn tokens_of_a_call_are_divided_among_its_texts() {
        let texts = ["a", "four", "a", "ninety bytes and so on"].map(str::to_owned);
        let divided: Vec<u32> = shares(57, &texts).collect();
        assert_eq!(divided.iter().sum::<u32>(), 57);
        assert!(divided[1] > divided[0] && divided[3] > 40, "{divided:?}");
        assert_eq!(shares(u64::MAX, &texts[..1]).collect::<Vec<_>>(), [u32::MAX]);
        assert_eq!(shares(7, &[]).count(), 0);
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!((half("abcd"), half("abc"), half("äö")), ("ab", "ab", "ä"));
        let mut text = "\u{1f600}".repeat(500);
        while text.len() > SHORT {
            text = half(&text).to_owned();
        }
        assert!(text.len() > SHORT / 4 && text.chars().all(|c| c == '\u{1f600}'));
    }
}
