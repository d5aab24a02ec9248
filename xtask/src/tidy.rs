//! What a reader relies on: one subject a file, a first line that says which, no drawers for odds and ends.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Near this length there is a second subject in the file.
const MAX_LINES: usize = 1000;
/// Names that say nothing.
const EMPTY_NAMES: [&str; 5] = ["utils", "util", "helpers", "common", "misc"];

/// Complains about files that break the rules of the house.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for folder in ["crates", "xtask"] {
        visit(&root.join(folder), &mut |path| {
            let shown = path.strip_prefix(root).unwrap_or(path).display().to_string();
            if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
                complaints.extend(source(&shown, &text));
            }
            Ok(())
        })?;
    }
    for needed in [
        "README.md",
        "ARCHITECTURE.md",
        "SPECIFICATION.md",
        "CHANGELOG.md",
        "deny.toml",
        ".ci/run",
    ] {
        if !root.join(needed).exists() {
            complaints.push(format!("{needed}: missing"));
        }
    }
    Ok(complaints)
}

fn source(shown: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        complaints.push(format!("{shown}: {lines} lines; look for the second subject"));
    }
    if !text.starts_with("//!") {
        complaints.push(format!(
            "{shown}: does not begin by saying what it is for (`//!`)"
        ));
    }
    let path = Path::new(shown);
    let stem = path
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    if EMPTY_NAMES.contains(&stem.as_str()) {
        complaints.push(format!("{shown}: a name that says nothing"));
    }
    for (number, line) in text.lines().enumerate() {
        if line.ends_with([' ', '\t']) {
            complaints.push(format!(
                "{shown}:{}: white space at the end of the line",
                number + 1
            ));
        }
    }
    complaints
}

fn visit(folder: &Path, file: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    for path in paths {
        if path.is_dir() {
            visit(&path, file)?;
        } else {
            file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_has_a_file_that_breaks_it() {
        let check = |shown: &str, text: &str, expected: usize| {
            assert_eq!(
                source(shown, text).len(),
                expected,
                "{shown}: {:?}",
                source(shown, text)
            );
        };
        check("crates/x/src/lib.rs", "//! For x.\n", 0);
        check("crates/x/src/lib.rs", "use x;\n", 1);
        check("crates/x/src/utils.rs", "//! Odds and ends.\n", 1);
        check("crates/x/src/lib.rs", "//! For x. \n", 1);
        check(
            "crates/x/src/lib.rs",
            &format!("//! For x.\n{}", "\n".repeat(MAX_LINES)),
            1,
        );
    }
}
