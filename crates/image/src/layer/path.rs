//! Names in a layer, taken apart and checked. Pure bytes: nothing is looked up anywhere.

use super::error::EntryProblem;

/// The longest name of one file (Linux `NAME_MAX`).
pub(super) const NAME_MAX: usize = 255;
/// The longest path and link target (Linux `PATH_MAX`, less its NUL).
pub(super) const PATH_MAX: usize = 4095;
/// The deepest folder. No package comes near; recursion over a tree may rely on it.
pub(super) const MAX_DEPTH: usize = 512;

/// Brings the name of an entry into the one form we use: parts joined by single `/`, no `.`, no `..`, nothing in front
/// or behind; empty for the root.
///
/// `a/../b` is `b`, as in Go's `filepath.Clean`, which every other OCI tool goes by; a name that leaves is refused.
pub(super) fn normalize(name: &[u8]) -> Result<Vec<u8>, EntryProblem> {
    if name.starts_with(b"/") {
        return Err(EntryProblem::Absolute);
    }
    if name.contains(&0) {
        return Err(EntryProblem::Nul);
    }
    if name.len() > PATH_MAX {
        return Err(EntryProblem::PathTooLong { limit: PATH_MAX });
    }
    let mut path = Vec::with_capacity(name.len());
    let mut depth = 0;
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if path.is_empty() {
                    return Err(EntryProblem::Climbs);
                }
                path.truncate(split(&path).0.len());
                depth -= 1;
            }
            _ if part.len() > NAME_MAX => return Err(EntryProblem::NameTooLong { limit: NAME_MAX }),
            _ => {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(part);
                depth += 1;
            }
        }
    }
    if depth > MAX_DEPTH {
        return Err(EntryProblem::TooDeep { limit: MAX_DEPTH });
    }
    Ok(path)
}

/// Splits a normalized path into its folder and its last part.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// The parts of a normalized path or of a link's target; empty ones and `.` are passed over.
pub(super) fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_form_or_are_refused() {
        let check = |name: &str, expected: Result<&str, EntryProblem>| {
            assert_eq!(
                normalize(name.as_bytes()),
                expected.map(|path| path.as_bytes().to_vec()),
                "{name:?}"
            );
        };
        check("", Ok(""));
        check("./", Ok(""));
        check("./etc//passwd", Ok("etc/passwd"));
        check("usr/./bin/", Ok("usr/bin"));
        check("a/../b", Ok("b"));
        check("a/b/../../c", Ok("c"));
        check("..a/...", Ok("..a/..."));
        check("/etc", Err(EntryProblem::Absolute));
        check("..", Err(EntryProblem::Climbs));
        check("./../x", Err(EntryProblem::Climbs));
        check("a/../../x", Err(EntryProblem::Climbs));
        check("a\0b", Err(EntryProblem::Nul));
        check(&"n".repeat(255), Ok(&"n".repeat(255)));
        check(&"n".repeat(256), Err(EntryProblem::NameTooLong { limit: 255 }));
        check(&"a/".repeat(2048), Err(EntryProblem::PathTooLong { limit: 4095 }));
        check(&"a/".repeat(513), Err(EntryProblem::TooDeep { limit: 512 }));
        check("é/\u{1}\n", Ok("é/\u{1}\n"));
    }

    #[test]
    fn a_path_splits_at_its_last_slash() {
        assert_eq!(split(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
        assert_eq!(split(b"a"), (&b""[..], &b"a"[..]));
        assert_eq!(parts(b"/a/./b//").collect::<Vec<_>>(), [b"a", b"b"]);
    }
}
