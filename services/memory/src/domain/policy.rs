//! Rules per scope.

use aeterna_types::{Layer, Scope, Timestamp, mark};
use serde::{Deserialize, Serialize};

/// Who may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Writers {
    /// Every caller with the writer role.
    Writers,
    /// Only admins.
    Admins,
    /// Nobody.
    Nobody,
}

/// The rules; `None` leaves one to the next more general policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// How long a memory is shown, in microseconds.
    pub time_to_live: Option<i64>,
    /// How long a deleted memory is kept, in microseconds.
    pub deleted_retention: Option<i64>,
    /// Who may write.
    pub writers: Option<Writers>,
    /// Largest content in bytes.
    pub max_content_bytes: Option<i64>,
    /// Most memories of a scope.
    pub max_memories: Option<i64>,
    /// How long a memory may be shown at most, in microseconds.
    pub max_time_to_live: Option<i64>,
    /// Largest content of a document in bytes.
    pub max_document_bytes: Option<i64>,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Unique in the tenant.
    pub name: String,
    /// It applies here and below; empty: to the whole tenant.
    pub scope: Scope,
    /// Only to these layers; empty: to all.
    pub layers: Vec<Layer>,
    /// The rules.
    pub rules: Rules,
    /// For a person.
    pub description: String,
    /// 1 when new, one more with each change.
    pub version: i64,
    /// When it was last changed.
    pub updated_at: Timestamp,
    /// By whom.
    pub updated_by: String,
}

impl Policy {
    /// Opaque mark of this version.
    pub fn etag(&self) -> String {
        let (version, at) = (self.version.to_le_bytes(), self.updated_at.micros().to_le_bytes());
        mark([self.name.as_bytes(), &version, &at])
    }

    /// True when it applies to what lives in a layer of a scope.
    fn applies(&self, scope: &Scope, layer: Layer) -> bool {
        self.scope.layers().all(|(layer, id)| scope.get(layer) == Some(id))
            && (self.layers.is_empty() || self.layers.contains(&layer))
    }

    /// How special its scope is: that of its most special layer, then the number of layers.
    fn specificity(&self) -> (i32, usize) {
        let layer = self.scope.layer().map_or(0, Layer::number);
        (layer, self.scope.layers().count())
    }
}

/// The rules in force somewhere, with the name of the policy that each comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effective {
    /// The rules.
    pub rules: Rules,
    /// By field name.
    pub origins: Vec<(&'static str, String)>,
}

impl Effective {
    /// Out of all policies of a tenant: the more special one counts, and of equally special ones the last by name.
    pub fn of(policies: &[Policy], scope: &Scope, layer: Layer) -> Self {
        let mut applying: Vec<&Policy> = policies.iter().filter(|policy| policy.applies(scope, layer)).collect();
        applying.sort_by_key(|policy| (policy.specificity(), &policy.name));
        let mut effective = Self::default();
        for policy in applying {
            let (own, rules) = (&policy.rules, &mut effective.rules);
            let taken = [
                ("time_to_live", take(&mut rules.time_to_live, own.time_to_live)),
                (
                    "deleted_retention",
                    take(&mut rules.deleted_retention, own.deleted_retention),
                ),
                ("writers", take(&mut rules.writers, own.writers)),
                (
                    "max_content_bytes",
                    take(&mut rules.max_content_bytes, own.max_content_bytes),
                ),
                ("max_memories", take(&mut rules.max_memories, own.max_memories)),
                (
                    "max_time_to_live",
                    take(&mut rules.max_time_to_live, own.max_time_to_live),
                ),
                (
                    "max_document_bytes",
                    take(&mut rules.max_document_bytes, own.max_document_bytes),
                ),
            ];
            for (field, _) in taken.into_iter().filter(|(_, taken)| *taken) {
                effective.origins.retain(|(known, _)| *known != field);
                effective.origins.push((field, policy.name.clone()));
            }
        }
        effective
    }

    /// The policy that a rule comes from.
    pub fn origin(&self, field: &str) -> &str {
        let found = self.origins.iter().find(|(known, _)| *known == field);
        found.map_or("", |(_, name)| name)
    }
}

fn take<T>(rule: &mut Option<T>, own: Option<T>) -> bool {
    let taken = own.is_some();
    if taken {
        *rule = own;
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str, scope: Scope, layers: Vec<Layer>, rules: Rules) -> Policy {
        Policy {
            name: name.into(),
            scope,
            layers,
            rules,
            description: String::new(),
            version: 1,
            updated_at: Timestamp::default(),
            updated_by: String::new(),
        }
    }

    #[test]
    fn the_more_special_policy_counts_rule_by_rule() {
        let team = Scope::default().with(Layer::Team, "core").unwrap();
        let ann = team.clone().with(Layer::User, "ann").unwrap();
        let limit = |bytes: i64| Rules {
            max_content_bytes: Some(bytes),
            ..Rules::default()
        };
        let admins = Rules {
            writers: Some(Writers::Admins),
            max_content_bytes: Some(10),
            ..Rules::default()
        };
        let policies = [
            policy("z-all", Scope::default(), Vec::new(), admins),
            policy("b-team", team.clone(), vec![Layer::User], limit(20)),
            policy("a-team", team.clone(), Vec::new(), limit(30)),
        ];
        let rules = Effective::of(&policies, &ann, Layer::User);
        assert_eq!(
            (rules.rules.max_content_bytes, rules.origin("max_content_bytes")),
            (Some(20), "b-team")
        );
        assert_eq!(
            (rules.rules.writers, rules.origin("writers")),
            (Some(Writers::Admins), "z-all")
        );
        assert_eq!(
            Effective::of(&policies, &team, Layer::Team).rules.max_content_bytes,
            Some(30)
        );
        let other = Scope::default().with(Layer::Team, "ops").unwrap();
        assert_eq!(
            Effective::of(&policies, &other, Layer::Team).origin("max_content_bytes"),
            "z-all"
        );
        assert_eq!(Effective::of(&[], &ann, Layer::User), Effective::default());
    }
}
