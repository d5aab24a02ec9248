//! The table of the family `bridge`: what a VM may say it is, and what VMs of one network may say to each other.
//!
//! ```text
//!   from a TAP ─► prerouting ─► guest    Ethernet, ARP, IPv4, IPv6 with its own addresses, or nothing
//!             └─► input      ─► what bridges keep for themselves: nothing
//!   to a TAP   ─► forward                nothing from or to an isolated VM
//! ```
//!
//! Source: RFC 826 (ARP), RFC 4861 (neighbour discovery), RFC 6105 (RA guard), RFC 2827 (ingress filtering).

use nftables::expr::MetaKey;
use nftables::schema::SetType;
use nftables::types::{NfChainType, NfFamily, NfHook};

use super::ruleset::{ChainPlan, SetPlan, base_chain, chain, set};
use super::state::FirewallState;
use super::words::{
    Rule, accept, concat, drop, field, goto, iifname, is, is_not, meta, nd_target, not_within, oifname,
    range, set_of, text, within, words,
};

const BRIDGE: NfFamily = NfFamily::Bridge;

/// Sets and chains for `state`.
pub(super) fn table(state: &FirewallState) -> (Vec<SetPlan>, Vec<ChainPlan>) {
    (sets(state), chains(state))
}

fn sets(state: &FirewallState) -> Vec<SetPlan> {
    let vms = || state.vms().iter();
    let isolated = vms().filter(|vm| vm.isolate);
    vec![
        set(
            BRIDGE,
            "taps",
            [SetType::Ifname],
            vms().map(|vm| [vm.tap.clone()]),
        ),
        set(
            BRIDGE,
            "isolated",
            [SetType::Ifname],
            isolated.map(|vm| [vm.tap.clone()]),
        ),
        set(
            BRIDGE,
            "macs",
            [SetType::Ifname, SetType::EtherAddr],
            vms().map(|vm| [vm.tap.clone(), vm.attachment.mac.to_string()]),
        ),
        set(
            BRIDGE,
            "sources4",
            [SetType::Ifname, SetType::Ipv4Addr],
            vms().map(|vm| [vm.tap.clone(), vm.attachment.ipv4.to_string()]),
        ),
        set(
            BRIDGE,
            "sources6",
            [SetType::Ifname, SetType::Ipv6Addr],
            vms().flat_map(|vm| {
                [vm.attachment.ipv6, vm.link_local()].map(|address| [vm.tap.clone(), address.to_string()])
            }),
        ),
    ]
}

fn chains(state: &FirewallState) -> Vec<ChainPlan> {
    use NfChainType::Filter;
    // Before anything that others do with bridged packets.
    const FIRST: i32 = -300;
    vec![
        base_chain(
            BRIDGE,
            "prerouting",
            (Filter, NfHook::Prerouting, FIRST),
            vec![vec![within(iifname(), "taps"), goto("guest")]],
        ),
        // Frames for the bridge itself (IEEE 802.1D, 7.12.6) do not pass by prerouting, yet it learns from them where a MAC
        // address is.
        base_chain(
            BRIDGE,
            "input",
            (Filter, NfHook::Input, FIRST),
            vec![vec![
                within(iifname(), "taps"),
                is(
                    field("ether", "daddr"),
                    range("01:80:c2:00:00:00", "01:80:c2:00:00:0f"),
                ),
                drop(),
            ]],
        ),
        base_chain(
            BRIDGE,
            "forward",
            (Filter, NfHook::Forward, FIRST),
            vec![
                vec![within(iifname(), "isolated"), within(oifname(), "taps"), drop()],
                vec![within(iifname(), "taps"), within(oifname(), "isolated"), drop()],
            ],
        ),
        chain(BRIDGE, "guest", guest()),
        chain(BRIDGE, "neighbour", neighbour(state)),
    ]
}

fn guest() -> Vec<Rule> {
    let ether_type = || field("ether", "type");
    let from = |address| concat([iifname(), address]);
    vec![
        // No VLAN tags either, behind which the rest would not be seen.
        vec![is_not(ether_type(), words(&["ip", "ip6", "arp"])), drop()],
        vec![not_within(from(field("ether", "saddr")), "macs"), drop()],
        vec![
            is(ether_type(), text("arp")),
            not_within(from(field("arp", "saddr ether")), "macs"),
            drop(),
        ],
        // Without an address it only asks whether one is taken (RFC 5227).
        vec![
            is(ether_type(), text("arp")),
            is_not(field("arp", "saddr ip"), text("0.0.0.0")),
            not_within(from(field("arp", "saddr ip")), "sources4"),
            drop(),
        ],
        vec![is(ether_type(), text("arp")), accept()],
        vec![
            is(ether_type(), text("ip")),
            not_within(from(field("ip", "saddr")), "sources4"),
            drop(),
        ],
        // Servers of DHCP.
        vec![is(field("udp", "sport"), words(&["67", "547"])), drop()],
        vec![is(ether_type(), text("ip")), accept()],
        vec![
            is(
                field("icmpv6", "type"),
                words(&["nd-router-advert", "nd-redirect"]),
            ),
            drop(),
        ],
        vec![
            is(field("icmpv6", "type"), text("nd-neighbor-advert")),
            not_within(from(field("ip6", "saddr")), "sources6"),
            drop(),
        ],
        vec![
            is(field("icmpv6", "type"), text("nd-neighbor-advert")),
            goto("neighbour"),
        ],
        vec![within(from(field("ip6", "saddr")), "sources6"), accept()],
        // Without an address it asks whether its own is taken (RFC 4862, 5.4) and which groups it is in (RFC 3590).
        vec![is_not(field("ip6", "saddr"), text("::")), drop()],
        vec![is_not(meta(MetaKey::L4proto), text("ipv6-icmp")), drop()],
        vec![
            is(field("icmpv6", "type"), text("nd-neighbor-solicit")),
            goto("neighbour"),
        ],
        vec![
            is(
                field("icmpv6", "type"),
                words(&["mld-listener-report", "mld2-listener-report"]),
            ),
            accept(),
        ],
        vec![drop()],
    ]
}

/// A VM speaks of its own addresses. A set that nobody names is the only place for what nft has no type for.
fn neighbour(state: &FirewallState) -> Vec<Rule> {
    let own = state.vms().iter().flat_map(|vm| {
        [vm.attachment.ipv6, vm.link_local()].map(|address| {
            concat([
                text(vm.tap.clone()),
                text(format!("{:#034x}", u128::from(address))),
            ])
        })
    });
    let own: Vec<_> = own.collect();
    let mut rules = Vec::new();
    if !own.is_empty() {
        rules.push(vec![is(concat([iifname(), nd_target()]), set_of(own)), accept()]);
    }
    rules.push(vec![drop()]);
    rules
}
