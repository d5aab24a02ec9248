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
        let name = link["ifname"].as_str().unwrap_or_default();
        let kind = link["linkinfo"]["info_kind"].as_str().unwrap_or_default();
        format!("{name} {kind}")
    });
    counting(links, scope)
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
