//! `aeterna add`.

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::{AddOutcome, AddRequest, Memory, Source};

use super::client::Answered;
use super::{output, scope};
use crate::json;

/// What `add` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to remember; `-` reads it from standard input
    content: String,
    /// Where it lives, for instance `team=core,user=ann`: in the most specific layer named
    #[arg(long, value_name = "LAYER=ID,…", value_parser = scope::parse)]
    scope: Scope,
    /// A tag; can be given several times
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// How important it is, 0 to 1
    #[arg(long)]
    importance: Option<f64>,
    /// Anything to keep with it, a JSON object
    #[arg(long, value_name = "JSON")]
    metadata: Option<String>,
    /// When what it tells of happened: `2023-05-08T13:56:00Z` or `2023-05-08`
    #[arg(long, value_name = "TIME", value_parser = scope::parse_time)]
    event_at: Option<prost_types::Timestamp>,
    /// When it stops being shown
    #[arg(long, value_name = "TIME", value_parser = scope::parse_time)]
    expires_at: Option<prost_types::Timestamp>,
    /// Who said it
    #[arg(long, default_value = "")]
    speaker: String,
    /// The conversation or document that it is from
    #[arg(long, default_value = "")]
    conversation: String,
    /// Its position there, from 0
    #[arg(long)]
    sequence: Option<i64>,
    /// Makes a retry safe: the same id with the same content answers the same
    #[arg(long, default_value = "")]
    request_id: String,
    #[command(flatten)]
    answered: Answered,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let content = match args.content.as_str() {
        "-" => std::io::read_to_string(std::io::stdin())?,
        content => content.to_owned(),
    };
    let metadata = args.metadata.map(|text| {
        json::from_json("google.protobuf.Struct", &text)
            .map_err(|error| anyhow::anyhow!("--metadata is no JSON object: {error}"))
    });
    let source = Source {
        conversation: args.conversation,
        sequence: args.sequence,
        speaker: args.speaker,
        ..Default::default()
    };
    let memory = Memory {
        scope: Some(args.scope),
        content,
        metadata: metadata.transpose()?,
        tags: args.tags,
        importance: args.importance,
        source: (source != Source::default()).then_some(source),
        event_at: args.event_at,
        expires_at: args.expires_at,
        ..Default::default()
    };
    let client = args.answered.client()?;
    let request = AddRequest {
        memory: Some(memory),
        request_id: args.request_id,
    };
    let answer = client.memory().add(client.request(request)).await?.into_inner();
    if args.answered.json {
        output::line(json::to_json("aeterna.memory.v1.AddResponse", &answer)?);
        return Ok(());
    }
    let outcome = match answer.outcome() {
        AddOutcome::Merged => "was there already",
        _ => "added",
    };
    let memory = answer.memory.unwrap_or_default();
    output::line(format!("{outcome}: {} in {}", memory.id, output::place(&memory)));
    for near in &answer.near_duplicates {
        output::note(format!("says nearly the same: {} ({:.2})", near.id, near.similarity));
    }
    Ok(())
}
