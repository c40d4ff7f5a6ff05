//! Which models the embedding service has, and which of them searches are answered by at first.

use std::time::{Duration, Instant};

use aeterna_error::{Error, Reason};
use aeterna_proto::embedding::v1 as embedding;
use aeterna_rpc::{AnyChannel, Credentials, RequestContext};
use aeterna_types::TenantId;
use serde::{Deserialize, Serialize};

use crate::app::Model;
use crate::store::Relational;
use crate::store::code::BLOCK;

/// Under which name the models are remembered.
const NOTE: &str = "models";
/// How long a service that knows the models from before waits for the embedding service.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is remembered of a model.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    name: String,
    revision: String,
    dimension: i32,
    matryoshka: bool,
    default: bool,
}

/// The default model, and the one that searches are answered by at first.
///
/// # Errors
/// When the embedding service refuses this process, has no model of use, or when the store fails.
pub async fn choose(
    embedder: AnyChannel,
    credentials: &Credentials,
    store: &dyn Relational,
) -> Result<(Model, Model), Error> {
    let models = models(embedder, credentials, store).await?;
    let wanted = models.iter().find(|model| model.default);
    let wanted = model(wanted.ok_or_else(|| Error::unavailable("the embedding service has no model"))?)?;
    let first = serving(&wanted, &models, store).await?;
    Ok((wanted, first))
}

/// The models of the embedding service. Services start in any order: it is waited for, unless it is known from before what it
/// had; then what is stored is served without it.
async fn models(
    embedder: AnyChannel,
    credentials: &Credentials,
    store: &dyn Relational,
) -> Result<Vec<embedding::Model>, Error> {
    let mut client = embedding::embedding_service_client::EmbeddingServiceClient::new(embedder);
    let before = store.note(NOTE).await?;
    let mut delay = Duration::from_millis(100);
    let began = Instant::now();
    loop {
        let context = RequestContext::background(TenantId::local(), credentials);
        let listed = client
            .list_models(context.request(embedding::ListModelsRequest {}))
            .await;
        let error = match listed {
            Ok(listed) => {
                let models = listed.into_inner().models;
                let note = remembered(&models)?;
                if before.as_ref() != Some(&note) {
                    store.put_note(NOTE, &note).await?;
                }
                return Ok(models);
            }
            Err(status) => aeterna_error::from_status(&status),
        };
        if error.reason() != Reason::DependencyUnavailable {
            let message = format!("the embedding service refuses this process: {error}");
            return Err(Error::new(Reason::NotConfigured, message));
        }
        let known = before.as_deref().and_then(|note| serde_json::from_str(note).ok());
        if let Some(known) = known.filter(|_| began.elapsed() > PATIENCE) {
            tracing::warn!(%error, "the embedding service is away; going on with the models that it had");
            return Ok(recalled(known));
        }
        tracing::warn!(%error, "waiting for the embedding service (`memory.embedding`)");
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(Duration::from_secs(5));
    }
}

/// The model that searches are answered by, as far as the embedding service was known when one ran last.
///
/// # Errors
/// NOT_CONFIGURED when none ever ran, or when the store fails.
pub async fn remembered_first(store: &dyn Relational) -> Result<Model, Error> {
    let known = store.note(NOTE).await?;
    let known = known.as_deref().and_then(|note| serde_json::from_str(note).ok());
    let models = recalled(known.unwrap_or_default());
    let message = "no service has run on this store yet: there is nothing to compare";
    let wanted = models.iter().find(|model| model.default);
    let wanted = model(wanted.ok_or_else(|| Error::new(Reason::NotConfigured, message))?)?;
    serving(&wanted, &models, store).await
}

fn remembered(models: &[embedding::Model]) -> Result<String, Error> {
    let models = models.iter().map(|model| Remembered {
        name: model.name.clone(),
        revision: model.revision.clone(),
        dimension: model.dimension,
        matryoshka: model.matryoshka,
        default: model.default,
    });
    serde_json::to_string(&models.collect::<Vec<_>>()).map_err(Error::internal)
}

fn recalled(models: Vec<Remembered>) -> Vec<embedding::Model> {
    let model = |model: Remembered| embedding::Model {
        name: model.name,
        revision: model.revision,
        dimension: model.dimension,
        matryoshka: model.matryoshka,
        default: model.default,
        ..embedding::Model::default()
    };
    models.into_iter().map(model).collect()
}

/// The model to answer searches by at first: the wanted one, unless most vectors are by another one that the embedding service
/// still has; then memories are embedded anew in the background.
async fn serving(wanted: &Model, models: &[embedding::Model], store: &dyn Relational) -> Result<Model, Error> {
    let (mut most, mut first) = (None, wanted.clone());
    for identity in store.models().await? {
        let before = models.iter().find(|model| identity_of(model) == identity);
        let Some(before) = before.filter(|_| identity != wanted.identity) else {
            continue;
        };
        // Only where there is a choice: counting takes long in a large store.
        let least = match most {
            Some(most) => most,
            None => store.vectors_by(&wanted.identity).await?,
        };
        let count = store.vectors_by(&identity).await?;
        most = Some(least.max(count));
        if count > least {
            first = model(before)?;
        }
    }
    Ok(first)
}

fn identity_of(model: &embedding::Model) -> String {
    format!("{}@{}", model.name, model.revision)
}

/// A model of the embedding service, as vectors of it are kept.
fn model(model: &embedding::Model) -> Result<Model, Error> {
    let dimension = usize::try_from(model.dimension).unwrap_or(0);
    let prefix = if model.matryoshka {
        dimension.min(256)
    } else {
        dimension
    };
    if dimension == 0 || !dimension.is_multiple_of(BLOCK) {
        let message = format!(
            "the model `{}` has {dimension} dimensions; a multiple of 64 is needed",
            model.name
        );
        return Err(Error::new(Reason::NotConfigured, message));
    }
    Ok(Model {
        name: model.name.clone(),
        identity: identity_of(model),
        dimension,
        prefix,
    })
}
