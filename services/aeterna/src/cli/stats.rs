//! `aeterna stats`.

use aeterna_proto::memory::v1::StatsRequest;

use super::client::Answered;
use super::output;
use super::scope::Standing;
use crate::json;

/// What `stats` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    standing: Standing,
    #[command(flatten)]
    answered: Answered,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = args.answered.client()?;
    let request = StatsRequest {
        scope: args.standing.scope,
        ..Default::default()
    };
    let answer = client.memory().stats(client.request(request)).await?.into_inner();
    if args.answered.json {
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
    if !answer.reembedding_model.is_empty() {
        output::line(format!(
            "embedding anew: from {} to {}, {} memories left",
            answer.embedding_model, answer.reembedding_model, answer.reembedding_left
        ));
    }
    Ok(())
}
