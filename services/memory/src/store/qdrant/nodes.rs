//! The nodes: each call goes to one that answers, and to another when it does not.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use qdrant_client::{Qdrant, QdrantError};

use super::QdrantOptions;
use crate::store::StorageError;

/// How long connecting, or a node that is asked how it is, may take.
const ANSWER: Duration = Duration::from_secs(1);

/// Codes of gRPC: https://grpc.io/docs/guides/status-codes/
const NOT_FOUND: i32 = 5;
const ALREADY_EXISTS: i32 = 6;
/// INVALID_ARGUMENT, PERMISSION_DENIED, FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED, UNAUTHENTICATED.
const REFUSALS: [i32; 6] = [3, 7, 9, 11, 12, 16];

/// One node.
struct Node {
    /// Its endpoint, for logs.
    name: String,
    client: Qdrant,
    /// It did not answer when it was asked last.
    away: AtomicBool,
    /// It did not answer once since all replicas were well last. One that comes back takes its replicas for current until it has
    /// heard that they are not.
    returned: AtomicBool,
}

/// All nodes of a cluster.
pub(super) struct Nodes {
    nodes: Vec<Node>,
    next: AtomicUsize,
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.nodes.iter().map(|node| &node.name))
            .finish()
    }
}

/// What came of a call.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    /// There is no such collection.
    #[error("the collection is not there")]
    Missing,
    /// It is there already.
    #[error("it is there already")]
    Exists,
    /// No node answered, or none could do it just then.
    #[error(transparent)]
    Away(Box<dyn std::error::Error + Send + Sync>),
    /// It was refused, by all nodes alike.
    #[error(transparent)]
    Refused(Box<QdrantError>),
}

impl From<Failed> for StorageError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Missing | Failed::Exists => Self::Unavailable(Box::new(failed)),
            Failed::Away(cause) => Self::Unavailable(cause),
            Failed::Refused(error) => Self::Broken(error),
        }
    }
}

impl Failed {
    fn away(why: String) -> Self {
        Self::Away(why.into())
    }

    /// What an answer means that no other node would give differently; `None`: another one may.
    fn told(error: QdrantError) -> Result<Self, QdrantError> {
        let code = match &error {
            QdrantError::ResponseError { status } => i32::from(status.code()),
            QdrantError::ResourceExhaustedError { .. } => return Err(error),
            _ => return Ok(Self::Refused(Box::new(error))),
        };
        match code {
            NOT_FOUND => Ok(Self::Missing),
            ALREADY_EXISTS => Ok(Self::Exists),
            _ if REFUSALS.contains(&code) => Ok(Self::Refused(Box::new(error))),
            _ => Err(error),
        }
    }
}

impl Nodes {
    /// Nothing is connected before it is used.
    ///
    /// # Errors
    /// What is wrong with an endpoint.
    pub fn new(options: &QdrantOptions) -> Result<Self, StorageError> {
        let node = |endpoint: &String| {
            let mut config = Qdrant::from_url(endpoint)
                .connect_timeout(ANSWER)
                // Each call has a limit of its own, and this is none.
                .timeout(Duration::from_secs(60))
                .keep_alive_while_idle();
            config.check_compatibility = false;
            config.api_key.clone_from(&options.key);
            let client = config.build().map_err(|error| StorageError::Other(Box::new(error)))?;
            Ok(Node {
                name: endpoint.clone(),
                client,
                away: AtomicBool::new(false),
                returned: AtomicBool::new(false),
            })
        };
        let nodes = options.nodes.iter().map(node).collect::<Result<_, StorageError>>()?;
        Ok(Self {
            nodes,
            next: AtomicUsize::new(0),
        })
    }

