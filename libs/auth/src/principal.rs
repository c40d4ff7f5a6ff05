//! Principals and their rights.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use aeterna_error::{Error, Reason};
use aeterna_proto::Permission;
use aeterna_types::{Scope, TenantId};
use serde::{Deserialize, Serialize};

/// What a principal may do; each role includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Reader,
    /// Reads and writes.
    Writer,
    /// Everything within the tenant.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reader => "reader",
            Self::Writer => "writer",
            Self::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "reader" => Ok(Self::Reader),
            "writer" => Ok(Self::Writer),
            "admin" => Ok(Self::Admin),
            _ => Err("write `reader`, `writer` or `admin`".into()),
        }
    }
}

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The tenant it belongs to.
    pub tenant: TenantId,
    /// Who it is, for history.
    pub subject: String,
    /// What it may do.
    pub role: Role,
    /// The scope it can't leave.
    pub within: Scope,
    /// When its token ends; `None`: it has none.
    pub until: Option<SystemTime>,
}

impl Principal {
    /// The one caller of a standalone installation without tokens.
    pub fn local() -> Self {
        Self {
            tenant: TenantId::local(),
            subject: "local".into(),
            role: Role::Admin,
            within: Scope::default(),
            until: None,
        }
    }

    /// A service's own background work on behalf of a tenant, in the same process.
    pub fn service(tenant: TenantId) -> Self {
        Self {
            tenant,
            subject: "service".into(),
            role: Role::Writer,
            within: Scope::default(),
            until: None,
        }
    }

    /// The scope that a request asks for, within what the token is bound to.
    ///
    /// # Errors
    /// SCOPE_DENIED when it names another identifier than the token.
    pub fn stand_in(&self, scope: &Scope) -> Result<Scope, Error> {
        scope.within(&self.within).map_err(|error| {
            let layer = error.layer();
            Error::new(
                Reason::ScopeDenied,
                format!("the token is bound to another {layer}; leave `scope.{layer}` out or send its own value"),
            )
            .with("layer", layer)
        })
    }
}

impl Principal {
    /// Refuses what only an admin may do, where the rest of the RPC needs less.
    ///
    /// # Errors
    /// PERMISSION_DENIED, with the role that is needed.
    pub fn administers(&self) -> Result<(), Error> {
        authorize(self, Permission::Admin)
    }

    /// Refuses to change what lives outside of the scope that the token is bound to, although it may be visible from there.
    ///
    /// # Errors
    /// SCOPE_DENIED, with the layer.
    pub fn may_change(&self, scope: &Scope) -> Result<(), Error> {
        let outside = self.within.layers().find(|(layer, id)| scope.get(*layer) != Some(id));
        match outside {
            None => Ok(()),
            Some((layer, _)) => Err(Error::new(
                Reason::ScopeDenied,
                format!("it is not of the {layer} that the token is bound to; it can be read and not changed"),
            )
            .with("layer", layer)),
        }
    }
}

/// Refuses a principal whose role does not grant `permission`.
///
/// # Errors
/// PERMISSION_DENIED, with the role that is needed.
pub fn authorize(principal: &Principal, permission: Permission) -> Result<(), Error> {
    let needed = match permission {
        Permission::Authenticated | Permission::Read => Role::Reader,
        Permission::Write => Role::Writer,
        Permission::Admin | Permission::Unspecified => Role::Admin,
    };
    if principal.role >= needed {
        return Ok(());
    }
    let message = format!(
        "the role `{}` may not do this; use a token with the role `{needed}`",
        principal.role
    );
    Err(Error::new(Reason::PermissionDenied, message)
        .with("role", principal.role)
        .with("needed", needed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aeterna_types::Layer;

    #[test]
    fn each_role_includes_the_ones_before_it() {
        let mut principal = Principal::local();
        for (role, allowed) in [(Role::Reader, 2), (Role::Writer, 3), (Role::Admin, 4)] {
            principal.role = role;
            let granted = [
                Permission::Authenticated,
                Permission::Read,
                Permission::Write,
                Permission::Admin,
            ]
            .into_iter()
            .filter(|p| authorize(&principal, *p).is_ok())
            .count();
            assert_eq!(granted, allowed, "{role}");
        }
    }

    #[test]
    fn nobody_leaves_the_scope_of_the_token() {
        let mut principal = Principal::local();
        principal.within = Scope::default().with(Layer::User, "ann").unwrap();
        let bob = Scope::default().with(Layer::User, "bob").unwrap();
        assert_eq!(principal.stand_in(&bob).unwrap_err().reason(), Reason::ScopeDenied);
        assert_eq!(principal.stand_in(&Scope::default()).unwrap(), principal.within);
        let company = Scope::default().with(Layer::Company, "acme").unwrap();
        assert_eq!(
            principal.may_change(&company).unwrap_err().reason(),
            Reason::ScopeDenied
        );
        assert!(principal.may_change(&company.with(Layer::User, "ann").unwrap()).is_ok());
    }
}
