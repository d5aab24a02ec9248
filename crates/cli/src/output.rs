//! Results on standard output: lines, JSON, and tables as Docker draws them.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::error::Failure;

/// How results are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs: the API's own JSON.
    Json,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArgs {
    /// How to show the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) output: Output,
}

/// Writes one line, or several, and their end.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| {
            if text.ends_with('\n') || text.is_empty() {
                Ok(())
            } else {
                stdout.write_all(b"\n")
            }
        })
        .and_then(|()| stdout.flush())
        .map_err(|e| Failure::write(&e))
}

/// Writes a value as JSON that people can read as well.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::invalid("cannot write the result as JSON").caused_by(&e))?;
    line(&text)
}

/// Says something beside the result, on standard error.
pub(crate) fn note(text: &str) {
    // Nothing is left to do when standard error is closed.
    let _ = writeln!(io::stderr(), "{}", clean(text));
}

/// Writes lines beside the result, on standard error.
pub(crate) fn aside(text: &str) {
    // Nothing is left to do when standard error is closed.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// A table without borders: columns three spaces apart, nothing at the ends of lines.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .force_no_tty();
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)).collect::<Vec<_>>());
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
        .lines()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect()
}

/// `text` with control characters written out, so that what an image or a guest says cannot steer a terminal.
pub(crate) fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            cleaned.extend(c.escape_debug());
        } else {
            cleaned.push(c);
        }
    }
    cleaned
}

/// At most `most` characters, the last one being `…` when some were left out.
pub(crate) fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_look_like_dockers() {
        let rows = [
            vec!["web".into(), "a\u{1b}[31m".into()],
            vec!["a-longer-name".into(), String::new()],
        ];
        insta::assert_snapshot!(table(&["NAME", "STATUS"], rows), @r"
        NAME            STATUS
        web             a\u{1b}[31m
        a-longer-name
        ");
        assert_eq!(table(&["NAME", "ID"], []), "NAME   ID\n");
    }

    #[test]
    fn long_texts_are_cut_with_a_mark() {
        for (text, expected) in [
            ("", ""),
            ("abc", "abc"),
            ("abcd", "abcd"),
            ("abcde", "abc…"),
            ("äöüßé", "äöü…"),
        ] {
            assert_eq!(shorten(text, 4), expected);
        }
    }
}
