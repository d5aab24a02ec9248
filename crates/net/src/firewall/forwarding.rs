//! The kernel's switches for forwarding, of the namespace that the thread is in.
//!
//! ```text
//!   look      what the switches are, and where routes lead
//!   plan      which interfaces must forward that do not, and which of ours need not any more
//!   close, open    write what differs
//! ```
//!
//! IPv4 forwards a packet when the interface that it came in by does; so our bridges do, and each interface that answers
//! come back by. IPv6 has the same since Linux 6.17 (`force_forwarding`); before, there is one switch for all, which also
//! makes interfaces deaf to router advertisements unless they are told to listen all the same (`accept_ra` = 2).
//!
//! What we switched on is kept in our own table, in sets with the names of the interfaces: it is there as long as the
//! switch is, however the daemon ends, and rules there keep others from using what was opened for us.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;

use super::nft;
use super::state::{BRIDGES, TableName};

/// Which switches we turned on. Each is a set of interfaces' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    opened4: BTreeSet<String>,
    opened6: BTreeSet<String>,
    /// Holds [`ALL`] when IPv6 forwarding of the whole host is ours.
    global6: BTreeSet<String>,
    /// Which listen to router advertisements although they forward.
    adverts6: BTreeSet<String>,
}

/// `net.ipv6.conf.all`.
const ALL: &str = "all";

impl Forwarding {
    /// The names of the sets that keep it, and what is in them.
    pub(super) fn sets(&self) -> impl Iterator<Item = (&'static str, &BTreeSet<String>)> {
        [
            ("opened4", &self.opened4),
            ("opened6", &self.opened6),
            ("global6", &self.global6),
            ("adverts6", &self.adverts6),
        ]
        .into_iter()
    }

    /// Whether every interface forwards IPv6 because of us.
    pub(super) fn opens_all_of_ipv6(&self) -> bool {
        !self.global6.is_empty()
    }

    /// What an earlier daemon turned on, out of its table; nothing when there is none.
    pub(super) fn read(table: &TableName) -> Self {
        let Ok(listing) = nft::list(&["table", "inet", table.as_str()]) else {
            return Self::default();
        };
        let elements = |name: &str| {
            let sets = nft::objects(&listing, "set").filter(|set| set["name"] == name);
            sets.filter_map(|set| set["elem"].as_array())
                .flatten()
                .filter_map(|element| element.as_str())
                .map(str::to_owned)
                .collect()
        };
        Self {
            opened4: elements("opened4"),
            opened6: elements("opened6"),
            global6: elements("global6"),
            adverts6: elements("adverts6"),
        }
    }
}

impl Forwarding {
    /// What other daemons on this host turned on: it is ours as well as long as we need it, and theirs when we do not.
    pub(super) fn of_others(ours: &TableName) -> Self {
        let listing = nft::list(&["tables"]).unwrap_or_default();
        let tables = nft::objects(&listing, "table").filter(|table| table["family"] == "inet");
        let names = tables.filter_map(|table| TableName::read(table["name"].as_str()?));
        let others = names.filter(|name| name != ours);
        others.fold(Self::default(), |all, name| all.with(&Self::read(&name)))
    }

    /// What is in either.
    pub(super) fn with(&self, other: &Self) -> Self {
        Self {
            opened4: &self.opened4 | &other.opened4,
            opened6: &self.opened6 | &other.opened6,
            global6: &self.global6 | &other.global6,
            adverts6: &self.adverts6 | &other.adverts6,
        }
    }

    /// What is only in this one.
    pub(super) fn without(&self, other: &Self) -> Self {
        Self {
            opened4: &self.opened4 - &other.opened4,
            opened6: &self.opened6 - &other.opened6,
            global6: &self.global6 - &other.global6,
            adverts6: &self.adverts6 - &other.adverts6,
        }
    }
}

/// One interface that a route leads out by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Interface {
    route4: bool,
    route6: bool,
    default6: bool,
    forwarding4: Option<bool>,
    force6: Option<bool>,
    accept_ra: Option<u8>,
}

/// What the switches are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Host {
    all4: bool,
    /// Nothing on a host without IPv6.
    all6: Option<bool>,
    /// The kernel has `force_forwarding`.
    each6: bool,
    interfaces: BTreeMap<String, Interface>,
}

/// Why a switch was not turned.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", path.display())]
pub struct SwitchError {
    /// Which.
    path: PathBuf,
    /// Why.
    #[source]
    source: io::Error,
}

