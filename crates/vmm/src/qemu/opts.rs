//! QEMU's command line as a typed list, and its one encoding rule: in `key=value,key=value`, a comma in a value is
//! written twice (QEMU's `util/qemu-option.c`, `util/keyval.c`).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// A command line under construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    args: Vec<Arg>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Arg {
    Flag(&'static str),
    Value(&'static str, OsString),
    Opts(&'static str, Opts),
}

/// The `key=value` list of one option. The first word may stand without its key, as in `-device virtio-rng-pci`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opts {
    first: Option<&'static str>,
    pairs: Vec<(String, OsString)>,
}

/// Why a value cannot be given to QEMU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} holds a control character and cannot be a value of `-{option}`")]
pub struct OptsError {
    /// The option.
    pub option: &'static str,
    /// The value.
    pub value: OsString,
}

impl Opts {
    /// A list that starts with a bare word.
    pub fn of(first: &'static str) -> Self {
        Self {
            first: Some(first),
            pairs: Vec::new(),
        }
    }

    /// A list of pairs alone.
    pub fn pairs() -> Self {
        Self {
            first: None,
            pairs: Vec::new(),
        }
    }

    /// Adds `key=value`.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl AsRef<OsStr>) -> Self {
        self.pairs.push((key.into(), value.as_ref().to_owned()));
        self
    }

    /// Adds `key=on` or `key=off`.
    #[must_use]
    pub fn with_switch(self, key: impl Into<String>, on: bool) -> Self {
        self.with(key, if on { "on" } else { "off" })
    }

    fn encode(&self) -> OsString {
        let mut text = Vec::new();
        if let Some(first) = self.first {
            text.extend_from_slice(first.as_bytes());
        }
        for (key, value) in &self.pairs {
            if !text.is_empty() {
                text.push(b',');
            }
            text.extend_from_slice(key.as_bytes());
            text.push(b'=');
            for byte in value.as_bytes() {
                text.push(*byte);
                if *byte == b',' {
                    text.push(b',');
                }
            }
        }
        OsString::from_vec(text)
    }
}

impl CommandLine {
    /// Adds `-flag`.
    pub fn flag(&mut self, name: &'static str) {
        self.args.push(Arg::Flag(name));
    }

    /// Adds `-name value`, where QEMU takes the value as it is.
    pub fn value(&mut self, name: &'static str, value: impl AsRef<OsStr>) {
        self.args.push(Arg::Value(name, value.as_ref().to_owned()));
    }

    /// Adds `-name key=value,…`.
    pub fn opts(&mut self, name: &'static str, opts: Opts) {
        self.args.push(Arg::Opts(name, opts));
    }

    /// The arguments, without the program's name. Refuses control characters: QEMU's own messages and logs are lines.
    pub fn encode(&self) -> Result<Vec<OsString>, OptsError> {
        let mut out = Vec::with_capacity(2 * self.args.len());
        let check = |option, value: &OsStr| {
            if value.as_bytes().iter().any(u8::is_ascii_control) {
                return Err(OptsError {
                    option,
                    value: value.to_owned(),
                });
            }
            Ok(())
        };
        for arg in &self.args {
            match arg {
                Arg::Flag(name) => out.push(format!("-{name}").into()),
                Arg::Value(name, value) => {
                    check(name, value)?;
                    out.push(format!("-{name}").into());
                    out.push(value.clone());
                }
                Arg::Opts(name, opts) => {
                    for (_, value) in &opts.pairs {
                        check(name, value)?;
                    }
                    out.push(format!("-{name}").into());
                    out.push(opts.encode());
                }
            }
        }
        Ok(out)
    }
}

/// Reads a list back, as QEMU does: a value ends at a comma that is not doubled, and the first word may stand without
/// a key. A later word without a key is a switch, and gets the value `on`. For the fake VMM and for tests.
pub fn read_opts(text: &OsStr) -> Vec<(Option<String>, OsString)> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let end = rest
            .iter()
            .position(|b| matches!(b, b'=' | b','))
            .unwrap_or(rest.len());
        let has_value = rest.get(end) == Some(&b'=');
        if !has_value && !out.is_empty() {
            out.push((
                Some(String::from_utf8_lossy(&rest[..end]).into_owned()),
                "on".into(),
            ));
            rest = rest.get(end + 1..).unwrap_or_default();
            continue;
        }
        let key = has_value.then(|| String::from_utf8_lossy(&rest[..end]).into_owned());
        if has_value {
            rest = &rest[end + 1..];
        }
        let mut value = Vec::new();
        let mut at = 0;
        while at < rest.len() {
            if rest[at] == b',' {
                if rest.get(at + 1) != Some(&b',') {
                    break;
                }
                at += 1;
            }
            value.push(rest[at]);
            at += 1;
        }
        rest = rest.get(at + 1..).unwrap_or_default();
        out.push((key, OsString::from_vec(value)));
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_value_is_read_back(values in prop::collection::vec("[^\\x00-\\x1f\\x7f]{0,12}|[,=]{0,6}", 0..6)) {
            let mut opts = Opts::of("first");
            let mut expected = vec![(None, OsString::from("first"))];
            for (n, value) in values.iter().enumerate() {
                opts = opts.with(format!("k{n}"), value);
                expected.push((Some(format!("k{n}")), value.into()));
            }
            let mut line = CommandLine::default();
            line.opts("device", opts);
            let encoded = line.encode().unwrap();
            prop_assert_eq!(read_opts(&encoded[1]), expected);
        }
    }

    #[test]
    fn control_characters_are_refused() {
        for bad in ["a\nb", "\0", "\x7f", "\t"] {
            let mut line = CommandLine::default();
            line.opts("device", Opts::of("x").with("k", bad));
            assert_eq!(line.encode().unwrap_err().option, "device");
            let mut line = CommandLine::default();
            line.value("append", bad);
            assert_eq!(line.encode().unwrap_err().option, "append");
        }
    }

    #[test]
    fn options_are_split_as_qemu_does() {
        let check = |text: &str, expected: &[(Option<&str>, &str)]| {
            let expected: Vec<_> = expected
                .iter()
                .map(|(key, value)| (key.map(str::to_owned), OsString::from(value)))
                .collect();
            assert_eq!(read_opts(OsStr::new(text)), expected, "{text}");
        };
        check("", &[]);
        check("tap", &[(None, "tap")]);
        check(
            "socket,id=a,server=on",
            &[(None, "socket"), (Some("id"), "a"), (Some("server"), "on")],
        );
        check(
            "socket,server,id=a",
            &[(None, "socket"), (Some("server"), "on"), (Some("id"), "a")],
        );
        check(
            "path=/a,,b=c,,,x=1",
            &[(Some("path"), "/a,b=c,"), (Some("x"), "1")],
        );
        check("romfile=,mac=2", &[(Some("romfile"), ""), (Some("mac"), "2")]);
    }

    #[test]
    fn commas_are_doubled_and_nothing_else_is_touched() {
        let mut line = CommandLine::default();
        line.flag("nodefaults");
        line.value("append", "a=b,c");
        line.opts(
            "x",
            Opts::pairs()
                .with("a", "1,2")
                .with_switch("b", true)
                .with("c", ""),
        );
        assert_eq!(
            line.encode().unwrap(),
            ["-nodefaults", "-append", "a=b,c", "-x", "a=1,,2,b=on,c="]
        );
    }
}
