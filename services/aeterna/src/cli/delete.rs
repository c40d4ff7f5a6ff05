//! `aeterna delete`.

use std::process::ExitCode;

use aeterna_proto::memory::v1::DeleteRequest;

use super::client::Remote;
use super::output;

/// What `delete` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ids of the memories
    #[arg(required = true)]
    ids: Vec<String>,
    /// Remove them for good, with their history; needs the admin role
    #[arg(long)]
    purge: bool,
    #[command(flatten)]
    remote: Remote,
}

pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = args.remote.client()?;
    let mut outcome = ExitCode::SUCCESS;
    for id in args.ids {
        let request = DeleteRequest {
            id: id.clone(),
            purge: args.purge,
            ..Default::default()
        };
        match client.memory().delete(client.request(request)).await {
            Ok(_) => output::line(format!("deleted: {id}")),
            Err(status) => {
                output::note(format!(
                    "not deleted: {}: {}",
                    output::clean(&id),
                    output::refusal(&status)
                ));
                outcome = ExitCode::FAILURE;
            }
        }
    }
    Ok(outcome)
}
