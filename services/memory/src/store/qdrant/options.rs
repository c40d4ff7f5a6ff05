//! Where the nodes are, and how collections are made.

use std::fmt;
use std::str::FromStr;

use qdrant_client::qdrant::ReadConsistencyType;

/// How Qdrant is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct QdrantOptions {
    /// The gRPC endpoint of each node.
    pub(super) nodes: Vec<String>,
    /// What the names of our collections begin with.
    pub(super) prefix: String,
    /// Shards of a collection.
    pub(super) shards: u32,
    /// Nodes that have each shard.
    pub(super) replicas: u32,
    /// Replicas that must have a change before it counts.
    pub(super) consistency: u32,
    /// How many replicas a search asks; `None`: one.
    pub(super) read: Option<ReadConsistencyType>,
    /// What the nodes ask for.
    pub(super) key: Option<String>,
}

impl fmt::Debug for QdrantOptions {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.nodes.join(","), self.prefix)
    }
}

impl QdrantOptions {
    /// From what follows `qdrant:` in a URI: `//host1:6334,host2,host3/aeterna?shards=6&replicas=2&consistency=1&read=one&tls=true`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(rest: &str) -> Result<Self, String> {
        const FORM: &str = "write `qdrant://host1:6334,host2,host3/aeterna`";
        let rest = rest.strip_prefix("//").ok_or(FORM)?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, prefix) = place.split_once('/').unwrap_or((place, ""));
        if hosts.contains('@') {
            return Err("a key in the URI would be shown; set it in the setting beside this one".into());
        }
        let (mut shards, mut replicas, mut consistency, mut read, mut tls) = (None, 2, 1, None, false);
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            match parameter.split_once('=') {
                Some(("shards", value)) => shards = Some(number("shards", value)?),
                Some(("replicas", value)) => replicas = number("replicas", value)?,
                Some(("consistency", value)) => consistency = number("consistency", value)?,
                Some(("read", value)) => {
                    read = match value {
                        "one" => None,
                        "majority" => Some(ReadConsistencyType::Majority),
                        "quorum" => Some(ReadConsistencyType::Quorum),
                        "all" => Some(ReadConsistencyType::All),
                        _ => return Err("`read` is `one`, `majority`, `quorum` or `all`".into()),
                    }
                }
                Some(("tls", value)) => tls = value.parse().map_err(|_| "`tls` is `true` or `false`")?,
                _ => {
                    return Err(format!(
                        "`{parameter}` is unknown; there are shards, replicas, consistency, read and tls"
                    ));
                }
            }
        }
        if consistency > replicas {
            return Err(format!(
                "`consistency` can't be more than `replicas`: {replicas} nodes have each shard"
            ));
        }
        let scheme = if tls { "https" } else { "http" };
        let mut nodes = Vec::new();
        for host in hosts.split(',') {
            let (name, port) = match host.rsplit_once(':') {
                Some((name, port)) if !port.ends_with(']') => (name, port.parse::<u16>().map_err(|_| FORM)?),
                _ => (host, 6334),
            };
            if name.is_empty() {
                return Err(FORM.into());
            }
            nodes.push(format!("{scheme}://{name}:{port}"));
        }
        let named = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if !prefix.chars().all(named) || prefix.len() > 60 {
            return Err("what the names of collections begin with has letters, digits, `-` and `_`, at most 60".into());
        }
        let prefix = if prefix.is_empty() { "aeterna" } else { prefix };
        Ok(Self {
            // Two for each node, so that one that is added later can take its part.
            shards: shards.unwrap_or(2 * nodes.len() as u32),
            nodes,
            prefix: prefix.into(),
            replicas,
            consistency,
            read,
            key: None,
        })
    }

    /// The same with the key that the nodes ask for.
    #[must_use]
    pub fn with_key(mut self, key: Option<String>) -> Self {
        self.key = key;
        self
    }
}

fn number(name: &str, value: &str) -> Result<u32, String> {
    let number = u32::from_str(value).ok().filter(|number| (1..=1000).contains(number));
    number.ok_or_else(|| format!("`{name}` is a number from 1 to 1000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_what_collections_are_like_are_read_from_the_uri() {
        let options =
            QdrantOptions::parse("//h1:7000,h2,[::1]:7001/team?replicas=3&consistency=2&read=quorum&tls=true").unwrap();
        let options = options.with_key(Some("secret".into()));
        assert_eq!(
            options.nodes,
            ["https://h1:7000", "https://h2:6334", "https://[::1]:7001"]
        );
        let made = (options.shards, options.replicas, options.consistency);
        assert_eq!((made, options.prefix.as_str()), ((6, 3, 2), "team"));
        assert_eq!(options.read, Some(ReadConsistencyType::Quorum));
        assert!(!format!("{options:?}").contains("secret"));
        let plain = QdrantOptions::parse("//h").unwrap();
        assert_eq!(
            (plain.replicas, plain.consistency, plain.prefix.as_str()),
            (2, 1, "aeterna")
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (rest, part) in [
            ("h", "write `qdrant://"),
            ("//", "write `qdrant://"),
            ("//h,", "write `qdrant://"),
            ("//h:x", "write `qdrant://"),
            ("//key@h", "would be shown"),
            ("//h/a b", "letters, digits"),
            ("//h?replicas=0", "`replicas` is a number"),
            ("//h?replicas=2&consistency=3", "can't be more"),
            ("//h?read=two", "`read` is"),
            ("//h?tls=yes", "`tls` is"),
            ("//h?quorum=1", "`quorum=1` is unknown"),
        ] {
            let said = QdrantOptions::parse(rest).unwrap_err();
            assert!(said.contains(part), "{rest}: {said}");
        }
    }
}
