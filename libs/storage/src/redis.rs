//! Redis, alone or watched by Sentinels: where it is, and connections to its master.
//!
//! The Sentinels are all asked at once for every new connection, and a server is used only while it says itself that it is the
//! master: one that was demoted, or that Sentinel has not noticed yet, is found out before each use. Nothing in it is the last
//! copy of anything, so nothing here waits for replicas; `min-replicas-to-write` in the server's settings keeps a master that was
//! cut off from going on alone.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use aeterna_config::{Reader, StoreUri};
use deadpool::Runtime;
use deadpool::managed::{self, Metrics, Pool, PoolError, RecycleError, RecycleResult, Timeouts};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo as _, RedisError, Value};

use crate::StorageError;

/// How long connecting, a command or a Sentinel's answer may take.
const ANSWER: Duration = Duration::from_secs(1);
/// How long a call waits for a connection.
const WAIT: Duration = Duration::from_secs(2);
/// Connections at once.
const CONNECTIONS: usize = 4;

/// Where Redis is, and who comes to it.
#[derive(Clone)]
pub struct RedisOptions {
    /// `host:port` of the server, or of each Sentinel.
    hosts: Vec<String>,
    /// What the Sentinels call the master; `None`: there are none.
    master: Option<String>,
    database: i64,
    user: Option<String>,
    password: Option<String>,
    /// What the Sentinels ask for.
    sentinel_password: Option<String>,
}

impl fmt::Debug for RedisOptions {
    /// Without the passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.hosts.join(","))
    }
}

