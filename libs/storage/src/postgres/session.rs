//! One transaction.

use std::fmt::Write as _;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres};

use super::nodes::Node;
use super::notice;
use crate::StorageError;

/// How long a commit may take, the wait for the synchronous standby included.
const COMMIT: Duration = Duration::from_secs(5);

/// A transaction under way. Its connection is lent again only after it was ended in good order.
#[derive(Debug)]
pub struct Session {
    connection: PoolConnection<Postgres>,
    node: Arc<Node>,
    ended: bool,
}

impl Session {
    pub(super) async fn begin(
        pool: &PgPool,
        begin: &str,
        settings: &[(&str, &str)],
        node: &Arc<Node>,
    ) -> Result<Self, StorageError> {
        let mut session = Self {
            connection: pool.acquire().await?,
            node: Arc::clone(node),
            ended: false,
        };
        let mut text = begin.to_owned();
        for (name, value) in settings {
            let _ = write!(text, "; SET LOCAL {name} = '{}'", value.replace('\'', "''"));
        }
        let begun = sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *session.connection);
        // A statement so small takes no time, but where the node does not answer.
        match tokio::time::timeout(super::CONNECT, begun).await {
            Ok(begun) => begun?,
            Err(_) => return Err(StorageError::Unavailable("the node does not answer".into())),
        };
        Ok(session)
    }

    /// The node that it runs on.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Ends it without having written anything.
    ///
    /// # Errors
    /// When the connection is lost, or its node does not answer.
    pub async fn finish(mut self) -> Result<(), StorageError> {
        let ended = sqlx::raw_sql("ROLLBACK").execute(&mut *self.connection);
        match tokio::time::timeout(super::CONNECT, ended).await {
            Ok(ended) => ended?,
            Err(_) => return Err(StorageError::Unavailable("the node does not answer".into())),
        };
        self.ended = true;
        Ok(())
    }

    pub(super) async fn commit(mut self) -> Result<(), StorageError> {
        let committed = notice::warned(sqlx::raw_sql("COMMIT").execute(&mut *self.connection));
        match tokio::time::timeout(COMMIT, committed).await {
            Err(_) => Err(StorageError::Unknown("the commit took too long".into())),
            Ok((Ok(_), true)) => Err(StorageError::Unknown("the server warned at the commit".into())),
            Ok((Ok(_), false)) => {
                self.ended = true;
                Ok(())
            }
            Ok((Err(error), _)) => Err(match StorageError::from(error) {
                // Said by a server that went away or lost the connection: it may have been done before.
                StorageError::Unavailable(cause) => StorageError::Unknown(cause),
                refused => refused,
            }),
        }
    }
}

impl Deref for Session {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.close_on_drop();
        }
    }
}
