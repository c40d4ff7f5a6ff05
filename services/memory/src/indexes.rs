//! The indexes of the models, by what `memory.index` names.

mod flat;
mod qdrant;

pub use flat::FlatIndexes;
pub use qdrant::QdrantIndexes;
