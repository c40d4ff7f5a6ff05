//! `aeterna get`.

use aeterna_proto::memory::v1::GetRequest;

use super::client::Answered;
use super::{output, scope};
use crate::json;

/// What `get` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the memory
    id: String,
    /// Also show it when it is deleted or expired
    #[arg(long)]
    deleted: bool,
    /// As it was at that time: `2023-05-08T13:56:00Z` or `2023-05-08`
    #[arg(long, value_name = "TIME", value_parser = scope::parse_time)]
    as_of: Option<prost_types::Timestamp>,
    #[command(flatten)]
    answered: Answered,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = args.answered.client()?;
    let request = GetRequest {
        id: args.id,
        show_deleted: args.deleted,
        as_of: args.as_of,
        ..Default::default()
    };
    let answer = client.memory().get(client.request(request)).await?.into_inner();
    if args.answered.json {
        output::line(json::to_json("aeterna.memory.v1.GetResponse", &answer)?);
        return Ok(());
    }
    let memory = answer.memory.unwrap_or_default();
    output::line(output::said(&memory));
    let mut notes = vec![
        ("id", memory.id.clone()),
        ("scope", output::place(&memory)),
        ("day", output::day(&memory)),
        ("version", memory.version.to_string()),
        ("tags", output::clean(&memory.tags.join(", "))),
    ];
    if let Some(metadata) = &memory.metadata {
        notes.push((
            "metadata",
            output::clean(&json::to_json("google.protobuf.Struct", metadata)?),
        ));
    }
    if memory.deleted_at.is_some() {
        notes.push(("state", "deleted".into()));
    }
    for (name, value) in notes.into_iter().filter(|(_, value)| !value.is_empty()) {
        output::line(format!("  {name:<9} {value}"));
    }
    Ok(())
}
