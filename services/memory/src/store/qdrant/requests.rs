//! What is asked of a node.
//!
//! A point has a memory's number; the payload says whose it is, in which scope, and with which change of the outbox it was
//! written (`at`). An upsert passes over points that have a later one, so that a delayed writer never overwrites what is newer,
//! whatever the order in which replicas hear of it. A removal leaves a point without a vector behind for a while, for the same
//! reason. One more point, the mark, remembers up to which change everything is in, or, while the collection is filled, how far
//! that is. It says which making of the collection it speaks of, so that whoever has not noticed that it was deleted and made
//! anew does not say of the new one what was true of the old one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use qdrant_client::qdrant::{
    CollectionParamsDiffBuilder, Condition, CountPoints, CountPointsBuilder, CreateCollection, CreateCollectionBuilder,
    CreateFieldIndexCollection, CreateFieldIndexCollectionBuilder, DeletePoints, DeletePointsBuilder, Distance,
    FieldType, Filter, GetPoints, GetPointsBuilder, HnswConfigDiffBuilder, IntegerIndexParamsBuilder,
    KeywordIndexParamsBuilder, Modifier, NamedVectors, PointId, PointStruct, QuantizationSearchParamsBuilder, Query,
    QueryPoints, QueryPointsBuilder, Range, ReadConsistency, ReadConsistencyType, RetrievedPoint,
    ScalarQuantizationBuilder, ScrollPoints, ScrollPointsBuilder, SearchParamsBuilder, SetPayloadPoints,
    SetPayloadPointsBuilder, SparseVectorConfig, SparseVectorParamsBuilder, UpdateCollection, UpdateCollectionBuilder,
    UpsertPoints, UpsertPointsBuilder, Value, Vector, VectorInput, VectorParamsBuilder, VectorParamsMap, Vectors,
    VectorsConfig, WriteOrdering, WriteOrderingType, point_id::PointIdOptions, read_consistency, value::Kind,
    vector_output, vectors, vectors_config,
};

use super::QdrantOptions;
use crate::domain::{Key, Sequence};
use crate::store::code::Code;
use crate::store::{Among, Entry};

/// The vectors of the first pass.
pub const DENSE: &str = "dense";
/// The texts: one dimension a term, by its checksum. A server weighs it by how rare the term is in the collection, which is good
/// enough for candidates; what they are worth, the relational store says by the tenant's own statistics.
pub const LEXICAL: &str = "lexical";
/// Terms of a text of usual length: candidates need no exact average.
const LENGTH: f32 = 50.0;
const TENANT: &str = "tenant";
const SCOPE: &str = "scope";
/// With which change it was written. Compared as a double, which is exact below 2^53; beyond, changes of one transaction fall
/// together, and those are of different memories.
const AT: &str = "at";
/// When it lost its vector, in seconds since 1970.
const GONE: &str = "gone";
/// Up to which memory the collection is filled, and as of which change: only while it is.
const FILLED: &str = "filled";
const AS_OF: &str = "as_of";
/// Names the making of the collection, in the mark. Collections of versions before have none.
const MADE: &str = "made";
/// By which version of the text analysis the texts are found, in the mark. Collections of versions before have none.
const ANALYSIS: &str = "analysis";
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
    let sparse = SparseVectorParamsBuilder::default().modifier(Modifier::Idf).build();
    let texts = SparseVectorConfig {
        map: HashMap::from([(LEXICAL.to_owned(), sparse)]),
    };
    CreateCollectionBuilder::new(name)
        .vectors_config(config)
        .sparse_vectors_config(texts)
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

/// Upserts memories, as of a change, where points do not have a later one.
pub fn upsert(name: &str, prefix: usize, entries: &[Entry], at: Sequence) -> UpsertPoints {
    let upserts = entries.iter().map(|entry| {
        let payload = [
            (TENANT, Value::from(entry.tenant.as_str())),
            (SCOPE, Value::from(entry.scope.0)),
            (AT, Value::from(at.0)),
        ];
        let mut vectors = HashMap::new();
        if let Some(code) = &entry.code {
            vectors.insert(DENSE.to_owned(), Vector::from(first(code, prefix)));
        }
        let (terms, values): (Vec<u32>, Vec<f32>) = weighed(&entry.text).into_iter().unzip();
        if !terms.is_empty() {
            vectors.insert(LEXICAL.to_owned(), Vector::new_sparse(terms, values));
        }
        point(id(entry.key), payload, vectors)
    });
    newer(name, upserts.collect(), at)
}

/// Leaves points without a vector where they do not have a later change; `now` in seconds since 1970.
pub fn remove(name: &str, keys: &[Key], at: Sequence, now: i64) -> UpsertPoints {
    let removals = keys.iter().map(|key| {
        let payload = [(GONE, Value::from(now)), (AT, Value::from(at.0))];
        point(id(*key), payload, HashMap::new())
    });
    newer(name, removals.collect(), at)
}

