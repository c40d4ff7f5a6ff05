//! `aeterna history`.

use aeterna_proto::memory::v1::HistoryRequest;

use super::client::Answered;
use super::output;
use crate::json;

/// What `history` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of the memory
    id: String,
    /// Versions to show at most
    #[arg(long, default_value_t = 20)]
    limit: i32,
    #[command(flatten)]
    answered: Answered,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = args.answered.client()?;
    let request = HistoryRequest {
        id: args.id,
        page_size: args.limit,
        page_token: String::new(),
        ..Default::default()
    };
    let answer = client.memory().history(client.request(request)).await?.into_inner();
    if args.answered.json {
        output::line(json::to_json("aeterna.memory.v1.HistoryResponse", &answer)?);
        return Ok(());
    }
    let mut table = output::table(&["version", "change", "by", "memory"]);
    for version in &answer.versions {
        let memory = version.memory.clone().unwrap_or_default();
        let kind = version
            .kind()
            .as_str_name()
            .trim_start_matches("CHANGE_KIND_")
            .to_lowercase();
        table.add_row([
            memory.version.to_string(),
            kind,
            output::clean(&version.changed_by),
            output::said(&memory),
        ]);
    }
    output::line(table);
    Ok(())
}
