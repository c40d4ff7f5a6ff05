//! Where the nodes are.

use std::fmt;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;

/// How a database is reached.
#[derive(Clone, Debug)]
pub struct PostgresOptions {
    pub(super) nodes: Vec<NodeOptions>,
    /// Connections to each node for reading, and as many to the primary for writing.
    pub connections: u32,
    /// How long a call waits for a primary, and repeats what failed.
    pub patience: Duration,
    /// How long a statement that only reads may take.
    pub statement: Duration,
    /// Reads go to all nodes in turn, and not to the primary first.
    pub spread: bool,
}

/// One node.
#[derive(Clone)]
pub(super) struct NodeOptions {
    /// `host:port`, for logs.
    pub name: String,
    pub connect: PgConnectOptions,
    /// Where Patroni says what the node is.
    pub patroni: Option<String>,
}

impl fmt::Debug for NodeOptions {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl PostgresOptions {
    /// From what follows `postgres:` in a URI: `//user@h1:5432,h2,h3/database?patroni=8008&sslmode=verify-full`. `patroni` is the
    /// port of its REST API, or one for each node, in order.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(rest: &str, password: Option<&str>) -> Result<Self, String> {
        const FORM: &str = "write `postgres://user@host1:5432,host2,host3/database`";
        let rest = rest.strip_prefix("//").ok_or(FORM)?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = place.split_once('/').ok_or(FORM)?;
        let (user, hosts) = authority.rsplit_once('@').ok_or("name the user: `postgres://user@…`")?;
        if user.is_empty() || database.is_empty() || hosts.split(',').any(str::is_empty) {
            return Err(FORM.into());
        }
        if user.contains(':') {
            return Err("a password in the URI would be shown; set it in the setting beside this one".into());
        }
        let (mut ports, mut others) = (Vec::new(), Vec::new());
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            match parameter.strip_prefix("patroni=") {
                Some(list) => ports.extend(list.split(',')),
                None => others.push(parameter),
            }
        }
        let hosts: Vec<&str> = hosts.split(',').collect();
        if !ports.iter().all(|port| port.parse::<u16>().is_ok()) || !(ports.len() <= 1 || ports.len() == hosts.len()) {
            return Err("`patroni` is the port of its REST API, or one for each node: `patroni=8008`".into());
        }
        let node = |(index, host): (usize, &&str)| {
            let url = format!("postgres://{user}@{host}/{database}?{}", others.join("&"));
            let mut connect: PgConnectOptions = url.parse().map_err(|error| format!("`{host}`: {error}"))?;
            if let Some(password) = password {
                connect = connect.password(password);
            }
            let port = ports.get(index).or(ports.first());
            Ok(NodeOptions {
                name: format!("{}:{}", connect.get_host(), connect.get_port()),
                patroni: port.map(|port| format!("http://{}:{port}/primary", connect.get_host())),
                connect: connect.application_name("aeterna"),
            })
        };
        let nodes = hosts.iter().enumerate().map(node);
        Ok(Self {
            nodes: nodes.collect::<Result<_, String>>()?,
            connections: 16,
            patience: Duration::from_secs(5),
            statement: Duration::from_secs(30),
            spread: false,
        })
    }

    /// The same nodes for another user.
    #[must_use]
    pub fn as_user(&self, user: &str, password: Option<&str>) -> Self {
        let mut other = self.clone();
        for node in &mut other.nodes {
            node.connect = node.connect.clone().username(user);
            if let Some(password) = password {
                node.connect = node.connect.clone().password(password);
            }
        }
        other
    }

    /// Who logs in.
    pub fn user(&self) -> &str {
        self.nodes.first().map_or("", |node| node.connect.get_username())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_their_patroni_are_read_from_the_uri() {
        let options = PostgresOptions::parse(
            "//ann@h1:6000,h2,[::1]:6001/db?patroni=8008&sslmode=disable",
            Some("pw"),
        );
        let options = options.unwrap();
        let names: Vec<_> = options.nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["h1:6000", "h2:5432", "[::1]:6001"]);
        assert_eq!(options.nodes[1].patroni.as_deref(), Some("http://h2:8008/primary"));
        assert_eq!(options.user(), "ann");
        assert!(!format!("{options:?}").contains("pw"));
        let each = PostgresOptions::parse("//a@h,h/db?patroni=1,2", None).unwrap();
        assert_eq!(each.nodes[1].patroni.as_deref(), Some("http://h:2/primary"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (rest, part) in [
            ("h/db", "write `postgres://"),
            ("//h/db", "name the user"),
            ("//a@h", "write `postgres://"),
            ("//a@h,/db", "write `postgres://"),
            ("//a:secret@h/db", "would be shown"),
            ("//a@h,i/db?patroni=1,2,3", "one for each node"),
            ("//a@h/db?patroni=x", "one for each node"),
        ] {
            let said = PostgresOptions::parse(rest, None).unwrap_err();
            assert!(said.contains(part) && !said.contains("secret"), "{rest}: {said}");
        }
    }
}
