//! The running server, as the command line reaches it.

use std::path::PathBuf;
use std::time::Duration;

use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_rpc::AnyChannel;
use anyhow::Context as _;
use indicatif::ProgressBar;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Request, Status};

/// Largest message to take in or send, in bytes; the server has limits of its own.
const MESSAGE_BYTES: usize = 256 << 20;
/// Time that a call may take unless it says otherwise.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How long a server may be away before a long piece of work gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waiting for a server that is away, ever longer.
#[derive(Debug)]
pub struct Patience {
    waited: Duration,
    delay: Duration,
}

impl Patience {
    /// Nothing was waited yet.
    pub fn new() -> Self {
        Self {
            waited: Duration::ZERO,
            delay: Duration::from_millis(250),
        }
    }

    /// There was progress: waiting begins anew.
    pub fn progress(&mut self) {
        *self = Self::new();
    }

    /// Waits; false when that was long enough.
    pub async fn wait(&mut self, bar: &ProgressBar) -> bool {
        if self.waited >= PATIENCE {
            return false;
        }
        bar.set_message("waiting for the server");
        tokio::time::sleep(self.delay).await;
        self.waited += self.delay;
        self.delay = (self.delay * 2).min(Duration::from_secs(5));
        true
    }
}

/// True when the same call may succeed a little later: the server is away or busy, or the connection broke, which is no answer.
pub fn is_passing(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) || !aeterna_error::is_answer(status)
}

/// Works until it is done, or the user stops it.
///
/// # Errors
/// What the work says, or that it was stopped.
pub async fn unless_stopped<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::select! {
        done = work => done,
        stopped = tokio::signal::ctrl_c() => {
            stopped?;
            anyhow::bail!("stopped")
        }
    }
}

/// Where the server is and who calls.
#[derive(Clone, Debug, clap::Args)]
pub struct Remote {
    /// Address of the server
    #[arg(
        long,
        env = "AETERNA_URL",
        default_value = "http://127.0.0.1:7700",
        help_heading = "Server"
    )]
    url: String,
    /// File that holds the token to call with; AETERNA_TOKEN holds the token itself
    #[arg(long, env = "AETERNA_TOKEN_FILE", value_name = "FILE", help_heading = "Server")]
    token_file: Option<PathBuf>,
}

/// Where the server is, and how its answer is shown.
#[derive(Clone, Debug, clap::Args)]
pub struct Answered {
    /// Print the answer as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    remote: Remote,
}

impl Answered {
    /// As [`Remote::client`].
    ///
    /// # Errors
    /// When the address or the token can't be used.
    pub fn client(&self) -> anyhow::Result<Client> {
        self.remote.client()
    }
}

/// A connection that is made on first use.
#[derive(Clone, Debug)]
pub struct Client {
    channel: AnyChannel,
    token: Option<MetadataValue<Ascii>>,
}

impl Remote {
    /// Reads the token and prepares the connection.
    ///
    /// # Errors
    /// When the address or the token can't be used.
    pub fn client(&self) -> anyhow::Result<Client> {
        let token = match &self.token_file {
            Some(path) => Some(
                std::fs::read_to_string(path).with_context(|| format!("read the token file `{}`", path.display()))?,
            ),
            None => std::env::var("AETERNA_TOKEN").ok(),
        };
        let token = token.map(|token| format!("Bearer {}", token.trim()).parse());
        Ok(Client {
            channel: AnyChannel::remote(&self.url)?,
            token: token
                .transpose()
                .context("the token has characters that no token has")?,
        })
    }
}

impl Client {
    /// The memory service.
    pub fn memory(&self) -> MemoryServiceClient<AnyChannel> {
        MemoryServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES)
    }

    /// The embedding service.
    pub fn embedding(&self) -> EmbeddingServiceClient<AnyChannel> {
        EmbeddingServiceClient::new(self.channel.clone())
    }

    /// A message with the token and a deadline.
    pub fn request<T>(&self, message: T) -> Request<T> {
        self.request_within(message, TIMEOUT)
    }

    /// The same with a deadline of the caller's.
    pub fn request_within<T>(&self, message: T, timeout: Duration) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(timeout);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        request
    }
}
