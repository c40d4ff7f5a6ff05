//! What is asked of a node.
//!
//! A point has a memory's number; the payload says whose it is, in which scope, and with which change of the outbox it was
//! written (`at`). An upsert passes over points that have a later one, so that a delayed writer never overwrites what is newer,
//! whatever the order in which replicas hear of it. A removal leaves a point without a vector behind for a while, for the same
//! reason. One more point remembers up to which change everything is in.

use std::collections::HashMap;

use qdrant_client::qdrant::{
    CollectionParamsDiffBuilder, Condition, CountPoints, CountPointsBuilder, CreateCollection, CreateCollectionBuilder,
    CreateFieldIndexCollection, CreateFieldIndexCollectionBuilder, DeletePoints, DeletePointsBuilder, Distance,
    FieldType, Filter, GetPoints, GetPointsBuilder, HnswConfigDiffBuilder, IntegerIndexParamsBuilder,
    KeywordIndexParamsBuilder, NamedVectors, PointStruct, QuantizationSearchParamsBuilder, Query, QueryPoints,
    QueryPointsBuilder, Range, ScalarQuantizationBuilder, SearchParamsBuilder, UpdateCollection,
    UpdateCollectionBuilder, UpsertPoints, UpsertPointsBuilder, Value, Vector, VectorParamsBuilder, VectorParamsMap,
    Vectors, VectorsConfig, value::Kind, vectors, vectors_config,
};

use super::QdrantOptions;
use crate::domain::{Key, Sequence};
use crate::store::code::Code;
use crate::store::{Among, Changes, Entry};
use qdrant_client::qdrant::{
    PointId, ReadConsistencyType, RetrievedPoint, ScrollPoints, ScrollPointsBuilder, point_id::PointIdOptions,
    read_consistency, vector_output,
};

/// The vectors of the first pass.
pub const DENSE: &str = "dense";
const TENANT: &str = "tenant";
const SCOPE: &str = "scope";
/// With which change it was written. Compared as a double, which is exact below 2^53; beyond, changes of one transaction fall
/// together, and those are of different memories.
const AT: &str = "at";
/// When it lost its vector, in seconds since 1970.
const GONE: &str = "gone";
/// The point that remembers up to which change everything is in, which is its `at`.
const MARK: u64 = u64::MAX;
/// Milliseconds after which another replica is asked.
const HASTE: u64 = 200;
/// The least cosine of a vector and what a server gives back of it.
const SAME: f64 = 0.9999;
/// Vectors that the graph is walked along with, at least.
const EF: u64 = 256;

/// A collection for vectors of a first pass. Each tenant has a graph of its own: no search crosses that border.
pub fn collection(name: &str, prefix: usize, options: &QdrantOptions) -> CreateCollection {
    let vectors = VectorParamsBuilder::new(prefix as u64, Distance::Cosine)
        .hnsw_config(HnswConfigDiffBuilder::default().m(0).payload_m(16).ef_construct(128))
        .quantization_config(ScalarQuantizationBuilder::default().quantile(0.99).always_ram(true))
        .on_disk(true);
    let map = HashMap::from([(DENSE.to_owned(), vectors.build())]);
    let config = VectorsConfig {
        config: Some(vectors_config::Config::ParamsMap(VectorParamsMap { map })),
    };
    CreateCollectionBuilder::new(name)
        .vectors_config(config)
        .shard_number(options.shards)
        .replication_factor(options.replicas)
        .write_consistency_factor(options.consistency)
        .on_disk_payload(true)
        .build()
}

/// Another replica is asked as well when one does not answer at once.
pub fn hasty(name: &str) -> UpdateCollection {
    UpdateCollectionBuilder::new(name)
        .params(CollectionParamsDiffBuilder::default().read_fan_out_delay_ms(HASTE))
        .build()
}