    /// Does something at a node that answers, within a time, half of which one node may take while there are others. What is
    /// done must bear being done twice.
    pub async fn call<T, F>(&self, patience: Duration, work: impl Fn(Qdrant) -> F) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, QdrantError>>,
    {
        let end = Instant::now() + patience;
        let mut last = Failed::away("no Qdrant node answers".into());
        for node in self.in_turn() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let most = if self.nodes.len() > 1 { patience / 2 } else { patience };
            last = match tokio::time::timeout(left.min(most), work(node.client.clone())).await {
                Ok(Ok(done)) => {
                    node.is(true, None);
                    return Ok(done);
                }
                Ok(Err(error)) => match Failed::told(error) {
                    Ok(told) => return Err(told),
                    Err(error) => {
                        node.is(false, Some(&error));
                        Failed::Away(Box::new(error))
                    }
                },
                Err(_) => {
                    node.is(false, None);
                    Failed::away(format!("{} does not answer", node.name))
                }
            };
        }
        Err(last)
    }

    /// Those that always answered first, each of them in its turn; then those that came back, and at last those that are away.
    fn in_turn(&self) -> Vec<&Node> {
        let first = self.next.fetch_add(1, Ordering::Relaxed) % self.nodes.len().max(1);
        let (before, from) = self.nodes.split_at(first);
        let mut order: Vec<&Node> = from.iter().chain(before).collect();
        order.sort_by_key(|node| (node.away.load(Ordering::Relaxed), node.returned.load(Ordering::Relaxed)));
        order
    }

    /// All replicas are well, as a node says that was asked in its turn: those that came back are as good as the others.
    pub fn trust(&self) {
        for node in &self.nodes {
            node.returned.store(false, Ordering::Relaxed);
        }
    }

    /// Asks every node how it is: the versions of those that answer, and the names of those that don't.
    pub async fn look(&self) -> (Vec<String>, Vec<String>) {
        let asked = self.nodes.iter().map(|node| async move {
            let answer = tokio::time::timeout(ANSWER, node.client.health_check()).await;
            match answer {
                Ok(Ok(reply)) => {
                    node.is(true, None);
                    Ok(reply.version)
                }
                Ok(Err(error)) => {
                    node.is(false, Some(&error));
                    Err(node.name.clone())
                }
                Err(_) => {
                    node.is(false, None);
                    Err(node.name.clone())
                }
            }
        });
        let (mut versions, mut away) = (Vec::new(), Vec::new());
        for answer in futures::future::join_all(asked).await {
            match answer {
                Ok(version) => versions.push(version),
                Err(name) => away.push(name),
            }
        }
        (versions, away)
    }
}

impl Node {
    fn is(&self, well: bool, error: Option<&QdrantError>) {
        self.returned.fetch_or(!well, Ordering::Relaxed);
        let was = self.away.swap(!well, Ordering::Relaxed);
        match (was, well) {
            (false, false) => tracing::warn!(
                node = self.name,
                error = error.map(tracing::field::display),
                "a Qdrant node does not answer; others are asked"
            ),
            (true, true) => tracing::info!(node = self.name, "a Qdrant node answers again"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_that_came_back_is_asked_last_until_all_replicas_are_well() {
        let options = QdrantOptions::parse("//h1,h2,h3/p").unwrap();
        let nodes = Nodes::new(&options).unwrap();
        let firsts = || -> std::collections::BTreeSet<String> {
            let first = |_| nodes.in_turn().first().map(|node| node.name.clone());
            (0..3).filter_map(first).collect()
        };
        assert_eq!(firsts().len(), 3);
        let name = nodes.nodes[1].name.clone();
        nodes.nodes[1].is(false, None);
        assert_eq!(nodes.in_turn().pop().map(|node| &node.name), Some(&name));
        nodes.nodes[1].is(true, None);
        assert!(firsts().len() == 2 && !firsts().contains(&name));
        // Where all were away, those that are back are asked.
        nodes.nodes[0].is(false, None);
        nodes.nodes[2].is(false, None);
        assert_eq!(firsts(), [name].into());
        for node in &nodes.nodes {
            node.is(true, None);
        }
        nodes.trust();
        assert_eq!(firsts().len(), 3);
    }
}
