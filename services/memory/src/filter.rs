//! The filter language: a part of AIP-160 with one meaning on every store.
//!
//! A filter is parsed and typed once, here; stores compile it to their own query language, and are tested against the evaluator
//! in memory that watchers use ([`Filter::matches`]). A test on a value that is not there is false, so `!=` and `NOT` are true for it: the logic has two values.

mod eval;
mod parse;

use aeterna_types::{Layer, Timestamp};

pub use parse::parse;

/// A parsed filter.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// All of them; true when there is none.
    All(Vec<Filter>),
    /// One of them.
    Any(Vec<Filter>),
    /// The opposite.
    Not(Box<Filter>),
    /// A test of one field.
    Test(Field, Condition),
}

/// What is tested.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// A text.
    Text(TextField),
    /// A number.
    Number(NumberField),
    /// A time.
    Time(TimeField),
    /// The layer a memory lives in.
    Layer,
    /// The tags.
    Tags,
    /// A path into the metadata; empty: the metadata itself.
    Metadata(Vec<String>),
}

/// Fields that hold text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextField {
    /// `id`
    Id,
    /// `content`
    Content,
    /// `source.conversation`
    Conversation,
    /// `source.speaker`
    Speaker,
    /// `source.caption`
    Caption,
    /// `source.reference`
    Reference,
    /// `superseded_by`
    SupersededBy,
    /// `scope.<layer>`
    Scope(Layer),
}

/// Fields that hold a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumberField {
    /// `importance`
    Importance,
    /// `version`
    Version,
    /// `source.sequence`
    Sequence,
}

/// Fields that hold a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeField {
    /// `created_at`
    Created,
    /// `updated_at`
    Updated,
    /// `event_at`
    Event,
    /// `valid_at`
    Valid,
    /// `invalid_at`
    Invalid,
    /// `expires_at`
    Expires,
    /// `deleted_at`
    Deleted,
}

/// What a test asks.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// `:*`: there is a value.
    Present,
    /// A comparison with a value of the field's type.
    Compare(Comparison, Literal),
    /// `:`: a text has the part, tags or a list have the item, an object has the key.
    Has(Literal),
}

/// How two values are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `=`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
}

/// A value in a filter.
#[derive(Clone, Debug, PartialEq)]
pub enum Literal {
    /// A text.
    Text(String),
    /// A finite number.
    Number(f64),
    /// A whole number, for fields that hold such: exact however large.
    Whole(i64),
    /// `true` or `false`, in metadata.
    Bool(bool),
    /// `null`, in metadata: no value.
    Null,
    /// A time.
    Time(Timestamp),
    /// A layer.
    Layer(Layer),
}

impl Comparison {
    /// Its sign in the language, and in that of stores.
    pub fn sign(self) -> &'static str {
        match self {
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
        }
    }

    /// True for those that need an order, and not only equality.
    pub fn is_ordered(self) -> bool {
        !matches!(self, Self::Equal | Self::NotEqual)
    }
}
