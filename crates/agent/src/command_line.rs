//! What the VMM's driver tells the guest of its machine, on the kernel's command line (`docs/formats/kernel.md`).

use std::fs;

/// The machine can be reset and not switched off.
pub(crate) const OFF_BY_RESET: &str = "offshoot.off=reset";
/// The serials of the disks in their order, where the disks themselves have none: `root,overlay,work`.
pub(crate) const DISKS: &str = "offshoot.disks=";

/// The kernel's command line.
fn text() -> String {
    fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

/// Whether a word stands in it.
pub(crate) fn has(word: &str) -> bool {
    text().split_ascii_whitespace().any(|other| other == word)
}

/// Whether a word begins so.
pub(crate) fn has_prefix(start: &str) -> bool {
    text()
        .split_ascii_whitespace()
        .any(|word| word.starts_with(start))
}

/// What follows `start`, item by item; nothing where it does not stand there.
pub(crate) fn list(start: &str) -> Vec<String> {
    list_in(&text(), start)
}

fn list_in(text: &str, start: &str) -> Vec<String> {
    let found = text
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix(start));
    let items = found.into_iter().flat_map(|items| items.split(','));
    items.filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read() {
        let text = "quiet offshoot.disks=root,over-lay,work console=ttyS0\n";
        assert_eq!(list_in(text, DISKS), ["root", "over-lay", "work"]);
        assert!(list_in("quiet", DISKS).is_empty());
        assert!(list_in("offshoot.disks=", DISKS).is_empty());
    }
}
