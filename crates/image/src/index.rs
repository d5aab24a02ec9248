//! Which image of an index a machine runs: a pure choice.

use crate::manifest::IndexEntry;
use crate::platform::Platform;

/// How many indexes deep an image may lie: a layout's `index.json` names an index that names images. No tool nests deeper.
pub(crate) const MAX_DEPTH: usize = 2;

/// The entries worth following for `wanted`, best first: those of the very platform, then those that do not say theirs, such as
/// nested indexes. Empty when every entry says that it is for something else.
pub(crate) fn candidates<'e>(entries: &'e [IndexEntry], wanted: &Platform) -> Vec<&'e IndexEntry> {
    let exact = |entry: &&IndexEntry| {
        entry
            .platform
            .as_ref()
            .is_some_and(|p| p.variant == wanted.variant)
    };
    let fits = |entry: &&IndexEntry| entry.platform.as_ref().is_some_and(|p| wanted.accepts(p));
    let (mut best, loose): (Vec<_>, Vec<_>) = entries.iter().filter(fits).partition(exact);
    best.extend(loose);
    best.extend(entries.iter().filter(|entry| entry.platform.is_none()));
    best
}

/// The platforms that an index offers, for messages. Attestations, which BuildKit files under `unknown/unknown`, are none.
pub(crate) fn offered(entries: &[IndexEntry]) -> Vec<String> {
    let mut platforms: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        .map(ToString::to_string)
        .collect();
    platforms.retain(|platform| !platform.starts_with("unknown/"));
    platforms.sort();
    platforms.dedup();
    platforms
}

/// The end of a message about a missing platform.
pub(crate) fn list(offered: &[String]) -> String {
    if offered.is_empty() {
        "nothing else".into()
    } else {
        offered.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use offshoot_model::Digest;

    use super::*;
    use crate::manifest::Blob;

    fn entries(platforms: &[&str]) -> Vec<IndexEntry> {
        let entry = |(i, platform): (usize, &&str)| IndexEntry {
            blob: Blob {
                digest: Digest::from_bytes([0; 32]),
                size: i as u64,
            },
            platform: platform.parse().ok(),
            annotations: HashMap::new(),
        };
        platforms.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn the_right_platform_comes_first() {
        let check = |platforms: &[&str], wanted: &str, expected: &[u64]| {
            let entries = entries(platforms);
            let found = candidates(&entries, &wanted.parse().unwrap());
            assert_eq!(
                found.iter().map(|e| e.blob.size).collect::<Vec<_>>(),
                expected,
                "{platforms:?} {wanted}"
            );
        };
        check(
            &["linux/arm64", "linux/amd64", "unknown/unknown"],
            "linux/amd64",
            &[1],
        );
        check(&["linux/amd64/v3", "linux/amd64"], "linux/amd64", &[1, 0]);
        check(&["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7", &[1]);
        check(&["", "linux/amd64"], "linux/amd64", &[1, 0]);
        check(&["", "linux/arm64"], "linux/amd64", &[0]);
        check(&["linux/arm64"], "linux/amd64", &[]);
        check(&[], "linux/amd64", &[]);
    }

    #[test]
    fn what_is_offered_is_listed_once() {
        let entries = entries(&["linux/arm64", "unknown/unknown", "linux/amd64", "linux/arm64", ""]);
        assert_eq!(list(&offered(&entries)), "linux/amd64, linux/arm64");
        assert_eq!(list(&[]), "nothing else");
    }
}
