//! Cloud Hypervisor's command line as a typed list, and its encoding.
//!
//! A value that follows a flag is one argument, `key=value,key=value`. Double quotes keep commas, brackets and outer
//! spaces of a value together; lists stand in brackets (its `option_parser/src/lib.rs`, `split_commas`, `dequote`). All
//! values of one flag follow it as arguments of their own (clap, `num_args(1..)`).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// A command line under construction. A flag stands in it at most once, whatever is added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    flags: Vec<(&'static str, Vec<Argument>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Argument {
    Plain(OsString),
    Options(Options),
}

/// The `key=value` list of one device or setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pairs: Vec<(&'static str, Value)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    /// No value: the key alone.
    None,
    Text(OsString),
    Numbers(Vec<i32>),
    /// Ids, each with a number.
    Numbered(Vec<(String, i32)>),
}

/// Why a value cannot be given to Cloud Hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} cannot be a value of `--{flag}`: {why}")]
pub struct OptionsError {
    /// The flag.
    pub flag: &'static str,
    /// The value.
    pub value: OsString,
    /// What is wrong with it.
    pub why: &'static str,
}

impl Options {
    /// No options yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `key=value`.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.pairs.push((key, Value::Text(value.as_ref().to_owned())));
        self
    }

    /// Adds `key=on` or `key=off`.
    #[must_use]
    pub fn with_switch(self, key: &'static str, on: bool) -> Self {
        self.with(key, if on { "on" } else { "off" })
    }

    /// Adds `key=[number,…]`.
    #[must_use]
    pub fn with_numbers(mut self, key: &'static str, numbers: &[i32]) -> Self {
        self.pairs.push((key, Value::Numbers(numbers.to_vec())));
        self
    }

    /// Adds `key=[id@[number],…]`; ids are of letters and digits.
    #[must_use]
    pub fn with_numbered(mut self, key: &'static str, numbered: Vec<(String, i32)>) -> Self {
        self.pairs.push((key, Value::Numbered(numbered)));
        self
    }

    /// Adds a key that takes no value.
    #[must_use]
    pub fn with_word(mut self, key: &'static str) -> Self {
        self.pairs.push((key, Value::None));
        self
    }

    fn encode(&self, flag: &'static str) -> Result<String, OptionsError> {
        let mut out = String::new();
        for (key, value) in &self.pairs {
            if !out.is_empty() {
                out.push(',');
            }
            out.push_str(key);
            match value {
                Value::None => {}
                Value::Text(text) => {
                    out.push('=');
                    let text = checked(flag, text)?;
                    if text.contains('"') {
                        let why = "a double quote would end its quotes";
                        return Err(refused(flag, text.as_ref(), why));
                    }
                    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+=@%".contains(c);
                    if !text.is_empty() && text.chars().all(plain) {
                        out.push_str(text);
                    } else {
                        out.extend(["\"", text, "\""]);
                    }
                }
                Value::Numbers(numbers) => {
                    let numbers: Vec<_> = numbers.iter().map(i32::to_string).collect();
                    out.extend(["=[", &numbers.join(","), "]"]);
                }
                Value::Numbered(numbered) => {
                    let pairs = numbered.iter().map(|(id, number)| format!("{id}@[{number}]"));
                    out.extend(["=[", &pairs.collect::<Vec<_>>().join(","), "]"]);
                }
            }
        }
        Ok(out)
    }
}

fn refused(flag: &'static str, value: &OsStr, why: &'static str) -> OptionsError {
    OptionsError {
        flag,
        value: value.to_owned(),
        why,
    }
}

/// The value as text. Its arguments must be UTF-8, and its messages are lines.
fn checked<'a>(flag: &'static str, value: &'a OsStr) -> Result<&'a str, OptionsError> {
    if value.as_bytes().iter().any(u8::is_ascii_control) {
        return Err(refused(flag, value, "it holds a control character"));
    }
    value
        .to_str()
        .ok_or_else(|| refused(flag, value, "it is not UTF-8"))
}

impl CommandLine {
    /// Adds `--flag value`, where the value is taken as it is.
    pub fn plain(&mut self, flag: &'static str, value: impl AsRef<OsStr>) {
        self.add(flag, Argument::Plain(value.as_ref().to_owned()));
    }

    /// Adds one more value of options to `--flag`.
    pub fn options(&mut self, flag: &'static str, options: Options) {
        self.add(flag, Argument::Options(options));
    }

    fn add(&mut self, flag: &'static str, argument: Argument) {
        match self.flags.iter_mut().find(|(name, _)| *name == flag) {
            Some((_, arguments)) => arguments.push(argument),
            None => self.flags.push((flag, vec![argument])),
        }
    }

