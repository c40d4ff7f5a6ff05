//! Scopes and times as people write them.

use aeterna_proto::common::v1::Scope;
use aeterna_types::{Layer, Timestamp};

/// Where a reader stands.
#[derive(Clone, Debug, clap::Args)]
pub struct Standing {
    /// Where you stand, for instance `user=ann`; left out: everything the token allows
    #[arg(long, value_name = "LAYER=ID,…", value_parser = parse)]
    pub scope: Option<Scope>,
}

/// `user=ann,team=core`; the server checks the identifiers.
///
/// # Errors
/// A sentence that names the layers.
pub fn parse(text: &str) -> Result<Scope, String> {
    let mut scope = Scope::default();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (name, id) = part
            .split_once('=')
            .ok_or_else(|| format!("`{part}` is not `LAYER=ID`, for instance `user=ann`"))?;
        let layer = Layer::ALL.into_iter().find(|layer| layer.name() == name.trim());
        let names: Vec<_> = Layer::ALL.iter().map(|layer| layer.name()).collect();
        let layer = layer.ok_or_else(|| format!("there is no layer `{name}`; use {}", names.join(", ")))?;
        let slot = match layer {
            Layer::Company => &mut scope.company,
            Layer::Org => &mut scope.org,
            Layer::Team => &mut scope.team,
            Layer::Project => &mut scope.project,
            Layer::User => &mut scope.user,
            Layer::Session => &mut scope.session,
            Layer::Agent => &mut scope.agent,
        };
        let id = id.trim();
        if id.is_empty() {
            return Err(format!(
                "`{layer}` has no identifier; write for instance `{layer}=ann`, or leave it out"
            ));
        }
        if !slot.is_empty() {
            return Err(format!("names `{layer}` twice"));
        }
        *slot = id.into();
    }
    if scope == Scope::default() {
        return Err("names no layer; write for instance `user=ann`".into());
    }
    Ok(scope)
}

/// The scope as it is written.
pub fn show(scope: &Scope) -> String {
    let ids = [
        &scope.company,
        &scope.org,
        &scope.team,
        &scope.project,
        &scope.user,
        &scope.session,
        &scope.agent,
    ];
    let set = Layer::ALL.iter().zip(ids).filter(|(_, id)| !id.is_empty());
    set.map(|(layer, id)| format!("{layer}={id}"))
        .collect::<Vec<_>>()
        .join(",")
}

/// `2023-05-08T13:56:00Z`, or `2023-05-08` for the start of that day in UTC.
///
/// # Errors
/// A sentence with an example.
pub fn parse_time(text: &str) -> Result<prost_types::Timestamp, String> {
    let (seconds, nanos) = text.parse::<Timestamp>().map_err(|error| error.to_string())?.parts();
    Ok(prost_types::Timestamp { seconds, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_and_times_are_read_as_they_are_written() {
        let scope = parse("team=core, user=ann").unwrap();
        assert_eq!(
            (scope.team.as_str(), show(&scope).as_str()),
            ("core", "team=core,user=ann")
        );
        for (text, word) in [
            ("", "no layer"),
            ("ann", "LAYER=ID"),
            ("planet=earth", "company, org"),
            ("team=core,user=", "user"),
            ("user=a,user=b", "twice"),
        ] {
            assert!(parse(text).unwrap_err().contains(word), "{text}");
        }
        assert_eq!(parse_time("2023-05-08").unwrap().seconds, 1_683_504_000);
        assert_eq!(parse_time("2023-05-08T13:56:00+02:00").unwrap().seconds, 1_683_546_960);
        assert!(parse_time("yesterday").is_err());
    }
}
