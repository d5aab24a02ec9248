//! What there is of a daemon and its VMs on this machine, taken before and after: whatever differs was left behind.
//!
//! ```text
//!   marks        by what a thing is known to be this daemon's: its folder, the ids of its VMs
//!   processes    mounts (and loop devices)    network (links, nft tables, namespaces)    sockets    cgroups
//!   files        rows        descriptors      what lies in the daemon's own folders and in its process
//!   allowed      the differences that are meant
//! ```
//!
//! Other tests run on the same machine at the same time, so of what is the whole machine's only what bears a mark is
//! counted. A daemon with a network namespace of its own ([`Scope::namespace`]) has everything in it counted.

mod allowed;
mod cgroups;
mod descriptors;
mod files;
mod marks;
mod mounts;
mod network;
mod rows;
mod sockets;

use std::fmt;
use std::path::Path;
use std::process::Command;

pub use descriptors::descriptors;
pub(crate) use files::everything_below;
pub use marks::Marks;
pub use rows::Database;

use crate::{Process, text};

/// What a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Process,
    Mount,
    Loop,
    Link,
    NftTable,
    NetworkNamespace,
    Socket,
    Cgroup,
    File,
    Row,
    Descriptor,
}

/// One thing, so that a person finds it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    pub kind: Kind,
    pub name: String,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.name)
    }
}

/// Whose things are counted.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    pub marks: &'a Marks,
    /// The file of the network namespace that is the daemon's alone.
    pub namespace: Option<&'a Path>,
}

/// A sorted list of things; one that is there twice stands there twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory(Vec<Item>);

impl Inventory {
    /// What the machine has of a daemon now, outside of its own folders.
    pub fn of_the_machine(scope: Scope<'_>) -> Self {
        let mut inventory = Self::default();
        let processes = Process::all().into_iter();
        inventory.add(
            Kind::Process,
            processes
                .filter(|process| scope.marks.are_in_process(process))
                .map(|process| process.line),
        );
        inventory.add(Kind::Mount, mounts::mounts(scope.marks));
        inventory.add(Kind::Loop, mounts::loops(scope.marks));
        inventory.add(Kind::Link, network::links(scope));
        inventory.add(Kind::NftTable, network::nft_tables(scope));
        inventory.add(Kind::NetworkNamespace, network::namespaces(scope.marks));
        inventory.add(Kind::Socket, sockets::sockets(scope));
        inventory.add(Kind::Cgroup, cgroups::cgroups(scope.marks));
        inventory
    }

    /// The interfaces in a network namespace, as the inventory lists them.
    pub(crate) fn links(namespace: &Path) -> Vec<String> {
        let marks = Marks::none();
        network::links(Scope {
            marks: &marks,
            namespace: Some(namespace),
        })
    }

    /// Adds things of one kind.
    pub fn add(&mut self, kind: Kind, names: impl IntoIterator<Item = String>) {
        self.0.extend(names.into_iter().map(|name| Item { kind, name }));
        self.0.sort();
    }

    /// What is here and not in `other`.
    fn without(&self, other: &Self) -> Vec<&Item> {
        let mut rest: Vec<_> = other.0.iter().collect();
        let mut found = Vec::new();
        for item in &self.0 {
            match rest.iter().position(|other| *other == item) {
                Some(place) => drop(rest.swap_remove(place)),
                None => found.push(item),
            }
        }
        found
    }

    /// What changed from `before` to now that is not meant to change, a line each.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let left = self.without(before).into_iter().map(|item| ("left", item));
        let gone = before.without(self).into_iter().map(|item| ("gone", item));
        let mut changes: Vec<_> = left
            .chain(gone)
            .filter(|(_, item)| !allowed::is_allowed(item))
            .map(|(what, item)| format!("{what}: {item}"))
            .collect();
        changes.sort();
        changes
    }
}

/// What a program says, in the daemon's network namespace where it has one. It must be there and succeed.
fn said(scope: Scope<'_>, words: &[&str]) -> String {
    let mut command = match scope.namespace {
        Some(namespace) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={}", namespace.display())).args(words);
            command
        }
        None => {
            let mut command = Command::new(words[0]);
            command.args(&words[1..]);
            command
        }
    };
    let output = command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .unwrap_or_else(|error| panic!("{words:?}: {error}; run scripts/install-deps"));
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inventory(names: &[&str]) -> Inventory {
        let mut inventory = Inventory::default();
        inventory.add(Kind::Mount, names.iter().map(|name| (*name).to_owned()));
        inventory
    }

    #[test]
    fn a_difference_is_named_in_both_directions_and_counted() {
        let before = inventory(&["a", "b"]);
        assert_eq!(before.since(&inventory(&["b", "a"])), [""; 0]);
        let after = inventory(&["b", "b", "c"]);
        assert_eq!(
            after.since(&before),
            ["gone: Mount a", "left: Mount b", "left: Mount c"]
        );
    }
}