/// What its points are chosen by.
pub fn fields(name: &str) -> [CreateFieldIndexCollection; 3] {
    let tenant = KeywordIndexParamsBuilder::default().is_tenant(true);
    let scope = IntegerIndexParamsBuilder::new(true, false);
    let gone = IntegerIndexParamsBuilder::new(false, true);
    [
        CreateFieldIndexCollectionBuilder::new(name, TENANT, FieldType::Keyword)
            .field_index_params(tenant)
            .wait(true)
            .build(),
        CreateFieldIndexCollectionBuilder::new(name, SCOPE, FieldType::Integer)
            .field_index_params(scope)
            .wait(true)
            .build(),
        CreateFieldIndexCollectionBuilder::new(name, GONE, FieldType::Integer)
            .field_index_params(gone)
            .wait(true)
            .build(),
    ]
}

/// Upserts all that points do not have from a later change; `now` in seconds since 1970.
pub fn upsert(name: &str, prefix: usize, changes: &Changes, now: i64) -> UpsertPoints {
    let at = changes.at.0;
    let upserts = changes.upserts.iter().map(|entry| {
        let mut vector = entry.code.decode();
        vector.truncate(prefix);
        let payload = [
            (TENANT, Value::from(entry.tenant.as_str())),
            (SCOPE, Value::from(entry.scope.0)),
            (AT, Value::from(at)),
        ];
        point(id(entry.key), payload, Some(vector))
    });
    let removals = changes.removals.iter().map(|key| {
        let payload = [(GONE, Value::from(now)), (AT, Value::from(at))];
        point(id(*key), payload, None)
    });
    newer(name, upserts.chain(removals).collect(), at)
}

/// Remembers up to which change everything is in.
pub fn mark(name: &str, watermark: Sequence) -> UpsertPoints {
    newer(
        name,
        vec![point(MARK, [(AT, Value::from(watermark.0))], None)],
        watermark.0,
    )
}

/// Upserts points that are not there from a later change.
fn newer(name: &str, points: Vec<PointStruct>, at: i64) -> UpsertPoints {
    let not_later = Range {
        lte: Some(at as f64),
        ..Range::default()
    };
    UpsertPointsBuilder::new(name, points)
        .update_filter(Filter::must([Condition::range(AT, not_later)]))
        .wait(true)
        .build()
}

fn point<const N: usize>(id: u64, payload: [(&str, Value); N], vector: Option<Vec<f32>>) -> PointStruct {
    let named = vector.map(|vector| (DENSE.to_owned(), Vector::from(vector)));
    PointStruct {
        id: Some(id.into()),
        payload: payload
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        vectors: Some(Vectors {
            vectors_options: Some(vectors::VectorsOptions::Vectors(NamedVectors {
                vectors: named.into_iter().collect(),
            })),
        }),
    }
}

/// Numbers of memories are above 0.
fn id(key: Key) -> u64 {
    key.0.unsigned_abs()
}

/// Asks up to which change everything is in.
pub fn marked(name: &str) -> GetPoints {
    GetPointsBuilder::new(name, vec![MARK.into()])
        .with_payload(true)
        .build()
}

/// What [`mark`] remembered.
pub fn watermark(payload: &HashMap<String, Value>) -> Option<Sequence> {
    match payload.get(AT)?.kind {
        Some(Kind::IntegerValue(at)) => Some(Sequence(at)),
        _ => None,
    }
}

