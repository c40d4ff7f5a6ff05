//! `aeterna stats`.

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::StatsRequest;

use super::client::Remote;
use super::{output, scope};
use crate::json;

/// What `stats` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where you stand, for instance `user=ann`; left out: everything the token allows
    #[arg(long, value_name = "LAYER=ID,…", value_parser = scope::parse)]
    scope: Option<Scope>,
    /// Print them as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Remote,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = args.remote.client()?;
    let request = StatsRequest { scope: args.scope };
    let answer = client.memory().stats(client.request(request)).await?.into_inner();
    if args.json {
        output::line(json::to_json("aeterna.memory.v1.StatsResponse", &answer)?);
        return Ok(());
    }
    let mut table = output::table(&["layer", "memories", "bytes"]);
    for layer in &answer.layers {
        let name = layer.layer().as_str_name().trim_start_matches("LAYER_").to_lowercase();
        table.add_row([name, layer.memories.to_string(), layer.content_bytes.to_string()]);
    }
    output::align_right(&mut table, 1);
    output::align_right(&mut table, 2);
    output::line(table);
    output::line(format!(
        "deleted: {} · without a vector yet: {} · vectors: {} bytes · index: {} bytes, {} changes behind",
        answer.deleted, answer.pending_embeddings, answer.embedding_bytes, answer.index_bytes, answer.index_lag
    ));
    Ok(())
}
