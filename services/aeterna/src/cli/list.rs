//! `aeterna list`.

use std::num::NonZeroUsize;

use aeterna_proto::memory::v1::{ListRequest, ListResponse};

use super::client::Answered;
use super::scope::Standing;
use super::{output, scope};
use crate::json;

/// What `list` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    standing: Standing,
    /// Only memories that satisfy it, for instance `tags:travel AND importance >= 0.5`
    #[arg(long, default_value = "")]
    filter: String,
    /// Memories to show at most
    #[arg(long, default_value = "20")]
    limit: NonZeroUsize,
    /// Also show deleted and expired ones
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
    let limit = args.limit.get();
    let mut all = ListResponse::default();
    loop {
        let missing = limit.saturating_sub(all.memories.len());
        let request = ListRequest {
            scope: args.standing.scope.clone(),
            filter: args.filter.clone(),
            page_size: i32::try_from(missing.clamp(1, 1000))?,
            page_token: std::mem::take(&mut all.next_page_token),
            show_deleted: args.deleted,
            as_of: args.as_of,
            ..Default::default()
        };
        let page = client.memory().list(client.request(request)).await?.into_inner();
        all.memories.extend(page.memories);
        all.next_page_token = page.next_page_token;
        // Pages of one list may have different sizes.
        if all.memories.len() >= limit || all.next_page_token.is_empty() {
            break;
        }
    }
    if args.answered.json {
        output::line(json::to_json("aeterna.memory.v1.ListResponse", &all)?);
        return Ok(());
    }
    let mut table = output::table(&["memory", "day", "scope", "id"]);
    for memory in &all.memories {
        let deleted = if memory.deleted_at.is_some() { "(deleted) " } else { "" };
        table.add_row([
            format!("{deleted}{}", output::said(memory)),
            output::day(memory),
            output::place(memory),
            memory.id.clone(),
        ]);
    }
    output::line(table);
    if !all.next_page_token.is_empty() {
        output::note(format!("there are more; --limit shows more than {limit}"));
    }
    Ok(())
}
