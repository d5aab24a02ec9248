//! The table of the family `inet`: what is routed, translated, and sent to the host itself.
//!
//! ```text
//!   from a VM ─► raw ─► prerouting ─► input    ─► to_host      ICMP echo, DNS; the rest is refused unless allowed
//!                                 └─► forward  ─► from_vm      beyond by NAT; published ports of others; nothing else
//!   to a VM   ─► prerouting (published) ─► forward ─► to_vm    what was published, and answers
//!   the host  ─► output (published)                            its own way to a published port
//!   postrouting                                                whose address what leaves has
//! ```
//!
//! A source address is believed here: [`super::bridge`] lets no VM use another's.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nftables::expr::MetaKey;
use nftables::schema::SetType;
use nftables::stmt::NATFamily;
use nftables::types::{NfChainType, NfFamily, NfHook};

use super::forwarding::Forwarding;
use super::ruleset::{ChainPlan, SetPlan, base_chain, chain, set};
use super::state::{BRIDGES, FirewallState, Guarded};
use super::words::{
    Expr, Rule, accept, back, concat, ct, dnat, drop, field, goto, iifname, is, jump, masquerade, meta,
    not_within, oifname, prefix, refuse, text, to_this_host, within, words,
};

const INET: NfFamily = NfFamily::INet;

/// Where clouds serve metadata to their machines, and what else lies there: all of it is for the host. AWS has the
/// `fd00:ec2::254` of its metadata, its time and its DNS in that prefix.
const CLOUD4: (&str, u32) = ("169.254.0.0", 16);
const CLOUD6: (&str, u32) = ("fd00:ec2::", 32);
/// The metadata service's own address.
const METADATA4: &str = "169.254.169.254";
const METADATA6: &str = "fd00:ec2::254";

