//! TAPs, bridges and other links, nftables tables, named network namespaces.

use std::path::Path;

use serde_json::Value;

use super::{Marks, Scope, said};
use crate::names;

/// Every link that counts, with its kind (`tun` for a TAP, `bridge`); empty for a real device.
pub(super) fn links(scope: Scope<'_>) -> Vec<String> {
    let said = said(scope, &["ip", "-json", "-details", "link", "show"]);
    let links: Value = serde_json::from_str(&said).expect("ip prints JSON");
    let links = links.as_array().expect("a list").iter().map(|link| {
        let name = without_number(link["ifname"].as_str().unwrap_or_default());
        let kind = link["linkinfo"]["info_kind"].as_str().unwrap_or_default();
        format!("{name} {kind}")
    });
    counting(links, scope)
}

/// An idle TAP without its number: one is as good as another, and which ones are idle changes with every start.
fn without_number(name: &str) -> &str {
    match name.strip_prefix("osp-") {
        Some(digits) if digits.len() == 11 => &name[..name.len() - 3],
        _ => name,
    }
}

pub(super) fn nft_tables(scope: Scope<'_>) -> Vec<String> {
    let said = said(scope, &["nft", "list", "tables"]);
    counting(said.lines().map(str::to_owned), scope)
}

pub(super) fn namespaces(marks: &Marks) -> Vec<String> {
    let mut names = names(Path::new("/run/netns"));
    names.retain(|name| marks.are_in(name));
    names
}

/// In a namespace of the daemon's own everything counts, else only what bears a mark.
fn counting(names: impl Iterator<Item = String>, scope: Scope<'_>) -> Vec<String> {
    names
        .filter(|name| scope.namespace.is_some() || scope.marks.are_in(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_taps_are_alike_and_others_are_not() {
        for (name, shown) in [
            ("osp-1a2b3c4d000", "osp-1a2b3c4d"),
            ("osp-1a2b3c4d0ff", "osp-1a2b3c4d"),
            ("osp-1a2b3c4d", "osp-1a2b3c4d"),
            ("os-0123456789ab", "os-0123456789ab"),
            ("ofs-1a2b3c4d", "ofs-1a2b3c4d"),
        ] {
            assert_eq!(without_number(name), shown);
        }
    }
}
