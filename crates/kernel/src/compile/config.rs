//! The configuration of a guest's kernel, as fragments of Kconfig's format: read, merged, and looked for in what came
//! out. Pure.
//!
//! ```text
//! CONFIG_EROFS_FS=y            an option on, or with a number or a string
//! # CONFIG_VT is not set       an option off
//! # anything else              a comment
//! ```
//!
//! Kconfig drops a line in silence when the option does not exist in this release, or what it depends on is off. A
//! guest would miss it in ways that are hard to trace, so [`lost`] says what was dropped.

use std::collections::BTreeMap;

/// What every kernel that we build has.
pub(crate) const GUEST: &str = include_str!("guest.config");
/// The longest fragment that is read: ours has 30 KiB, a distribution's whole configuration 280.
pub const FRAGMENT_MAX: u64 = 1 << 20;

/// A line of a fragment that says nothing that we understand.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the configuration fragment {what}: `{text}`")]
pub struct FragmentError {
    /// Which line, counted from 1.
    line: usize,
    /// What is wrong with it.
    what: &'static str,
    /// The line, shortened.
    text: String,
}

/// What one line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said<'a> {
    /// An option's value; `None` is off.
    Option(&'a str, Option<&'a str>),
    Comment,
    Nonsense(&'static str),
}

fn read(line: &str) -> Said<'_> {
    if let Some(comment) = line.strip_prefix('#') {
        let option = comment.trim().strip_suffix(" is not set");
        return match option.filter(|name| is_option(name)) {
            Some(name) => Said::Option(name, None),
            None => Said::Comment,
        };
    }
    if line.trim().is_empty() {
        return Said::Comment;
    }
    match line.trim().split_once('=') {
        Some((name, _)) if !is_option(name) => Said::Nonsense("names no option"),
        Some((name, "n")) => Said::Option(name, None),
        Some((_, "m")) => Said::Nonsense("asks for a module, and guests get none: write `=y`"),
        Some((name, value)) if is_value(value) => Said::Option(name, Some(value)),
        Some(_) => Said::Nonsense("has a value that is neither y, n, a number nor a string in quotes"),
        None => Said::Nonsense("is not like `CONFIG_NAME=y`"),
    }
}

fn is_option(name: &str) -> bool {
    name.strip_prefix("CONFIG_").is_some_and(|rest| {
        !rest.is_empty() && rest.len() <= 100 && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    })
}

fn is_value(value: &str) -> bool {
    let digits = value.strip_prefix('-').unwrap_or(value);
    let is_number = |digits: &str, is_digit: fn(&u8) -> bool| {
        !digits.is_empty() && digits.len() <= 20 && digits.as_bytes().iter().all(is_digit)
    };
    let quoted = |value: &str| value.strip_prefix('"')?.strip_suffix('"').map(str::to_owned);
    value == "y"
        || is_number(digits, u8::is_ascii_digit)
        || value
            .strip_prefix("0x")
            .is_some_and(|digits| is_number(digits, u8::is_ascii_hexdigit))
        || quoted(value)
            .is_some_and(|text| !text.contains(['"', '\\', '$']) && !text.contains(char::is_control))
}

/// `base` with what `more` says otherwise. The result is a fragment that names every option once.
pub(crate) fn merge(base: &str, more: &str) -> Result<String, FragmentError> {
    let mut wanted = BTreeMap::new();
    for (n, line) in more.lines().enumerate() {
        match read(line) {
            Said::Option(name, value) => {
                wanted.insert(name, value);
            }
            Said::Comment => {}
            Said::Nonsense(what) => {
                return Err(FragmentError {
                    line: n + 1,
                    what,
                    text: line.trim().chars().filter(|c| !c.is_control()).take(80).collect(),
                });
            }
        }
    }
    let mut merged = String::new();
    for line in base.lines() {
        match read(line) {
            Said::Option(name, _) if wanted.contains_key(name) => {}
            _ => {
                merged.push_str(line);
                merged.push('\n');
            }
        }
    }
    for (name, value) in wanted {
        merged.push_str(&written(name, value));
        merged.push('\n');
    }
    Ok(merged)
}

fn written(name: &str, value: Option<&str>) -> String {
    match value {
        Some(value) => format!("{name}={value}"),
        None => format!("# {name} is not set"),
    }
}