/// Source and destination address, and the names of the sets of one IP version.
struct Version {
    protocol: &'static str,
    nfproto: &'static str,
    family: NATFamily,
    loopback: (&'static str, u32),
    cloud: (&'static str, u32),
    metadata: &'static str,
    gateways: &'static str,
    members: &'static str,
    nat: &'static str,
    host: &'static str,
    allowed_metadata: &'static str,
    isolated: &'static str,
    opened: &'static str,
    at: [&'static str; 2],
    any: [&'static str; 2],
}

const VERSIONS: [Version; 2] = [
    Version {
        protocol: "ip",
        nfproto: "ipv4",
        family: NATFamily::IP,
        loopback: ("127.0.0.0", 8),
        cloud: CLOUD4,
        metadata: METADATA4,
        gateways: "gateways4",
        members: "members4",
        nat: "nat4",
        host: "host4",
        allowed_metadata: "metadata4",
        isolated: "isolated4",
        opened: "opened4",
        at: ["at4", "at4_port"],
        any: ["any4", "any4_port"],
    },
    Version {
        protocol: "ip6",
        nfproto: "ipv6",
        family: NATFamily::IP6,
        loopback: ("::1", 128),
        cloud: CLOUD6,
        metadata: METADATA6,
        gateways: "gateways6",
        members: "members6",
        nat: "nat6",
        host: "host6",
        allowed_metadata: "metadata6",
        isolated: "isolated6",
        opened: "opened6",
        at: ["at6", "at6_port"],
        any: ["any6", "any6_port"],
    },
];

impl Version {
    fn saddr(&self) -> Expr {
        field(self.protocol, "saddr")
    }

    fn daddr(&self) -> Expr {
        field(self.protocol, "daddr")
    }

    fn nfproto(&self) -> super::words::Stmt {
        is(meta(MetaKey::Nfproto), text(self.nfproto))
    }
}

/// Sets and chains for `state`.
pub(super) fn table(state: &FirewallState, forwarding: &Forwarding) -> (Vec<SetPlan>, Vec<ChainPlan>) {
    (sets(state, forwarding), chains(forwarding))
}

fn sets(state: &FirewallState, forwarding: &Forwarding) -> Vec<SetPlan> {
    let bridges = || state.networks().iter().map(|network| network.bridge.clone());
    let members = || {
        state.networks().iter().flat_map(|network| {
            let on_it = state
                .vms()
                .iter()
                .filter(|vm| vm.attachment.network == network.name);
            on_it.map(|vm| (network.bridge.clone(), vm))
        })
    };
    let four = |may: fn(&Guarded) -> bool| {
        let chosen = state.vms().iter().filter(move |vm| may(vm));
        chosen.map(|vm| [vm.attachment.ipv4.to_string()])
    };
    let six = |may: fn(&Guarded) -> bool| {
        let chosen = state.vms().iter().filter(move |vm| may(vm));
        chosen.map(|vm| [vm.attachment.ipv6.to_string()])
    };
    let (ipv4, ipv6, name) = (SetType::Ipv4Addr, SetType::Ipv6Addr, SetType::Ifname);
    let mut sets = vec![
        set(INET, "bridges", [name], bridges().map(|bridge| [bridge])),
        set(
            INET,
            "same",
            [name, name],
            bridges().map(|bridge| [bridge.clone(), bridge]),
        ),
        set(
            INET,
            "gateways4",
            [name, ipv4],
            state
                .networks()
                .iter()
                .map(|network| [network.bridge.clone(), network.gateway4().to_string()]),
        ),
        set(
            INET,
            "gateways6",
            [name, ipv6],
            state
                .networks()
                .iter()
                .map(|network| [network.bridge.clone(), network.gateway6().to_string()]),
        ),
        set(
            INET,
            "members4",
            [name, ipv4],
            members().map(|(bridge, vm)| [bridge, vm.attachment.ipv4.to_string()]),
        ),
        set(
            INET,
            "members6",
            [name, ipv6],
            members().map(|(bridge, vm)| [bridge, vm.attachment.ipv6.to_string()]),
        ),
        set(INET, "nat4", [ipv4], four(|vm| vm.nat)),
        set(INET, "nat6", [ipv6], six(|vm| vm.nat)),
        set(INET, "host4", [ipv4], four(|vm| vm.host)),
        set(INET, "host6", [ipv6], six(|vm| vm.host)),
        set(INET, "metadata4", [ipv4], four(|vm| vm.metadata)),
        set(INET, "metadata6", [ipv6], six(|vm| vm.metadata)),
        set(INET, "isolated4", [ipv4], four(|vm| vm.isolate)),
        set(INET, "isolated6", [ipv6], six(|vm| vm.isolate)),
    ];
    sets.extend(forwarding.sets().map(|(set_name, interfaces)| {
        let elements = interfaces.iter().map(|interface| [interface.clone()]);
        set(INET, set_name, [name], elements)
    }));
    sets.extend(published(state));
    sets
}

/// Eight maps: for IPv4 and IPv6, for one address of the host and for all of them, to the guest's address and its port.
fn published(state: &FirewallState) -> Vec<SetPlan> {
    let mut elements: BTreeMap<&str, BTreeMap<Vec<String>, Option<String>>> = BTreeMap::new();
    let mut publish = |maps: [&'static str; 2], key: Vec<String>, guest: IpAddr, port: u16| {
        let [addresses, ports] = maps;
        elements
            .entry(addresses)
            .or_default()
            .insert(key.clone(), Some(guest.to_string()));
        elements
            .entry(ports)
            .or_default()
            .insert(key, Some(port.to_string()));
    };
    let [four, six] = &VERSIONS;
    for vm in state.vms() {
        let (ipv4, ipv6) = (vm.attachment.ipv4.into(), vm.attachment.ipv6.into());
        for port in &vm.attachment.publish {
            let mut key = vec![port.transport.as_str().to_owned(), port.host.to_string()];
            match port.address.filter(|address| !address.is_unspecified()) {
                Some(address) => {
                    key.insert(0, address.to_string());
                    match address {
                        IpAddr::V4(_) => publish(four.at, key, ipv4, port.guest),
                        IpAddr::V6(_) => publish(six.at, key, ipv6, port.guest),
                    }
                }
                None => {
                    if !matches!(port.address, Some(IpAddr::V6(_))) {
                        publish(four.any, key.clone(), ipv4, port.guest);
                    }
                    if !matches!(port.address, Some(IpAddr::V4(_))) {
                        publish(six.any, key, ipv6, port.guest);
                    }
                }
            }
        }
    }
    let mut maps = Vec::new();
    for (version, address) in VERSIONS.iter().zip([SetType::Ipv4Addr, SetType::Ipv6Addr]) {
        for ([addresses, ports], with_address) in [(version.at, true), (version.any, false)] {
            let mut key = vec![SetType::InetProto, SetType::InetService];
            if with_address {
                key.insert(0, address);
            }
            for (name, value) in [(addresses, address), (ports, SetType::InetService)] {
                maps.push(SetPlan {
                    family: INET,
                    name,
                    key: key.clone(),
                    value: Some(value),
                    elements: elements.remove(name).unwrap_or_default(),
                });
            }
        }
    }
    maps
}

fn chains(forwarding: &Forwarding) -> Vec<ChainPlan> {
    use NfChainType::{Filter, NAT};
    // The usual priorities (nft(8)): raw, dstnat, filter, srcnat.
    vec![
        base_chain(INET, "raw", (Filter, NfHook::Prerouting, -300), raw()),
        base_chain(INET, "prerouting", (NAT, NfHook::Prerouting, -100), prerouting()),
        base_chain(
            INET,
            "output",
            (NAT, NfHook::Output, -100),
            vec![vec![to_this_host(), jump("published")]],
        ),
        chain(INET, "published", to_published()),
        base_chain(INET, "forward", (Filter, NfHook::Forward, 0), forward(forwarding)),
        chain(INET, "from_vm", from_vm()),
        chain(INET, "to_vm", to_vm()),
        base_chain(
            INET,
            "input",
            (Filter, NfHook::Input, 0),
            vec![vec![within(iifname(), "bridges"), goto("to_host")]],
        ),
        chain(INET, "to_host", to_host()),
        base_chain(
            INET,
            "postrouting",
            (NAT, NfHook::Postrouting, 100),
            postrouting(),
        ),
    ]
}

/// Loopback addresses are routed on our bridges, for the answers to what the host itself asked at 127.0.0.1. Nobody else
/// may use that.
fn raw() -> Vec<Rule> {
    let [four, _] = &VERSIONS;
    let loopback = || prefix(four.loopback.0, four.loopback.1);
    vec![
        vec![within(iifname(), "bridges"), is(four.daddr(), loopback()), drop()],
        vec![within(iifname(), "bridges"), is(four.saddr(), loopback()), drop()],
    ]
}

/// What comes in from anywhere and is meant for a loopback address is nobody's; translated, it would be somebody's.
fn prerouting() -> Vec<Rule> {
    let mut rules: Vec<Rule> = VERSIONS
        .iter()
        .map(|version| {
            let loopback = match version.loopback {
                (address, 128) => text(address),
                (address, len) => prefix(address, len),
            };
            vec![is(version.daddr(), loopback), back()]
        })
        .collect();
    rules.push(vec![to_this_host(), jump("published")]);
    rules
}

fn to_published() -> Vec<Rule> {
    let mut rules = Vec::new();
    for version in &VERSIONS {
        let (transport, port) = (|| meta(MetaKey::L4proto), || field("th", "dport"));
        let [addresses, ports] = version.at;
        let key = concat([version.daddr(), transport(), port()]);
        rules.push(vec![dnat(version.family, key, addresses, ports)]);
        let [addresses, ports] = version.any;
        let key = concat([transport(), port()]);
        rules.push(vec![
            version.nfproto(),
            dnat(version.family, key, addresses, ports),
        ]);
    }
    rules
}

fn forward(forwarding: &Forwarding) -> Vec<Rule> {
    let mut rules = vec![
        vec![within(iifname(), "bridges"), goto("from_vm")],
        vec![within(oifname(), "bridges"), goto("to_vm")],
    ];
    // What is another daemon's, its own tables judge.
    for direction in [iifname(), oifname()] {
        rules.push(vec![is(direction, text(format!("{BRIDGES}*"))), accept()]);
    }
    // A host that forwarded nothing before forwards nothing now but what is ours.
    for version in &VERSIONS {
        rules.push(vec![version.nfproto(), within(iifname(), version.opened), drop()]);
    }
    if forwarding.opens_all_of_ipv6() {
        let [_, six] = &VERSIONS;
        rules.push(vec![six.nfproto(), drop()]);
    }
    rules
}

fn from_vm() -> Vec<Rule> {
    let mut rules = vec![
        vec![ct("state", &["established", "related"]), accept()],
        // Untracked, it would leave with an address that nobody can answer to.
        vec![ct("state", &["invalid"]), drop()],
    ];
    for version in &VERSIONS {
        for address in [version.saddr(), version.daddr()] {
            rules.push(vec![
                within(oifname(), "bridges"),
                within(address, version.isolated),
                refuse(),
            ]);
        }
    }
    rules.extend([
        // Bridged packets come here, too, where br_netfilter is loaded.
        vec![within(concat([iifname(), oifname()]), "same"), accept()],
        vec![within(oifname(), "bridges"), ct("status", &["dnat"]), accept()],
        vec![within(oifname(), "bridges"), refuse()],
    ]);
    for version in &VERSIONS {
        rules.push(vec![
            within(version.saddr(), version.allowed_metadata),
            is(version.daddr(), text(version.metadata)),
            accept(),
        ]);
        rules.push(vec![
            is(version.daddr(), prefix(version.cloud.0, version.cloud.1)),
            refuse(),
        ]);
        rules.push(vec![within(version.saddr(), version.nat), accept()]);
    }
    rules.push(vec![refuse()]);
    rules
}

fn to_vm() -> Vec<Rule> {
    vec![
        vec![ct("state", &["established", "related"]), accept()],
        vec![ct("status", &["dnat"]), accept()],
        vec![drop()],
    ]
}

fn to_host() -> Vec<Rule> {
    let icmp = |version: &Version| match version.protocol {
        "ip" => is(field("icmp", "type"), text("echo-request")),
        _ => is(field("icmpv6", "type"), text("echo-request")),
    };
    let mut rules = vec![
        vec![ct("state", &["established", "related"]), accept()],
        vec![
            is(
                field("icmpv6", "type"),
                words(&["nd-neighbor-solicit", "nd-neighbor-advert"]),
            ),
            accept(),
        ],
    ];
    for version in &VERSIONS {
        let gateway = || within(concat([iifname(), version.daddr()]), version.gateways);
        rules.extend([
            vec![gateway(), icmp(version), accept()],
            vec![
                gateway(),
                is(meta(MetaKey::L4proto), words(&["tcp", "udp"])),
                is(field("th", "dport"), text("53")),
                accept(),
            ],
            vec![within(version.saddr(), version.host), accept()],
            vec![
                within(version.saddr(), version.allowed_metadata),
                is(version.daddr(), text(version.metadata)),
                accept(),
            ],
        ]);
    }
    rules.push(vec![refuse()]);
    rules
}

fn postrouting() -> Vec<Rule> {
    let mut rules = Vec::new();
    for version in &VERSIONS {
        rules.push(vec![
            not_within(oifname(), "bridges"),
            within(version.saddr(), version.nat),
            masquerade(),
        ]);
        rules.push(vec![
            not_within(oifname(), "bridges"),
            within(version.saddr(), version.allowed_metadata),
            is(version.daddr(), text(version.metadata)),
            masquerade(),
        ]);
        // To a published port of a neighbour: it would answer directly, and not as who was asked.
        rules.push(vec![
            ct("status", &["dnat"]),
            within(concat([oifname(), version.saddr()]), version.members),
            masquerade(),
        ]);
        // The host itself at a loopback address: a guest has a loopback of its own.
        let loopback = match version.loopback {
            (address, 128) => text(address),
            (address, len) => prefix(address, len),
        };
        rules.push(vec![
            within(oifname(), "bridges"),
            is(version.saddr(), loopback),
            masquerade(),
        ]);
    }
    rules
}
