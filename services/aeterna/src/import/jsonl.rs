//! JSON lines: one memory a line, in protobuf's JSON mapping.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::Memory;

use super::{BOM, Item, Source};
use crate::json;

/// Bytes of one line; a memory's content and metadata are far below it.
const MAX_LINE: usize = 1 << 20;

pub fn source(path: &Path, scope: Option<&Scope>) -> anyhow::Result<Source> {
    let file = File::open(path)?;
    let total = file.metadata()?.len();
    let scope = scope.cloned();
    let items = Lines::of(file, MAX_LINE).filter_map(move |line| match line {
        Ok((_, text)) if text.trim_ascii().is_empty() => None,
        Ok((number, text)) => Some(Ok(Item {
            place: format!("line {number}"),
            weight: text.len() as u64,
            memory: memory(&text, scope.as_ref()),
        })),
        Err(error) => Some(Err(error.into())),
    });
    Ok(Source {
        total,
        items: Box::new(items),
    })
}

fn memory(line: &[u8], scope: Option<&Scope>) -> Result<Memory, String> {
    if line.len() > MAX_LINE {
        return Err("is longer than 1 MiB; a memory's content has at most 65,536 bytes".into());
    }
    let text = std::str::from_utf8(line).map_err(|_| "is not UTF-8".to_string())?;
    let mut memory: Memory = json::from_json("aeterna.memory.v1.Memory", text)?;
    if memory.scope.is_none() {
        memory.scope = scope.cloned();
    }
    Ok(memory)
}

/// Lines with their numbers, from 1; of one that is too long only the beginning is kept.
pub struct Lines {
    reader: BufReader<File>,
    number: u64,
    /// Bytes that are kept of a line, at least.
    most: usize,
}

impl Lines {
    /// The lines of a file, each at least whole up to so many bytes.
    pub fn of(file: File, most: usize) -> Self {
        Self {
            reader: BufReader::new(file),
            number: 0,
            most,
        }
    }

    /// The first line without the mark that some programs put before it.
    fn unmarked(&self, mut line: Vec<u8>) -> Vec<u8> {
        if self.number == 1 && line.starts_with(BOM) {
            line.drain(..BOM.len());
        }
        line
    }
}

impl Iterator for Lines {
    type Item = std::io::Result<(u64, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        self.number += 1;
        loop {
            let chunk = match self.reader.fill_buf() {
                Ok(chunk) => chunk,
                Err(error) => return Some(Err(error)),
            };
            if chunk.is_empty() {
                return (!line.is_empty()).then(|| Ok((self.number, self.unmarked(line))));
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(chunk.len(), |end| end + 1);
            if line.len() <= self.most {
                line.extend_from_slice(&chunk[..taken]);
            }
            self.reader.consume(taken);
            if end.is_some() {
                return Some(Ok((self.number, self.unmarked(line))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bad_line_is_named_and_the_others_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let long = format!("{{\"content\": \"{}\"}}", "x".repeat(2 * MAX_LINE));
        let text = format!("\u{feff}{{\"content\": \"a\"}}\r\n\n{{\"text\": \"b\"}}\n{long}\n{{\"content\": \"c\"}}");
        std::fs::write(&path, text).unwrap();
        let scope = Scope {
            user: "ann".into(),
            ..Default::default()
        };
        let items: Vec<Item> = source(&path, Some(&scope)).unwrap().items.map(Result::unwrap).collect();
        let places: Vec<_> = items
            .iter()
            .map(|item| (item.place.as_str(), item.memory.is_ok()))
            .collect();
        assert_eq!(
            places,
            [("line 1", true), ("line 3", false), ("line 4", false), ("line 5", true)]
        );
        assert_eq!(items[3].memory.as_ref().unwrap().scope, Some(scope));
        assert!(items[1].memory.as_ref().unwrap_err().contains("text"));
    }
}
