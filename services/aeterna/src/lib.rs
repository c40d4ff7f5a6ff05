//! The composition root, one process with any subset of the services, and the command line that people use.

pub mod cli;
mod compose;
pub mod import;
pub mod json;

pub use compose::{Role, Services, build, load, tables};
