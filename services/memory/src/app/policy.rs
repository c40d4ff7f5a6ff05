//! Rules per scope: keeping them, and asking them before a write.

use aeterna_auth::{Principal, Role};
use aeterna_error::{Error, Reason};
use aeterna_rpc::RequestContext;
use aeterna_types::{Layer, Scope, TenantId, Timestamp};
use tokio_util::sync::CancellationToken;

use super::App;
use crate::domain::{Body, DocumentChange, Edit, Effective, Idempotency, Memory, Policy, Rules, Writers};
use crate::error::MemoryError;

/// Policies of a tenant: every write asks all of them.
const MOST: usize = 1_000;
/// Memories purged at a time.
const PURGED: usize = 100;

/// A policy as an admin sends it.
#[derive(Clone, Debug)]
pub struct NewPolicy {
    /// The policy; version, time and author are the store's.
    pub policy: Policy,
    /// Only on this version.
    pub etag: Option<String>,
    /// Makes a retry safe.
    pub idempotency: Option<Idempotency>,
}

/// The policies of a tenant, to be asked for several places.
pub(super) struct Law(Vec<Policy>);

impl Law {
    fn effective(&self, scope: &Scope) -> Effective {
        Effective::of(&self.0, scope, scope.layer().unwrap_or(Layer::Company))
    }

    /// Refuses a caller who may not write there.
    pub fn may_write(&self, principal: &Principal, scope: &Scope) -> Result<(), MemoryError> {
        check_writer(&self.effective(scope), principal)
    }

    /// Refuses a caller who may not write there, and a body that is too large or is to be shown for too long.
    pub fn may_change(
        &self,
        principal: &Principal,
        (current, body): (&Memory, &Body),
        now: Timestamp,
    ) -> Result<(), MemoryError> {
        let effective = self.effective(&current.scope);
        check_writer(&effective, principal)?;
        check_content(&effective, body)?;
        // What is no longer than before is none of the rule's business.
        let (until, before) = (body.expires_at, current.body.expires_at);
        let shorter = until == before || until.is_some_and(|until| before.is_none_or(|before| until < before));
        match shorter {
            true => Ok(()),
            // The time of an import is its writer's to say.
            false => check_expiry(&effective, until, current.created_at.min(now)),
        }
    }

    /// Refuses a caller who may not write documents there, and a document that is too large.
    pub fn may_edit(&self, principal: &Principal, change: &DocumentChange) -> Result<(), MemoryError> {
        let effective = self.effective(&change.scope);
        check_writer(&effective, principal)?;
        match &change.edit {
            Edit::Put(text) => {
                let limit = ("max_document_bytes", effective.rules.max_document_bytes);
                check_size(&effective, limit, &text.content)
            }
            Edit::Restore(_) | Edit::Delete => Ok(()),
        }
    }

    /// Asks about a new memory, and gives it the expiry that the rules say when it has none of its own; answers how many the
    /// scope may hold, by which policy.
    pub fn admit(
        &self,
        principal: &Principal,
        scope: &Scope,
        body: &mut Body,
        now: Timestamp,
    ) -> Result<Option<(i64, String)>, MemoryError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let effective = self.effective(scope);
        check_writer(&effective, principal)?;
        check_content(&effective, body)?;
        let Rules {
            time_to_live,
            max_time_to_live,
            ..
        } = effective.rules;
        let life = [time_to_live, max_time_to_live].into_iter().flatten().min();
        let expiry = life.and_then(|life| Timestamp::from_micros(now.micros().saturating_add(life)));
        body.expires_at = body.expires_at.or(expiry);
        check_expiry(&effective, body.expires_at, now)?;
        let most = effective.rules.max_memories;
        Ok(most.map(|most| (most, effective.origin("max_memories").to_owned())))
    }
}

fn check_writer(effective: &Effective, principal: &Principal) -> Result<(), MemoryError> {
    let why = match effective.rules.writers {
        Some(Writers::Nobody) => "nobody may write here",
        Some(Writers::Admins) if principal.role < Role::Admin => "only admins may write here",
        _ => return Ok(()),
    };
    Err(MemoryError::Forbidden {
        policy: effective.origin("writers").to_owned(),
        why: why.to_owned(),
    })
}

fn check_content(effective: &Effective, body: &Body) -> Result<(), MemoryError> {
    let limit = ("max_content_bytes", effective.rules.max_content_bytes);
    check_size(effective, limit, &body.content)
}

