//! Words of commands inside of ssh_config(5), which OpenSSH splits itself (`KnownHostsCommand`) or gives to a shell
//! (`ProxyCommand`). Quoted so that both read the same.

use std::path::Path;

use crate::error::Failure;

/// One word of such a command.
pub(super) fn word(text: &str) -> Result<String, Failure> {
    // A backslash means something else to each of the two.
    if text.contains(|c: char| c.is_control() || c == '\\') {
        return Err(
            Failure::invalid(format!("`{text}` cannot stand in a configuration of ssh"))
                .hint("use a path without backslashes and control characters"),
        );
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return Ok(text.to_owned());
    }
    Ok(format!("'{}'", text.replace('\'', r"'\''").replace('%', "%%")))
}

/// The same for a path.
pub(super) fn path(path: &Path) -> Result<String, Failure> {
    match path.to_str() {
        Some(text) => word(text),
        None => Err(Failure::invalid(format!(
            "`{}` cannot stand in a configuration of ssh",
            path.display()
        ))
        .hint("use a path that is valid UTF-8")),
    }
}

/// The argument of a keyword that takes one word, such as `IdentityFile`.
pub(super) fn argument(path: &Path) -> Result<String, Failure> {
    let text = path
        .to_str()
        .filter(|text| !text.contains(|c: char| c.is_control() || c == '"' || c == '\\'));
    let Some(text) = text else {
        return Err(Failure::invalid(format!(
            "`{}` cannot stand in a configuration of ssh",
            path.display()
        ))
        .hint("use a path without quotes, backslashes and control characters"));
    };
    let text = text.replace('%', "%%");
    let quoted = text.contains(|c: char| c.is_whitespace() || c == '#' || c == '\'');
    Ok(if quoted { format!("\"{text}\"") } else { text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_when_they_must_be() {
        for (text, expected) in [
            ("/usr/bin/offshoot", "/usr/bin/offshoot"),
            ("/a b/c", "'/a b/c'"),
            ("it's", r"'it'\''s'"),
            ("50%", "'50%%'"),
            ("$(reboot);", "'$(reboot);'"),
            ("", "''"),
        ] {
            assert_eq!(word(text).unwrap(), expected);
        }
        for bad in ["a\nb", "a\\b"] {
            assert!(word(bad).is_err(), "{bad:?}");
            assert!(argument(Path::new(bad)).is_err(), "{bad:?}");
        }
        assert_eq!(argument(Path::new("/a b/50%")).unwrap(), "\"/a b/50%%\"");
        assert_eq!(argument(Path::new("/a/b")).unwrap(), "/a/b");
    }
}