impl RedisOptions {
    /// From the scheme of a URI and what follows it: `redis://user@host:6379/0`, or
    /// `redis+sentinel://user@h1:26379,h2,h3/master`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(scheme: &str, rest: &str) -> Result<Self, String> {
        const FORM: &str = "write `redis://host:6379` or `redis+sentinel://host1:26379,host2,host3/master`";
        let sentinels = match scheme {
            "redis" => false,
            "redis+sentinel" => true,
            _ => return Err(FORM.into()),
        };
        let rest = rest.strip_prefix("//").ok_or(FORM)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (Some(user).filter(|user| !user.is_empty()), hosts),
            None => (None, authority),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err("a password in the URI would be shown; set it in the setting beside this one".into());
        }
        let port = if sentinels { 26379 } else { 6379 };
        let mut places = Vec::new();
        for host in hosts.split(',') {
            let (name, number) = match host.rsplit_once(':') {
                Some((name, number)) if !number.ends_with(']') => (name, number.parse::<u16>().map_err(|_| FORM)?),
                _ => (host, port),
            };
            if name.is_empty() {
                return Err(FORM.into());
            }
            places.push(format!("{name}:{number}"));
        }
        let (master, database) = match (sentinels, path) {
            (true, "") => return Err("name the master after the hosts, as the Sentinels do: `/mymaster`".into()),
            (true, master) => (Some(master.to_owned()), 0),
            (false, "") => (None, 0),
            (false, number) => (None, number.parse().map_err(|_| FORM)?),
        };
        if !sentinels && places.len() > 1 {
            return Err("several servers need Sentinels that watch them: `redis+sentinel://…`".into());
        }
        Ok(Self {
            hosts: places,
            master,
            database,
            user: user.map(ToOwned::to_owned),
            password: None,
            sentinel_password: None,
        })
    }

    /// From the setting of that name, with the passwords in the two beside it, `…_password` and `…_sentinel_password`; `None`
    /// after noting problems, and an empty setting stands for no server.
    pub fn read(reader: &mut Reader<'_>, name: &str) -> Option<Option<Self>> {
        let mut expose = |setting: String| reader.secret(&setting).flatten().map(|it| it.expose().to_owned());
        let password = expose(format!("{name}_password"));
        let sentinels = expose(format!("{name}_sentinel_password"));
        let uri: Option<StoreUri> = reader.optional(name)?;
        let Some(uri) = uri else { return Some(None) };
        match Self::parse(&uri.scheme, &uri.rest) {
            Ok(options) => Some(Some(options.with_passwords(password, sentinels))),
            Err(why) => {
                reader.problem(name, why);
                None
            }
        }
    }

    /// The same with passwords for the servers and for the Sentinels.
    #[must_use]
    pub fn with_passwords(mut self, server: Option<String>, sentinels: Option<String>) -> Self {
        self.password = server;
        self.sentinel_password = sentinels;
        self
    }

    /// The server of an address, as the URI says that it is to be used.
    pub(crate) fn server(&self, host: &str) -> Result<Client, StorageError> {
        client(host, self.database, self.user.as_deref(), self.password.as_deref())
    }

    async fn master_by(&self, sentinel: &str, name: &str) -> Result<String, StorageError> {
        let mut connection = connect(&client(sentinel, 0, None, self.sentinel_password.as_deref())?).await?;
        let mut ask = redis::cmd("SENTINEL");
        ask.arg("get-master-addr-by-name").arg(name);
        let found: Option<(String, u16)> = ask.query_async(&mut connection).await?;
        let (host, port) = found.ok_or_else(|| away(format!("the Sentinels know no master `{name}`")))?;
        Ok(format!("{host}:{port}"))
    }

    /// Where the master is: what most Sentinels say, or most of those that answer. One that was cut off may not know of a failover
    /// yet, and one that does not answer is not waited for when the others agree.
    pub(crate) async fn master(&self) -> Result<String, StorageError> {
        let Some(name) = &self.master else {
            return Ok(self.hosts.join(","));
        };
        let asked = self.hosts.iter().map(|sentinel| self.master_by(sentinel, name));
        let mut asked: FuturesUnordered<_> = asked.collect();
        let (mut votes, mut last) = (BTreeMap::<String, usize>::new(), None);
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(master) => {
                    let count = votes.entry(master.clone()).or_default();
                    *count += 1;
                    if *count > self.hosts.len() / 2 {
                        return Ok(master);
                    }
                }
                Err(error) => last = Some(error),
            }
        }
        let most = votes.into_iter().max_by_key(|(_, votes)| *votes);
        most.map(|(master, _)| master)
            .ok_or_else(|| last.unwrap_or_else(|| away("no Sentinel answers".into())))
    }

    /// A connection to the master, which says itself that it is, with where it is.
    pub(crate) async fn to_master(&self) -> Result<(String, MultiplexedConnection), StorageError> {
        let master = self.master().await?;
        let mut connection = connect(&self.server(&master)?).await?;
        match leads(&mut connection).await? {
            true => Ok((master, connection)),
            false => Err(away(format!("{master} is no master"))),
        }
    }
}

fn client(host: &str, database: i64, user: Option<&str>, password: Option<&str>) -> Result<Client, StorageError> {
    let info = format!("redis://{host}").into_connection_info()?;
    let mut settings = info.redis_settings().clone().set_db(database);
    if let Some(user) = user {
        settings = settings.set_username(user);
    }
    if let Some(password) = password {
        settings = settings.set_password(password);
    }
    Ok(Client::open(info.set_redis_settings(settings))?)
}

pub(crate) fn away(why: String) -> StorageError {
    StorageError::Unavailable(why.into())
}

impl From<RedisError> for StorageError {
    fn from(error: RedisError) -> Self {
        // Nothing here is the last copy of anything: whatever it is, another attempt is made.
        Self::Unavailable(Box::new(error))
    }
}

/// What is asked of a server, for as long as it may take.
pub(crate) async fn within<T>(what: impl Future<Output = Result<T, RedisError>>) -> Result<T, StorageError> {
    match tokio::time::timeout(ANSWER, what).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(away("Redis does not answer".into())),
    }
}

