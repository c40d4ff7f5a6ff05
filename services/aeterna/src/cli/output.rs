//! What a person sees.

#![allow(clippy::print_stdout, clippy::print_stderr)] // this is the command line

use aeterna_proto::memory::v1::Memory;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use tonic::Status;

use super::scope;

/// Columns that a table has where no terminal says otherwise.
const WIDTH: u16 = 120;

/// A line on standard output. A reader that went away (`| head`) ends the program quietly; when it can't be written otherwise, as
/// on a full disk, the program fails.
pub fn line(text: impl std::fmt::Display) {
    use std::io::Write as _;
    let mut out = std::io::stdout();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            eprintln!("error: standard output can't be written: {error}");
            std::process::exit(1);
        }
    }
}

/// A line on standard error.
pub fn note(text: impl std::fmt::Display) {
    eprintln!("{text}");
}

/// An error with what the server says about it.
pub fn error(error: &anyhow::Error) {
    eprintln!("error: {}", told(error));
}

fn told(error: &anyhow::Error) -> String {
    let mut parts = Vec::new();
    for cause in error.chain() {
        if let Some(status) = cause.downcast_ref::<Status>() {
            parts.push(refusal(status));
            return parts.join(": ");
        }
        parts.push(cause.to_string());
    }
    format!("{error:#}")
}

/// What a server's refusal says, every field at fault included.
pub fn refusal(status: &Status) -> String {
    let error = aeterna_error::from_status(status);
    if status.code() == tonic::Code::Unavailable && !aeterna_error::is_answer(status) {
        return format!(
            "the server can't be reached ({}); start it with `aeterna serve`, or say where it is with --url",
            root_cause(status)
        );
    }
    match error.violations() {
        [] => error.message().to_owned(),
        violations => {
            let listed = violations
                .iter()
                .map(|v| format!("\n  `{}` {}", v.field, v.description));
            format!("the server refuses this:{}", listed.collect::<String>())
        }
    }
}

fn root_cause(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => cause.to_string(),
    }
}

/// Text of unknown origin on one line, without anything that a terminal would obey.
pub fn clean(text: &str) -> String {
    let plain = |c: char| match c {
        '\n' | '\r' | '\t' => ' ',
        // Control characters, and marks that turn the direction of what follows.
        c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => '\u{fffd}',
        c => c,
    };
    text.chars().map(plain).collect()
}

/// A table with its head.
pub fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(head);
    if !table.is_tty() {
        table.set_width(WIDTH);
    }
    table
}

/// Aligns a column of numbers.
pub fn align_right(table: &mut Table, column: usize) {
    if let Some(column) = table.column_mut(column) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

/// What a memory says, with who said it and what its picture shows.
pub fn said(memory: &Memory) -> String {
    let source = memory.source.clone().unwrap_or_default();
    let speaker = if source.speaker.is_empty() {
        String::new()
    } else {
        format!("{}: ", source.speaker)
    };
    let caption = if source.caption.is_empty() {
        String::new()
    } else {
        format!(" [{}]", source.caption)
    };
    clean(&format!("{speaker}{}{caption}", memory.content))
}

/// The day of what a memory tells of, otherwise the day it was taken in.
pub fn day(memory: &Memory) -> String {
    let time = memory.event_at.or(memory.created_at).unwrap_or_default();
    match jiff::Timestamp::from_second(time.seconds) {
        Ok(time) => time.to_zoned(jiff::tz::TimeZone::UTC).date().to_string(),
        Err(_) => String::new(),
    }
}

/// Where a memory lives.
pub fn place(memory: &Memory) -> String {
    clean(&scope::show(&memory.scope.clone().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_printed() {
        assert_eq!(clean("a\u{1b}[2J\nb\u{202e}c"), "a\u{fffd}[2J b\u{fffd}c");
    }

    #[test]
    fn a_server_that_answers_is_not_called_away_and_contexts_are_told() {
        let busy = Status::from(aeterna_error::Error::unavailable("the store is busy; try again"));
        let error = anyhow::Error::from(busy).context("run it again").context("import `a`");
        assert_eq!(told(&error), "import `a`: run it again: the store is busy; try again");
        let away = anyhow::Error::from(Status::unavailable("tcp connect error"));
        assert!(told(&away).contains("aeterna serve"), "{}", told(&away));
    }

    #[test]
    fn a_refusal_lists_every_field() {
        let mut violations = aeterna_error::Violations::default();
        violations.add("top_k", "is 5000; send 1 to 1000");
        violations.add("query", "is empty");
        let status = Status::from(violations.into_result().unwrap_err());
        let text = refusal(&status);
        assert!(
            text.contains("`top_k` is 5000") && text.contains("`query` is empty"),
            "{text}"
        );
    }
}
