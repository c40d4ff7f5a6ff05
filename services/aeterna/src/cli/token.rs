//! `aeterna token`.

use std::collections::BTreeMap;
use std::time::Duration;

use aeterna_auth::{Claims, Role, mint};
use aeterna_config::Sources;
use aeterna_types::{Clock as _, SystemClock, TenantId};
use anyhow::Context as _;

use super::output;
use crate::compose;

/// What `token` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The tenant that the caller belongs to
    #[arg(long)]
    tenant: TenantId,
    /// Who calls; history names it
    #[arg(long, default_value = "cli")]
    subject: String,
    /// What the caller may do: reader, writer or admin
    #[arg(long, default_value = "writer")]
    role: Role,
    /// The scope that the caller can't leave, for instance `user=ann`
    #[arg(long, value_name = "LAYER=ID", value_delimiter = ',', value_parser = pair)]
    within: Vec<(String, String)>,
    /// How long it is good for: `30m`, `12h`
    #[arg(long, default_value = "1h", value_parser = aeterna_config::parse_duration)]
    ttl: Duration,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (layer, id) = text
        .split_once('=')
        .ok_or("write `LAYER=ID`, for instance `user=ann`")?;
    super::scope::parse(text)?;
    Ok((layer.trim().into(), id.trim().into()))
}

pub fn run(args: &Args, sources: &Sources) -> anyhow::Result<()> {
    let (_, host, _) = compose::load(sources, &compose::Role::ALL)?;
    let secret = host.secret().context(
        "there is no secret to sign with; set `auth.hs256_secret_file` (tokens for RS256 and JWKS come from the issuer that has the private key)",
    )?;
    // A secret that the server would refuse signs nothing.
    let verifier = host.verifier()?;
    let within: BTreeMap<String, String> = args.within.iter().cloned().collect();
    anyhow::ensure!(within.len() == args.within.len(), "--within names a layer twice");
    let now = u64::try_from(SystemClock.now().parts().0)?;
    let expected = host.expected();
    let claims = Claims {
        sub: args.subject.clone(),
        exp: now.saturating_add(args.ttl.as_secs()),
        nbf: None,
        iss: expected.issuer.clone(),
        aud: expected.audience.clone().map(Into::into),
        tenant: args.tenant.to_string(),
        role: args.role,
        within,
    };
    let token = mint(secret.expose(), &claims)?;
    // Nor is anything signed that it would refuse.
    verifier.verify(Some(&format!("Bearer {token}")))?;
    output::line(token);
    Ok(())
}