async fn connect(client: &Client) -> Result<MultiplexedConnection, StorageError> {
    let limits = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(ANSWER))
        .set_response_timeout(Some(ANSWER));
    within(client.get_multiplexed_async_connection_with_config(&limits)).await
}

/// Whether the server takes itself for the master.
pub(crate) async fn leads(connection: &mut MultiplexedConnection) -> Result<bool, StorageError> {
    let role: Vec<Value> = within(redis::cmd("ROLE").query_async(connection)).await?;
    Ok(matches!(role.first(), Some(Value::BulkString(name)) if name == b"master"))
}

struct Manager(Arc<RedisOptions>);

impl managed::Manager for Manager {
    type Type = MultiplexedConnection;
    type Error = StorageError;

    async fn create(&self) -> Result<MultiplexedConnection, StorageError> {
        Ok(self.0.to_master().await?.1)
    }

    async fn recycle(&self, connection: &mut MultiplexedConnection, _: &Metrics) -> RecycleResult<StorageError> {
        match leads(connection).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(RecycleError::message("it is no master any more")),
            Err(error) => Err(RecycleError::Backend(error)),
        }
    }
}

/// Connections to the master. Nothing is connected before it is used.
#[derive(Clone)]
pub(crate) struct Redis {
    pub(crate) options: Arc<RedisOptions>,
    pool: Pool<Manager>,
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redis({:?})", self.options)
    }
}

impl Redis {
    /// For a server, or for the master that Sentinels name.
    ///
    /// # Errors
    /// Never: the pool has a runtime.
    pub(crate) fn new(options: RedisOptions) -> Result<Self, StorageError> {
        let options = Arc::new(options);
        let timeouts = Timeouts {
            wait: Some(WAIT),
            create: Some(2 * WAIT),
            recycle: Some(ANSWER),
        };
        let pool = Pool::builder(Manager(Arc::clone(&options)))
            .max_size(CONNECTIONS)
            .timeouts(timeouts)
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StorageError::Other(Box::new(error)))?;
        Ok(Self { options, pool })
    }

    /// Lends a connection to the master; one on which anything failed is not lent again.
    pub(crate) async fn with<T>(
        &self,
        work: impl AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    ) -> Result<T, StorageError> {
        let mut connection = self.pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => error,
            other => StorageError::Unavailable(Box::new(other)),
        })?;
        let done = within(work(&mut connection)).await;
        if done.is_err() {
            drop(managed::Object::take(connection));
        }
        done
    }
}

/// The name of a key of ours.
pub(crate) fn key(kind: &str, name: &str) -> String {
    format!("aeterna:{kind}:{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_and_sentinels_are_read_from_the_uri() {
        let options = RedisOptions::parse("redis+sentinel", "//ann@h1,h2:7000,[::1]:7001/mymaster").unwrap();
        assert_eq!(options.hosts, ["h1:26379", "h2:7000", "[::1]:7001"]);
        assert_eq!(
            (options.master.as_deref(), options.user.as_deref()),
            (Some("mymaster"), Some("ann"))
        );
        let options = RedisOptions::parse("redis", "//h/3").unwrap();
        assert_eq!(
            (options.hosts, options.database, options.master),
            (vec!["h:6379".to_owned()], 3, None)
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (scheme, rest, part) in [
            ("rediss", "//h", "write `redis://"),
            ("redis", "h", "write `redis://"),
            ("redis", "//:6379", "write `redis://"),
            ("redis", "//h:port", "write `redis://"),
            ("redis", "//h/name", "write `redis://"),
            ("redis", "//h1,h2", "need Sentinels"),
            ("redis+sentinel", "//h1,h2", "name the master"),
            ("redis", "//a:secret@h", "would be shown"),
        ] {
            let said = RedisOptions::parse(scheme, rest).unwrap_err();
            assert!(said.contains(part) && !said.contains("secret"), "{rest}: {said}");
        }
    }
}