/// Asks for the nearest vectors; `None` when none is allowed.
pub fn nearest(name: &str, prefix: usize, query: &Code, among: &Among, limit: usize) -> Option<QueryPoints> {
    let chosen = among.only.as_ref().is_none_or(|only| !only.is_empty());
    if among.scopes.is_empty() || !chosen || limit == 0 {
        return None;
    }
    let mut vector = query.decode();
    vector.truncate(prefix);
    let scopes: Vec<i64> = among.scopes.iter().map(|scope| scope.0).collect();
    let mut filter = Filter::must([
        Condition::matches(TENANT, among.tenant.as_str().to_owned()),
        Condition::matches(SCOPE, scopes),
    ]);
    if let Some(only) = &among.only {
        let left = only.difference(&among.exclude);
        filter.must.push(Condition::has_id(left.map(|key| id(*key))));
    } else if !among.exclude.is_empty() {
        let excluded = among.exclude.iter().map(|key| id(*key));
        filter.must_not.push(Condition::has_id(excluded));
    }
    // The caller compares them at full size: what int8 says is enough.
    let params = SearchParamsBuilder::default()
        .hnsw_ef(EF.max(limit as u64))
        .quantization(QuantizationSearchParamsBuilder::default().rescore(false));
    let request = QueryPointsBuilder::new(name)
        .query(Query::new_nearest(vector))
        .using(DENSE)
        .filter(filter)
        .params(params)
        .limit(limit as u64)
        .with_payload(false);
    Some(request.build())
}

/// Asks for points, as all replicas have them.
pub fn points(name: &str, keys: &[Key]) -> GetPoints {
    let ids: Vec<PointId> = keys.iter().map(|key| id(*key).into()).collect();
    GetPointsBuilder::new(name, ids)
        .with_payload(true)
        .with_vectors(true)
        .read_consistency(read_consistency::Value::Type(ReadConsistencyType::All.into()))
        .build()
}

/// Whether a point has a vector.
pub fn is_there(point: &RetrievedPoint) -> bool {
    vector(point).is_some()
}

/// Whether a point is as a memory's should be.
pub fn is_like(point: &RetrievedPoint, prefix: usize, entry: &Entry) -> bool {
    let field = |name: &str| point.payload.get(name).and_then(|value| value.kind.clone());
    let tenant = field(TENANT) == Some(Kind::StringValue(entry.tenant.to_string()));
    let scope = field(SCOPE) == Some(Kind::IntegerValue(entry.scope.0));
    let Some(held) = vector(point).filter(|_| tenant && scope) else {
        return false;
    };
    // It is kept as a unit vector.
    let wanted = entry.code.decode();
    let wanted = &wanted[..prefix.min(wanted.len())];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let length = (dot(wanted, wanted) * dot(&held, &held)).sqrt();
    held.len() == wanted.len() && dot(wanted, &held) >= SAME * length
}

fn vector(point: &RetrievedPoint) -> Option<Vec<f32>> {
    match point.vectors.as_ref()?.get_vector_by_name(DENSE)? {
        vector_output::Vector::Dense(dense) => Some(dense.data),
        _ => None,
    }
}

/// The memory that a point is of.
pub fn key(id: Option<&PointId>) -> Option<Key> {
    match id?.point_id_options.as_ref()? {
        PointIdOptions::Num(number) => i64::try_from(*number).ok().map(Key),
        PointIdOptions::Uuid(_) => None,
    }
}

/// Asks for the points with a vector after one, in order.
pub fn after(name: &str, after: Key, limit: u32) -> ScrollPoints {
    ScrollPointsBuilder::new(name)
        .filter(Filter::must([Condition::has_vector(DENSE)]))
        .offset(id(after) + 1)
        .limit(limit)
        .with_payload(false)
        .with_vectors(false)
        .build()
}

/// Counts the vectors.
pub fn count(name: &str) -> CountPoints {
    CountPointsBuilder::new(name)
        .filter(Filter::must([Condition::has_vector(DENSE)]))
        .exact(true)
        .build()
}

/// Forgets what lost its vector before a time, in seconds since 1970.
pub fn bury(name: &str, before: i64) -> DeletePoints {
    let long_ago = Range {
        lt: Some(before as f64),
        ..Range::default()
    };
    DeletePointsBuilder::new(name)
        .points(Filter::must([Condition::range(GONE, long_ago)]))
        .wait(true)
        .build()
}