/// Begins the mark of a collection, unless there is one.
pub fn begin(name: &str, made: &str) -> UpsertPoints {
    let payload = [
        (AT, Value::from(0)),
        (MADE, Value::from(made)),
        (ANALYSIS, Value::from(i64::from(aeterna_text::VERSION))),
    ];
    // No change has this place, so that nothing is overwritten.
    let mut begin = newer(name, vec![point(MARK, payload, HashMap::new())], Sequence(-1));
    // Of several who begin, all replicas must take the same for the first.
    begin.ordering = Some(WriteOrdering {
        r#type: WriteOrderingType::Medium.into(),
    });
    begin
}

/// Begins the mark anew, unless somebody else has since: the collection is to be filled as if it had just been made.
pub fn begin_again(name: &str, before: Option<&str>, made: &str) -> SetPayloadPoints {
    let mut begin = marking(name, before, Sequence(i64::MAX), &[(AT, 0)]);
    begin.payload.insert(MADE.to_owned(), Value::from(made));
    begin.ordering = Some(WriteOrdering {
        r#type: WriteOrderingType::Medium.into(),
    });
    begin
}

/// Remembers up to which change everything is in.
pub fn mark(name: &str, made: Option<&str>, watermark: Sequence) -> SetPayloadPoints {
    marking(name, made, watermark, &[(AT, watermark.0)])
}

/// Remembers up to which memory the collection is filled, as of a change, unless everything is in.
pub fn fill_to(name: &str, made: Option<&str>, upto: Key, as_of: Sequence) -> SetPayloadPoints {
    let payload = [(FILLED, upto.0), (AS_OF, as_of.0), (AT, 0)];
    marking(name, made, Sequence(0), &payload)
}

/// Writes the mark, where it speaks of this making of the collection and of no later change; it is never made by this.
fn marking(name: &str, made: Option<&str>, at: Sequence, payload: &[(&str, i64)]) -> SetPayloadPoints {
    let same = match made {
        Some(made) => Condition::matches(MADE, made.to_owned()),
        None => Condition::is_empty(MADE),
    };
    let mark = Filter::must([Condition::has_id([MARK]), not_later(at), same]);
    let analysis = (ANALYSIS, i64::from(aeterna_text::VERSION));
    let numbers = payload
        .iter()
        .chain([&analysis])
        .map(|(name, number)| ((*name).to_owned(), Value::from(*number)));
    let made = made.map(|made| (MADE.to_owned(), Value::from(made)));
    SetPayloadPointsBuilder::new(name, numbers.chain(made).collect::<HashMap<String, Value>>())
        .points_selector(mark)
        .wait(true)
        .build()
}

fn not_later(at: Sequence) -> Condition {
    let range = Range {
        lte: Some(at.0 as f64),
        ..Range::default()
    };
    Condition::range(AT, range)
}

/// Upserts points that are not there from a later change.
fn newer(name: &str, points: Vec<PointStruct>, at: Sequence) -> UpsertPoints {
    UpsertPointsBuilder::new(name, points)
        .update_filter(Filter::must([not_later(at)]))
        .wait(true)
        .build()
}

