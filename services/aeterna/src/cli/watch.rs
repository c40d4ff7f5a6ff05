//! `aeterna watch`.

use aeterna_error::Reason;
use aeterna_proto::memory::v1::{ChangeKind, WatchRequest, WatchResponse};
use indicatif::ProgressBar;
use tonic::Code;

use super::client::{Answered, Patience};
use super::output;
use super::scope::Standing;
use crate::json;

/// Time that one stream may take; the resume token carries on after it.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// What `watch` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    standing: Standing,
    /// Only memories that satisfy it, for instance `tags:travel AND importance >= 0.5`
    #[arg(long, default_value = "")]
    filter: String,
    /// Continue after the change that carried this token (`--json` shows it); `1.0` begins with the first one
    #[arg(long, value_name = "TOKEN", default_value = "")]
    resume: String,
    #[command(flatten)]
    answered: Answered,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = args.answered.client()?;
    let mut request = WatchRequest {
        scope: args.standing.scope,
        filter: args.filter,
        resume_token: args.resume,
        ..Default::default()
    };
    let watch = async |request: &WatchRequest| {
        let request = client.request_within(request.clone(), TIMEOUT);
        client.memory().watch(request).await.map(tonic::Response::into_inner)
    };
    let bar = ProgressBar::hidden();
    let mut stream = watch(&request).await?;
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => event,
            Ok(None) => return Ok(()),
            Err(status) if aeterna_error::from_status(&status).reason() == Reason::FellBehind => {
                stream = watch(&request).await?;
                continue;
            }
            // The server drains, or the connection broke: another one goes on after what was told, if there is a place yet.
            Err(mut status) => {
                let mut patience = Patience::new();
                stream = loop {
                    let busy = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted);
                    let passing = busy || !aeterna_error::is_answer(&status);
                    if request.resume_token.is_empty() || !passing || !patience.wait(&bar).await {
                        return Err(status.into());
                    }
                    match watch(&request).await {
                        Ok(stream) => break stream,
                        Err(again) => status = again,
                    }
                };
                continue;
            }
        };
        request.resume_token.clone_from(&event.resume_token);
        if args.answered.json {
            output::line(json::to_json("aeterna.memory.v1.WatchResponse", &event)?);
        } else if !event.heartbeat {
            output::line(told(&event));
        }
    }
}

fn told(event: &WatchResponse) -> String {
    let memory = event.memory.clone().unwrap_or_default();
    let kind = match event.kind() {
        ChangeKind::Added => "added",
        ChangeKind::Updated => "changed",
        ChangeKind::Deleted => "deleted",
        ChangeKind::Purged => "removed",
        ChangeKind::Expired => "expired",
        ChangeKind::Unspecified => "changed somehow",
    };
    format!("{kind}: {} {}", memory.id, output::said(&memory))
}
