//! Drills: break the stores and the services under load, and let the history say what became of every acknowledged write.
//!
//! `load` writes, reads and searches through the gateway and keeps a `history`, in which `check` looks for what must not be;
//! `drills` says what is broken and how it is mended; `drill` runs one and reports.

mod check;
mod drill;
mod drills;
mod fan;
mod history;
mod load;

pub use check::Verdict;
pub use drill::{Report, run};
pub use drills::Drill;