/// What `fragment` asks for and `config`, which Kconfig wrote, has not; as the fragment writes it.
pub(crate) fn lost(fragment: &str, config: &str) -> Vec<String> {
    let has: BTreeMap<_, _> = config
        .lines()
        .filter_map(|line| match read(line) {
            Said::Option(name, value) => Some((name, value)),
            Said::Comment | Said::Nonsense(_) => None,
        })
        .collect();
    fragment
        .lines()
        .filter_map(|line| match read(line) {
            // An option that does not exist, or whose menu is off, is as good as off.
            Said::Option(name, value) if has.get(name).copied().flatten() != value => {
                Some(written(name, value))
            }
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_line_says_one_thing() {
        let check = |line: &str, expected: Said| assert_eq!(read(line), expected, "{line}");
        check("CONFIG_A=y", Said::Option("CONFIG_A", Some("y")));
        check("  CONFIG_9P_FS=y  ", Said::Option("CONFIG_9P_FS", Some("y")));
        check("CONFIG_A=n", Said::Option("CONFIG_A", None));
        check("# CONFIG_A is not set", Said::Option("CONFIG_A", None));
        check("CONFIG_A=-1", Said::Option("CONFIG_A", Some("-1")));
        check("CONFIG_A=0x1F", Said::Option("CONFIG_A", Some("0x1F")));
        check("CONFIG_A=\"a,b c\"", Said::Option("CONFIG_A", Some("\"a,b c\"")));
        for comment in ["", "  ", "# text", "#CONFIG_A=y", "# A is not set"] {
            check(comment, Said::Comment);
        }
        let is_nonsense = |line: &str| matches!(read(line), Said::Nonsense(_));
        for line in [
            "CONFIG_A",
            "A=y",
            "CONFIG_=y",
            "CONFIG_A=m",
            "CONFIG_A=",
            "CONFIG_A=yes",
            "CONFIG_A=\"",
            "CONFIG_A=0x",
            "CONFIG_A=\"$(shell id)\"",
            "CONFIG_A-B=y",
            "include x",
        ] {
            assert!(is_nonsense(line), "{line}");
        }
    }

    #[test]
    fn the_users_lines_win_and_nothing_is_said_twice() {
        let base = "# a\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=1\n";
        let merged = merge(base, "CONFIG_B=y\n\nCONFIG_A=n\nCONFIG_D=y\nCONFIG_D=2\n").unwrap();
        assert_eq!(
            merged,
            "# a\nCONFIG_C=1\n# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_D=2\n"
        );
        assert_eq!(merge(base, "").unwrap(), base);
        let error = merge(base, "CONFIG_A=y\nCONFIG_B=m\n").unwrap_err().to_string();
        assert_eq!(
            error,
            "line 2 of the configuration fragment asks for a module, and guests get none: write `=y`: `CONFIG_B=m`"
        );
    }

    #[test]
    fn what_was_dropped_is_told() {
        let fragment =
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"x\"\nCONFIG_D=4\n# CONFIG_E is not set\n";
        let config = "CONFIG_A=y\nCONFIG_C=\"x\"\nCONFIG_D=4\n";
        assert_eq!(lost(fragment, config), [""; 0]);
        let config = "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=\"y\"\nCONFIG_Z=y\n";
        assert_eq!(
            lost(fragment, config),
            [
                "CONFIG_A=y",
                "# CONFIG_B is not set",
                "CONFIG_C=\"x\"",
                "CONFIG_D=4"
            ]
        );
    }

    #[test]
    fn our_fragment_is_clean_and_has_what_no_guest_can_do_without() {
        let mut names = BTreeSet::new();
        for line in GUEST.lines() {
            match read(line) {
                Said::Option(name, _) => assert!(names.insert(name), "{name} is there twice"),
                Said::Comment => {}
                Said::Nonsense(what) => panic!("{line}: {what}"),
            }
        }
        assert_eq!(merge(GUEST, "").unwrap(), GUEST);
        // Every driver of the plan for modules, so that it plans none.
        for (_, _, option, _) in crate::modules::DRIVERS {
            assert!(
                GUEST.lines().any(|line| line == format!("{option}=y")),
                "{option}"
            );
        }
        for option in ["CONFIG_PVH=y", "CONFIG_IKCONFIG=y", "# CONFIG_MODULES is not set"] {
            assert!(GUEST.lines().any(|line| line == option), "{option}");
        }
    }
}