/// Reads switches and routes. Bridges of VMs do not count, of whichever daemon they are.
pub(super) fn look() -> Host {
    let mut interfaces: BTreeMap<String, Interface> = BTreeMap::new();
    // The files of the thread, not of the process: another namespace.
    let routes = |file: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    for name in routes4(&routes("route").unwrap_or_default()) {
        interfaces.entry(name).or_default().route4 = true;
    }
    for (name, is_default) in routes6(&routes("ipv6_route").unwrap_or_default()) {
        let interface = interfaces.entry(name).or_default();
        interface.route6 = true;
        interface.default6 |= is_default;
    }
    interfaces.retain(|name, _| name != "lo" && !name.starts_with(BRIDGES));
    for (name, interface) in &mut interfaces {
        interface.forwarding4 = is_on(4, name, "forwarding");
        interface.force6 = is_on(6, name, "force_forwarding");
        interface.accept_ra = read(6, name, "accept_ra");
    }
    Host {
        all4: is_on(4, ALL, "forwarding").unwrap_or_default(),
        all6: is_on(6, ALL, "forwarding"),
        each6: switch(6, "lo", "force_forwarding").exists(),
        interfaces,
    }
}

/// The interfaces of a `/proc/net/route` (proc_net(5)).
fn routes4(table: &str) -> impl Iterator<Item = String> {
    let names = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_ascii_whitespace().next());
    names.map(str::to_owned)
}

/// The interfaces of a `/proc/net/ipv6_route` that lead to other hosts, and whether by a default route.
fn routes6(table: &str) -> Vec<(String, bool)> {
    /// `RTF_REJECT`, and `RTF_LOCAL` for addresses of the host itself (linux/ipv6_route.h).
    const NOWHERE: u32 = 0x0200 | 0x8000_0000;
    let route = |line: &str| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let [to, len, .., flags, name] = words.as_slice() else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let on_link_only = to.starts_with("fe8") || to.starts_with("ff");
        (flags & NOWHERE == 0 && !on_link_only).then(|| ((*name).to_owned(), *len == "00"))
    };
    table.lines().filter_map(route).collect()
}

/// What must be ours to be on, given what was ours until now.
pub(super) fn plan(host: &Host, known: &Forwarding) -> Forwarding {
    let needing = |has_route: fn(&Interface) -> bool,
                   is_on: fn(&Interface) -> Option<bool>,
                   ours: &BTreeSet<String>| {
        let needing = host.interfaces.iter().filter(|(name, interface)| {
            has_route(interface) && (is_on(interface) == Some(false) || ours.contains(*name))
        });
        needing.map(|(name, _)| name.clone()).collect()
    };
    let mut next = Forwarding::default();
    // Who turned all of it on forwards anyhow; nothing of it is ours any more.
    if !host.all4 {
        next.opened4 = needing(
            |interface| interface.route4,
            |interface| interface.forwarding4,
            &known.opened4,
        );
    }
    let ours = known.opens_all_of_ipv6();
    match host.all6 {
        None => {}
        Some(true) if !ours => {}
        Some(_) if host.each6 && !ours => {
            next.opened6 = needing(
                |interface| interface.route6,
                |interface| interface.force6,
                &known.opened6,
            );
        }
        Some(_) => {
            let has_default = host.interfaces.values().any(|interface| interface.default6);
            if has_default {
                next.global6.insert(ALL.to_owned());
                let listening = host.interfaces.iter().filter(|(name, interface)| {
                    interface.accept_ra == Some(1) || known.adverts6.contains(*name)
                });
                next.adverts6 = listening.map(|(name, _)| name.clone()).collect();
            }
        }
    }
    next
}

/// Turns off what was ours and need not be on any more, unless others turned on all of it.
pub(super) fn close(host: &Host, known: &Forwarding, next: &Forwarding) -> Result<(), SwitchError> {
    if !host.all4 {
        for name in known.opened4.difference(&next.opened4) {
            turn_if_there(4, name, "forwarding", 0)?;
        }
    }
    for name in known.opened6.difference(&next.opened6) {
        turn_if_there(6, name, "force_forwarding", 0)?;
    }
    if known.opens_all_of_ipv6() && !next.opens_all_of_ipv6() {
        turn_if_there(6, ALL, "forwarding", 0)?;
    }
    for name in known.adverts6.difference(&next.adverts6) {
        turn_if_there(6, name, "accept_ra", 1)?;
    }
    Ok(())
}

/// Turns on what is ours to be on.
pub(super) fn open(next: &Forwarding) -> Result<(), SwitchError> {
    for name in &next.opened4 {
        turn_if_there(4, name, "forwarding", 1)?;
    }
    for name in &next.opened6 {
        turn_if_there(6, name, "force_forwarding", 1)?;
    }
    // Before the switch for all: routes that were learnt from routers go with it otherwise.
    for name in &next.adverts6 {
        turn_if_there(6, name, "accept_ra", 2)?;
    }
    if next.opens_all_of_ipv6() {
        turn_if_there(6, ALL, "forwarding", 1)?;
    }
    Ok(())
}