/// `rule` is the name of a limit and what it is.
fn check_size(
    effective: &Effective,
    (rule, most): (&'static str, Option<i64>),
    content: &str,
) -> Result<(), MemoryError> {
    let bytes = content.len();
    match most {
        Some(most) if i64::try_from(bytes).is_ok_and(|bytes| bytes > most) => Err(MemoryError::Forbidden {
            policy: effective.origin(rule).to_owned(),
            why: format!("`content` has {bytes} bytes, and `{rule}` is {most}"),
        }),
        _ => Ok(()),
    }
}

/// A memory that was added at `since` is not to be shown for too long.
fn check_expiry(effective: &Effective, expires_at: Option<Timestamp>, since: Timestamp) -> Result<(), MemoryError> {
    let Some(most) = effective.rules.max_time_to_live else {
        return Ok(());
    };
    let latest = Timestamp::from_micros(since.micros().saturating_add(most));
    let why = match (expires_at, latest) {
        (Some(at), Some(latest)) if at > latest => {
            format!("`expires_at` is {at}, and by `max_time_to_live` it is {latest} at the latest")
        }
        (None, Some(latest)) => {
            format!("the memory would never expire, and by `max_time_to_live` it does at {latest}; send `expires_at`")
        }
        _ => return Ok(()),
    };
    Err(MemoryError::Forbidden {
        policy: effective.origin("max_time_to_live").to_owned(),
        why,
    })
}

impl App {
    /// The rules of a tenant.
    pub(super) async fn law(&self, tenant: &TenantId) -> Result<Law, MemoryError> {
        Ok(Law(self.store.policies(tenant).await?))
    }

    /// Writes a policy.
    ///
    /// # Errors
    /// ABORTED when the etag does not fit.
    pub async fn put_policy(&self, context: &RequestContext, new: NewPolicy) -> Result<Policy, Error> {
        let writer = self.writer(context);
        let NewPolicy {
            policy,
            etag,
            idempotency,
        } = new;
        context.principal().may_change(&policy.scope)?;
        loop {
            let all = self.store.policies(&writer.tenant).await?;
            let existing = all.iter().find(|existing| existing.name == policy.name);
            // What is replaced must be the caller's to change, too.
            match existing {
                Some(existing) => context.principal().may_change(&existing.scope)?,
                None if all.len() >= MOST => {
                    let message =
                        format!("the tenant has {MOST} policies, which is the limit; delete one that is not needed");
                    return Err(Error::new(Reason::InvalidState, message));
                }
                None => {}
            }
            let seen = existing.map(Policy::etag);
            let put = self
                .store
                .put_policy(&writer, policy.clone(), seen, etag.clone(), idempotency.clone());
            match put.await {
                // Somebody else was faster.
                Err(MemoryError::Stale) => {}
                put => {
                    let put = put?;
                    self.committed.here();
                    return Ok(put);
                }
            }
        }
    }

    /// One policy of the tenant.
    ///
    /// # Errors
    /// NOT_FOUND.
    pub async fn policy(&self, context: &RequestContext, name: &str) -> Result<Policy, Error> {
        let found = self.find_policy(&context.principal().tenant, name).await?;
        found.ok_or_else(|| MemoryError::NoPolicy(name.to_owned()).into())
    }

    async fn find_policy(&self, tenant: &TenantId, name: &str) -> Result<Option<Policy>, MemoryError> {
        let all = self.store.policies(tenant).await?;
        Ok(all.into_iter().find(|policy| policy.name == name))
    }

    /// Policies of the tenant by name, after one of them; true when there are more.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn policies(
        &self,
        context: &RequestContext,
        after: &str,
        limit: usize,
    ) -> Result<(Vec<Policy>, bool), Error> {
        let mut all = self.store.policies(&context.principal().tenant).await?;
        all.retain(|policy| policy.name.as_str() > after);
        let more = all.len() > limit;
        all.truncate(limit);
        Ok((all, more))
    }

    /// Deletes a policy.
    ///
    /// # Errors
    /// NOT_FOUND, or ABORTED when the etag does not fit.
    pub async fn delete_policy(&self, context: &RequestContext, name: &str, etag: Option<String>) -> Result<(), Error> {
        let policy = self.policy(context, name).await?;
        context.principal().may_change(&policy.scope)?;
        // What was looked at is what is deleted.
        let etag = etag.or_else(|| Some(policy.etag()));
        self.store.delete_policy(&self.writer(context), name, etag).await?;
        self.committed.here();
        Ok(())
    }

    /// The rules in force in a layer of a scope.
    ///
    /// # Errors
    /// SCOPE_DENIED, or when the store fails.
    pub async fn effective_policy(
        &self,
        context: &RequestContext,
        scope: &Scope,
        layer: Option<Layer>,
    ) -> Result<Effective, Error> {
        let scope = context.principal().stand_in(scope)?;
        let layer = layer.or_else(|| scope.layer()).unwrap_or(Layer::Company);
        let all = self.store.policies(&context.principal().tenant).await?;
        Ok(Effective::of(&all, &scope, layer))
    }

    /// Removes for good what was deleted longer ago than the rules keep it; how many memories.
    pub(super) async fn forget(&self, stop: &CancellationToken) -> Result<usize, MemoryError> {
        let now = self.clock.now();
        let mut count = 0;
        for (tenant, scopes) in self.store.governed().await? {
            let law = self.law(&tenant).await?;
            for (key, scope) in scopes {
                let Some(kept) = law.effective(&scope).rules.deleted_retention else {
                    continue;
                };
                let Some(before) = Timestamp::from_micros(now.micros().saturating_sub(kept)) else {
                    continue;
                };
                loop {
                    let purged = self.store.purge_deleted(key, before, now, PURGED).await?;
                    count += purged;
                    if purged < PURGED || stop.is_cancelled() {
                        break;
                    }
                }
            }
        }
        Ok(count)
    }
}
