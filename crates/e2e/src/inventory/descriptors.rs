//! Open descriptors of a process: what leaks there is seen nowhere else.

use std::path::Path;

/// Where each descriptor of a process leads. Numbers of sockets, pipes and the like say nothing and are left out.
pub fn descriptors(pid: i32) -> Vec<String> {
    let folder = Path::new("/proc").join(pid.to_string()).join("fd");
    let mut found: Vec<_> = crate::names(&folder)
        .iter()
        .filter_map(|number| std::fs::read_link(folder.join(number)).ok())
        .map(|place| without_number(&place.to_string_lossy()).to_owned())
        .collect();
    found.sort();
    found
}

/// `socket:[123]` is a socket, as any other.
fn without_number(place: &str) -> &str {
    match place.split_once(":[") {
        Some((kind @ ("socket" | "pipe"), _)) => kind,
        _ => place,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_say_nothing() {
        for (place, expected) in [
            ("socket:[123]", "socket"),
            ("pipe:[7]", "pipe"),
            ("anon_inode:[pidfd]", "anon_inode:[pidfd]"),
            ("/tmp/a:[1]", "/tmp/a:[1]"),
        ] {
            assert_eq!(without_number(place), expected);
        }
    }
}
