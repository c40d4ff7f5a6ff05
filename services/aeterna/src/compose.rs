//! Which services a process runs, and how they reach each other.

use std::path::Path;

use aeterna_config::{Problems, Setting, Settings, Sources};
use aeterna_error::{Error, Reason};
use aeterna_rpc::{AnyChannel, Host, HostConfig, Parts};
use anyhow::Context as _;
use {aeterna_embedding as embedding, aeterna_memory as memory};

/// A service that the process can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Text to vectors.
    Embedding,
    /// Remember and find.
    Memory,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Embedding, Self::Memory];
}

/// The settings tables of a process that can run everything.
pub fn tables() -> [&'static [Setting]; 4] {
    [
        aeterna_rpc::HOST_SETTINGS,
        aeterna_rpc::LIMIT_SETTINGS,
        embedding::SETTINGS,
        memory::SETTINGS,
    ]
}

/// The services of one process, set up and not yet started.
#[derive(Clone, Debug)]
pub struct Services {
    embedding: Option<embedding::Config>,
    memory: Option<memory::Config>,
}

/// Reads the settings of the process and of the services that it should run.
///
/// # Errors
/// Every problem found.
pub fn load(sources: &Sources, roles: &[Role]) -> Result<(Settings, HostConfig, Services), Problems> {
    let settings = Settings::load(&tables(), sources)?;
    let mut reader = settings.reader();
    // All of them are read, so that a mistake shows wherever it is made.
    let host = HostConfig::read(&mut reader);
    let (embed, remember) = (embedding::Config::read(&mut reader), memory::Config::read(&mut reader));
    let (here, runs) = (roles.contains(&Role::Embedding), roles.contains(&Role::Memory));
    if runs && !here && remember.as_ref().is_some_and(|config| config.embedding == "local") {
        reader.problem(
            "memory.embedding",
            "the embedding service is not among the roles; add it, or write where it is: `http://host:port`",
        );
    }
    let (host, (embed, remember)) = reader.finish(host.zip(embed.zip(remember)))?;
    let services = Services {
        embedding: here.then_some(embed),
        memory: runs.then_some(remember),
    };
    Ok((settings, host, services))
}

impl Services {
    /// Their names in the contracts.
    pub fn names(&self) -> Vec<&'static str> {
        let embedding = self.embedding.as_ref().map(|_| embedding::SERVICE);
        let memory = self.memory.as_ref().map_or(&[][..], |_| memory::SERVICES);
        embedding.into_iter().chain(memory.iter().copied()).collect()
    }
}

/// Moves everything from a SQLite file into the store of the settings.
///
/// # Errors
/// Every problem of the settings, or what keeps it from being moved.
pub async fn migrate(
    sources: &Sources,
    from: &Path,
    tell: impl FnMut(memory::Stage, &memory::Moved),
) -> anyhow::Result<memory::Moved> {
    let (_, host, services) = load(sources, &Role::ALL)?;
    let config = services.memory.context("the memory service is among the roles")?;
    let moved = memory::migrate_from(&config, &host.data_dir, from, tell).await;
    moved.map_err(|error| anyhow::Error::msg(error.chain()))
}

/// Compares the index and the live streams with the store of the settings, and mends them unless it is `dry`.
///
/// # Errors
/// Every problem of the settings, or what keeps them from being compared.
pub async fn reconcile(
    sources: &Sources,
    dry: bool,
    tell: impl FnMut(memory::Step, &memory::Reconciled),
) -> anyhow::Result<memory::Reconciled> {
    let (_, host, services) = load(sources, &Role::ALL)?;
    let config = services.memory.context("the memory service is among the roles")?;
    let reconciled = memory::reconcile(&config, &host.data_dir, dry, tell).await;
    // Whoever looks after the stores is told the cause.
    reconciled.map_err(|error| anyhow::Error::msg(error.chain()))
}

/// Starts the services.
///
/// # Errors
/// What keeps one of them from starting.
pub async fn build(services: Services, host: &Host) -> Result<Parts, Error> {
    let mut parts = Parts::default();
    let mut embedder = None;
    if let Some(config) = services.embedding {
        let routes = embedding::build(config, embedding::Deps::of(host)).await?;
        let router = host.stack.wrap(routes);
        embedder = Some(AnyChannel::Local(router.clone()));
        parts.routers.push(router);
    }
    if let Some(config) = services.memory {
        let channel = match config.embedding.as_str() {
            "local" => embedder.ok_or_else(|| {
                Error::new(
                    Reason::NotConfigured,
                    "`memory.embedding` is `local` and no embedding service runs here",
                )
            })?,
            url => AnyChannel::remote(url)?,
        };
        let service = memory::build(config, memory::Deps::of(host, channel)).await?;
        parts.routers.push(host.stack.wrap(service.routes));
        parts.background.push(service.background);
    }
    Ok(parts)
}
