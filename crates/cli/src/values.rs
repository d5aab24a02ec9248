//! What single options may hold: environment variables, shared folders, enumerations of the API.

use std::path::{Component, Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use offshoot_model::{EnvVar, Mount};
use serde::de::DeserializeOwned;

use crate::error::Failure;

/// The longest environment file; a larger one is something else.
const MAX_ENV_FILE: u64 = 1 << 20;

/// A VM as users name it: a name, an id, or the beginning of an id.
pub(crate) fn vm_ref(text: &str) -> Result<String, String> {
    if text.is_empty() {
        Err("a VM has a name or an id".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

/// One of the API's words, with the words in the help.
pub(crate) fn api_words<T>(words: &[&'static str]) -> impl TypedValueParser<Value = T> + use<T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(words.to_vec())
        .try_map(|word| serde_json::from_value::<T>(serde_json::Value::String(word)))
}

/// `-e`: `NAME=VALUE`, or `NAME` for this program's own value.
pub(crate) fn env_arg(text: &str) -> Result<String, String> {
    let name = text.split_once('=').map_or(text, |(name, _)| name);
    if name.is_empty() || text.contains('\0') {
        return Err("write NAME=VALUE, or NAME to pass on its value".to_owned());
    }
    Ok(text.to_owned())
}

/// The variables of `--env-file` and `-e`, in the order in which later ones win.
pub(crate) fn environment(
    files: &[PathBuf],
    flags: &[String],
    own: impl Fn(&str) -> Option<String>,
) -> Result<Vec<EnvVar>, Failure> {
    let mut variables = Vec::new();
    for file in files {
        let cannot = || format!("cannot read the environment file `{}`", file.display());
        let size = std::fs::metadata(file)
            .map_err(|e| Failure::io(cannot(), &e))?
            .len();
        if size > MAX_ENV_FILE {
            return Err(Failure::invalid(cannot())
                .hint(format!("an environment file has at most {MAX_ENV_FILE} bytes")));
        }
        let text = std::fs::read_to_string(file).map_err(|e| Failure::io(cannot(), &e))?;
        for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let name = line.split_once('=').map_or(line, |(name, _)| name);
            if name.is_empty() || name.contains(char::is_whitespace) {
                let message = format!("line {} of `{}` is not NAME=VALUE", number + 1, file.display());
                return Err(Failure::invalid(message).hint("names have no spaces; values need no quotes"));
            }
            variables.extend(variable(line, &own)?);
        }
    }
    for flag in flags {
        variables.extend(variable(flag, &own)?);
    }
    Ok(variables)
}

/// `NAME` alone takes our own value, and is left out where we have none, as Docker does it.
fn variable(text: &str, own: impl Fn(&str) -> Option<String>) -> Result<Option<EnvVar>, Failure> {
    let whole = match text.contains('=') {
        true => text.to_owned(),
        false => match own(text) {
            Some(value) => format!("{text}={value}"),
            None => return Ok(None),
        },
    };
    let parsed = whole
        .parse()
        .map_err(|e| Failure::invalid("cannot use an environment variable").caused_by(&e))?;
    Ok(Some(parsed))
}

/// `-v`: `HOST:GUEST[:ro|rw]`.
pub(crate) fn mount(text: &str) -> Result<Mount, String> {
    let cwd = std::env::current_dir().map_err(|e| format!("cannot tell the current folder: {e}"))?;
    mount_at(text, &cwd)
}

fn mount_at(text: &str, cwd: &Path) -> Result<Mount, String> {
    let mut parts = text.split(':');
    let (Some(source), Some(target)) = (parts.next(), parts.next()) else {
        return Err("write HOST:GUEST or HOST:GUEST:ro".to_owned());
    };
    let read_only = match (parts.next(), parts.next()) {
        (None | Some("rw"), None) => false,
        (Some("ro"), None) => true,
        (Some(option), None) => return Err(format!("`{option}` is neither `ro` nor `rw`")),
        _ => return Err("write HOST:GUEST or HOST:GUEST:ro".to_owned()),
    };
    if !source.starts_with(['/', '.']) {
        return Err(format!(
            "`{source}` is not a path: write `./{source}` for a folder here"
        ));
    }
    if !target.starts_with('/') || Path::new(target).components().any(|c| c == Component::ParentDir) {
        return Err(format!("`{target}` is not an absolute path in the guest"));
    }
    let target: PathBuf = Path::new(target).components().collect();
    if target == Path::new("/") {
        return Err("a folder cannot be shared as the guest's root".to_owned());
    }
    // `join` keeps `..`: what it means depends on symlinks, which the daemon resolves.
    let source = cwd
        .join(source)
        .components()
        .filter(|c| *c != Component::CurDir)
        .collect();
    Ok(Mount {
        source,
        target,
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn shared_folders() {
        let check = |text: &str, expected: Result<(&str, &str, bool), ()>| {
            let parsed = mount_at(text, Path::new("/home/me"));
            let expected = expected.map(|(source, target, read_only)| Mount {
                source: source.into(),
                target: target.into(),
                read_only,
            });
            assert_eq!(parsed.map_err(drop), expected, "{text}");
        };
        check("/src:/dst", Ok(("/src", "/dst", false)));
        check("/src:/dst:ro", Ok(("/src", "/dst", true)));
        check("/src/:/dst/:rw", Ok(("/src", "/dst", false)));
        check("./x:/x", Ok(("/home/me/x", "/x", false)));
        check(".:/x", Ok(("/home/me", "/x", false)));
        check("../y:/x", Ok(("/home/me/../y", "/x", false)));
        for bad in [
            "",
            "/src",
            "name:/x",
            "/s:",
            ":/d",
            "/s:d",
            "/s:/",
            "/s:/a/../b",
            "/s:/d:z",
            "/s:/d:ro:x",
        ] {
            check(bad, Err(()));
        }
    }

    #[test]
    fn variables_come_from_files_flags_and_ourselves() {
        let own = |name: &str| (name == "HOME").then(|| "/home/me".to_owned());
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(
            file,
            "\u{feff}# a comment\n\nA=1\n  B= two words \nHOME\nNOT_SET\nC=\"kept\"\n"
        )
        .unwrap();
        let flags = ["A=2", "HOME", "NOT_SET", "E="].map(String::from);
        let variables = environment(&[file.path().to_owned()], &flags, own).unwrap();
        let texts: Vec<String> = variables.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "A=1",
                "B= two words ",
                "HOME=/home/me",
                "C=\"kept\"",
                "A=2",
                "HOME=/home/me",
                "E="
            ]
        );
        let mut bad = tempfile::NamedTempFile::new().unwrap();
        writeln!(bad, "A B=1").unwrap();
        assert!(environment(&[bad.path().to_owned()], &[], own).is_err());
        assert!(environment(&["/nonexistent/env".into()], &[], own).is_err());
    }

    #[test]
    fn flags_without_a_name_are_refused() {
        for (text, good) in [
            ("A=1", true),
            ("A", true),
            ("A=", true),
            ("", false),
            ("=1", false),
        ] {
            assert_eq!(env_arg(text).is_ok(), good, "{text}");
        }
    }
}