    /// The arguments, without the program's name.
    pub fn encode(&self) -> Result<Vec<OsString>, OptionsError> {
        let mut out = Vec::new();
        for (flag, arguments) in &self.flags {
            out.push(format!("--{flag}").into());
            for argument in arguments {
                out.push(match argument {
                    Argument::Plain(value) => {
                        if checked(flag, value)?.starts_with('-') {
                            return Err(refused(flag, value, "it would be read as a flag"));
                        }
                        value.clone()
                    }
                    Argument::Options(options) => options.encode(flag)?.into(),
                });
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::ffi::OsStringExt;

    use proptest::prelude::*;

    use super::*;

    /// Arguments as clap reads them: a flag, and what follows up to the next one.
    pub(crate) fn read_flags(words: &[OsString]) -> Vec<(String, Vec<String>)> {
        let mut flags: Vec<(String, Vec<String>)> = Vec::new();
        for word in words {
            let word = word.to_str().expect("UTF-8");
            match (word.strip_prefix("--"), flags.last_mut()) {
                (Some(flag), _) => flags.push((flag.to_owned(), Vec::new())),
                (None, Some((_, values))) => {
                    assert!(!word.starts_with('-'), "{word:?} is read as a flag");
                    values.push(word.to_owned());
                }
                (None, None) => panic!("{word:?} follows no flag"),
            }
        }
        flags
    }

    /// Options as Cloud Hypervisor's parser reads them: split at commas outside quotes and brackets, split at the first
    /// equals sign, trim the value, and take its quotes off.
    pub(crate) fn read_options(text: &str) -> Vec<(String, String)> {
        let (mut parts, mut brackets, mut quoted) = (vec![String::new()], 0u32, false);
        for c in text.trim().chars() {
            match c {
                '"' => quoted = !quoted,
                '[' if !quoted => brackets += 1,
                ']' if !quoted => brackets = brackets.checked_sub(1).expect("a bracket to close"),
                ',' if !quoted && brackets == 0 => {
                    parts.push(String::new());
                    continue;
                }
                _ => {}
            }
            parts.last_mut().expect("one").push(c);
        }
        assert!(!quoted && brackets == 0, "unbalanced: {text}");
        let pair = |part: &String| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            (key.to_owned(), dequote(value.trim()))
        };
        parts.iter().map(pair).collect()
    }

    fn dequote(text: &str) -> String {
        let (mut out, mut quoted, mut before) = (String::new(), false, '\0');
        for c in text.chars() {
            if c == '"' {
                if before == '"' && !quoted {
                    out.push('"');
                }
                quoted = !quoted;
            } else {
                out.push(c);
            }
            before = c;
        }
        out
    }

    fn encode(value: &OsStr) -> Result<String, OptionsError> {
        let mut line = CommandLine::default();
        line.options("fs", Options::new().with("socket", value).with("tag", "t"));
        Ok(line.encode()?[1].clone().into_string().expect("UTF-8"))
    }

    proptest! {
        #[test]
        fn every_value_is_read_back_or_refused(value in "[^\\x00-\\x1f\\x7f]{0,12}|[,=\\[\\] \"]{0,6}") {
            match encode(value.as_ref()) {
                Ok(text) => {
                    let expected = [("socket".to_owned(), value), ("tag".to_owned(), "t".to_owned())];
                    prop_assert_eq!(read_options(&text), expected);
                }
                Err(error) => prop_assert!(value.contains('"'), "{}", error),
            }
        }
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        for bad in [&b"a\nb"[..], b"a\"b", b"\x7f", b"\xff", b"\0"] {
            let bad = OsString::from_vec(bad.to_vec());
            let error = encode(&bad).unwrap_err();
            assert_eq!((error.flag, error.value), ("fs", bad));
        }
        for bad in ["-x", "--fs", "a\tb"] {
            let mut line = CommandLine::default();
            line.plain("cmdline", bad);
            assert!(line.encode().is_err(), "{bad}");
        }
    }

    #[test]
    fn all_values_of_a_flag_follow_it_once() {
        let mut line = CommandLine::default();
        for tag in ["root", "a,b", "c"] {
            line.options("fs", Options::new().with("tag", tag));
            line.plain("kernel", "/k");
        }
        line.options(
            "net",
            Options::new()
                .with_numbers("fd", &[20, 21])
                .with_switch("iommu", false),
        );
        line.options("console", Options::new().with_word("off"));
        let expected = [
            "--fs",
            "tag=root",
            "tag=\"a,b\"",
            "tag=c",
            "--kernel",
            "/k",
            "/k",
            "/k",
            "--net",
            "fd=[20,21],iommu=off",
            "--console",
            "off",
        ];
        assert_eq!(line.encode().unwrap(), expected);
    }
}