/// Lets a bridge of ours forward, and route loopback addresses: by them the host asks at ports that are published at
/// 127.0.0.1. One that is gone is none that needs it.
pub(super) fn open_bridge(bridge: &str) -> Result<(), SwitchError> {
    turn_if_there(4, bridge, "forwarding", 1)?;
    turn_if_there(4, bridge, "route_localnet", 1)?;
    turn_if_there(6, bridge, "forwarding", 1)?;
    turn_if_there(6, bridge, "force_forwarding", 1)
}

fn switch(version: u8, interface: &str, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/sys/net/ipv{version}/conf/{interface}/{name}"))
}

fn read(version: u8, interface: &str, name: &str) -> Option<u8> {
    let text = std::fs::read_to_string(switch(version, interface, name)).ok()?;
    text.trim().parse().ok()
}

fn is_on(version: u8, interface: &str, name: &str) -> Option<bool> {
    read(version, interface, name).map(|value| value != 0)
}

fn turn(version: u8, interface: &str, name: &str, to: u8) -> Result<(), SwitchError> {
    // Where it is as it should be nothing is written: it may be read-only.
    if read(version, interface, name) == Some(to) {
        return Ok(());
    }
    let path = switch(version, interface, name);
    std::fs::write(&path, to.to_string()).map_err(|source| SwitchError { path, source })
}

fn turn_if_there(version: u8, interface: &str, name: &str, to: u8) -> Result<(), SwitchError> {
    match turn(version, interface, name, to) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(()),
        turned => turned,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn interface(forwards: bool) -> Interface {
        Interface {
            route4: true,
            route6: true,
            default6: true,
            forwarding4: Some(forwards),
            force6: Some(forwards),
            accept_ra: Some(1),
        }
    }

    fn host(interfaces: &[(&str, bool)]) -> Host {
        Host {
            all4: false,
            all6: Some(false),
            each6: true,
            interfaces: interfaces
                .iter()
                .map(|(name, forwards)| ((*name).to_owned(), interface(*forwards)))
                .collect(),
        }
    }

    #[test]
    fn what_others_turned_on_is_theirs() {
        let next = plan(&host(&[("a", false), ("b", true)]), &Forwarding::default());
        assert_eq!(next.opened4, names(&["a"]));
        assert_eq!(next.opened6, names(&["a"]));
        assert!(next.global6.is_empty() && next.adverts6.is_empty());
        // What is on because of us stays ours.
        assert_eq!(plan(&host(&[("a", true), ("b", true)]), &next), next);
        // The default route moved.
        let moved = plan(&host(&[("c", false)]), &next);
        assert_eq!((moved.opened4, moved.opened6), (names(&["c"]), names(&["c"])));
        // Somebody turned on all of it.
        let router = Host {
            all4: true,
            all6: Some(true),
            ..host(&[("a", true)])
        };
        assert_eq!(plan(&router, &next), Forwarding::default());
    }

    #[test]
    fn an_older_kernel_forwards_ipv6_as_a_whole_and_goes_on_listening_to_routers() {
        let older = Host {
            each6: false,
            ..host(&[("a", false)])
        };
        let next = plan(&older, &Forwarding::default());
        assert_eq!(next.global6, names(&["all"]));
        assert_eq!(next.adverts6, names(&["a"]));
        assert!(next.opened6.is_empty());
        let mut now = older.clone();
        now.all6 = Some(true);
        now.interfaces.get_mut("a").unwrap().accept_ra = Some(2);
        assert_eq!(plan(&now, &next), next, "it stays ours");
        now.interfaces.get_mut("a").unwrap().default6 = false;
        assert!(plan(&now, &next).global6.is_empty(), "no way out, no forwarding");
        let without = Host { all6: None, ..older };
        assert!(plan(&without, &Forwarding::default()).global6.is_empty());
    }

    #[test]
    fn routes_are_read() {
        let four = "Iface\tDestination\tGateway\neth0\t00000000\t0100000A\nwg0\t0000000A\t00000000\n";
        assert_eq!(routes4(four).collect::<Vec<_>>(), ["eth0", "wg0"]);
        let zero = "0".repeat(32);
        let line = |to: &str, len: &str, flags: &str, name: &str| {
            format!("{to} {len} {zero} 00 {zero} 00000400 00000001 00000000 {flags} {name}\n")
        };
        let link_local = format!("fe80{}", "0".repeat(28));
        let global = format!("2001{}", "0".repeat(28));
        let table = [
            line(&zero, "00", "00000003", "eth0"),
            line(&global, "40", "00000001", "eth1"),
            line(&link_local, "40", "00000001", "eth2"),
            line(&global, "80", "80200001", "eth3"),
            line(&zero, "00", "00200200", "lo"),
            "garbage\n".to_owned(),
        ];
        assert_eq!(
            routes6(&table.concat()),
            [("eth0".to_owned(), true), ("eth1".to_owned(), false)]
        );
    }
}