fn point<const N: usize>(id: u64, payload: [(&str, Value); N], vectors: HashMap<String, Vector>) -> PointStruct {
    PointStruct {
        id: Some(id.into()),
        payload: payload
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        vectors: Some(Vectors {
            vectors_options: Some(vectors::VectorsOptions::Vectors(NamedVectors { vectors })),
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
    number(payload, AT).filter(|at| *at > 0).map(Sequence)
}

/// Which making of the collection [`begin`] has named.
pub fn made(payload: &HashMap<String, Value>) -> Option<String> {
    match &payload.get(MADE)?.kind {
        Some(Kind::StringValue(made)) => Some(made.clone()),
        _ => None,
    }
}

/// Whether texts are found by the present version of the analysis.
pub fn is_analysed(payload: &HashMap<String, Value>) -> bool {
    number(payload, ANALYSIS) == Some(i64::from(aeterna_text::VERSION))
}

/// What [`fill_to`] remembered.
pub fn filled(payload: &HashMap<String, Value>) -> Option<(Key, Sequence)> {
    Some((Key(number(payload, FILLED)?), Sequence(number(payload, AS_OF)?)))
}

fn number(payload: &HashMap<String, Value>, name: &str) -> Option<i64> {
    match payload.get(name)?.kind {
        Some(Kind::IntegerValue(number)) => Some(number),
        _ => None,
    }
}

/// The dimensions of the first pass.
fn first(code: &Code, prefix: usize) -> Vec<f32> {
    let mut vector = code.decode();
    vector.truncate(prefix);
    vector
}

/// The dimension of a term.
fn dimension(term: &str) -> u32 {
    crc32fast::hash(term.as_bytes())
}

/// The terms of a text by BM25 (Robertson and Zaragoza 2009), but for how rare they are.
fn weighed(text: &str) -> BTreeMap<u32, f32> {
    let terms = aeterna_text::analyse(text);
    let length = terms.len() as f32;
    let mut counts = BTreeMap::<u32, f32>::new();
    for term in &terms {
        *counts.entry(dimension(term)).or_default() += 1.0;
    }
    for count in counts.values_mut() {
        *count = *count * 2.2 / (*count + 1.2 * (0.25 + 0.75 * length / LENGTH));
    }
    counts
}

/// What a search may find; `None`: nothing.
fn visible(among: &Among) -> Option<Filter> {
    let chosen = among.only.as_ref().is_none_or(|only| !only.is_empty());
    if among.scopes.is_empty() || !chosen {
        return None;
    }
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
    Some(filter)
}

/// The same asked of more replicas than one.
pub fn read(mut request: QueryPoints, consistency: Option<ReadConsistencyType>) -> QueryPoints {
    request.read_consistency = consistency.map(|of| ReadConsistency {
        value: Some(read_consistency::Value::Type(of.into())),
    });
    request
}

/// Asks for the memories that have the best of some terms; `None` when none is allowed.
pub fn lexical(name: &str, terms: &[String], among: &Among, limit: usize) -> Option<QueryPoints> {
    let filter = visible(among).filter(|_| !terms.is_empty() && limit > 0)?;
    let dimensions: BTreeSet<u32> = terms.iter().map(|term| dimension(term)).collect();
    let ones = vec![1.0; dimensions.len()];
    let query = VectorInput::new_sparse(Vec::from_iter(dimensions), ones);
    let request = QueryPointsBuilder::new(name)
        .query(Query::new_nearest(query))
        .using(LEXICAL)
        .filter(filter)
        .limit(limit as u64)
        .with_payload(false);
    Some(request.build())
}

/// Asks for the nearest vectors; `None` when none is allowed.
pub fn nearest(name: &str, prefix: usize, query: &Code, among: &Among, limit: usize) -> Option<QueryPoints> {
    let filter = visible(among).filter(|_| limit > 0)?;
    // The caller compares them at full size: what int8 says is enough.
    let params = SearchParamsBuilder::default()
        .hnsw_ef(EF.max(limit as u64))
        .quantization(QuantizationSearchParamsBuilder::default().rescore(false));
    let request = QueryPointsBuilder::new(name)
        .query(Query::new_nearest(first(query, prefix)))
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

/// Whether a point is of a memory that is there.
pub fn is_there(point: &RetrievedPoint) -> bool {
    point.payload.contains_key(TENANT)
}

/// Whether a point is as a memory's should be.
pub fn is_like(point: &RetrievedPoint, prefix: usize, entry: &Entry) -> bool {
    let field = |name: &str| point.payload.get(name).and_then(|value| value.kind.clone());
    let tenant = field(TENANT) == Some(Kind::StringValue(entry.tenant.to_string()));
    let scope = field(SCOPE) == Some(Kind::IntegerValue(entry.scope.0));
    let held = |name: &str| {
        point
            .vectors
            .as_ref()
            .and_then(|vectors| vectors.get_vector_by_name(name))
    };
    let dense = match (held(DENSE), &entry.code) {
        (Some(vector_output::Vector::Dense(dense)), Some(code)) => {
            // It is kept as a unit vector.
            let (wanted, held) = (first(code, prefix), dense.data);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let length = (dot(&wanted, &wanted) * dot(&held, &held)).sqrt();
            held.len() == wanted.len() && dot(&wanted, &held) >= SAME * length
        }
        (held, wanted) => held.is_none() && wanted.is_none(),
    };
    let terms = match held(LEXICAL) {
        Some(vector_output::Vector::Sparse(sparse)) => sparse.indices.into_iter().zip(sparse.values).collect(),
        _ => BTreeMap::new(),
    };
    tenant && scope && dense && terms == weighed(&entry.text)
}

/// The memory that a point is of.
pub fn key(id: Option<&PointId>) -> Option<Key> {
    match id?.point_id_options.as_ref()? {
        PointIdOptions::Num(number) => i64::try_from(*number).ok().map(Key),
        PointIdOptions::Uuid(_) => None,
    }
}

/// Asks for the points of memories that are there after one, in order.
pub fn after(name: &str, after: Key, limit: u32) -> ScrollPoints {
    ScrollPointsBuilder::new(name)
        .filter(Filter::must_not([Condition::is_empty(TENANT)]))
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
