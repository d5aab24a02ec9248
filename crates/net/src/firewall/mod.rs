//! What VMs may talk to: the rules for it in the kernel, and the switches without which no packet passes.
//!
//! ```text
//!   state       which VMs there are on which networks, and what each may: plain values
//!   inet        ─┐ state ─► the table `inet offshoot_<hex>`: routed packets, NAT, published ports, the host's services
//!   bridge      ─┘ state ─► the table `bridge offshoot_<hex>`: what a VM may say it is, VMs of one network
//!   ruleset     tables as values ─► one transaction that makes them, or that changes one into another
//!   words       the words of nftables that the tables are made of
//!   nft         hands a transaction to nft(8), in the namespace
//!   forwarding  the kernel's switches (`/proc/sys/net`), what they were before, and back
//!   apply       the one owner of all that
//!   foreign     rules of others that would stop our VMs
//!   changes     wakes up when a route or a switch of the host changes
//! ```
//!
//! The kernel remembers nothing for us but the tables; what a VM may is known from the rows of VMs. Rules of others are
//! never touched. Not here: bridges and TAPs, addresses, who chooses a port ([`crate::ports`] holds them).

mod apply;
mod bridge;
mod changes;
mod foreign;
mod forwarding;
mod inet;
mod nft;
mod ruleset;
mod state;
mod words;

pub use apply::{Firewall, FirewallError};
pub use changes::Changes;
pub use foreign::{Facts, Obstacle};
pub use forwarding::Forwarding;
pub use nft::NftError;
pub use ruleset::Ruleset;
pub use state::{FirewallState, Guarded, TableName};

/// The rules for `state`, in tables called `table`.
pub fn plan(table: &TableName, state: &FirewallState, forwarding: &Forwarding) -> Ruleset {
    let (mut sets, mut chains) = inet::table(state, forwarding);
    let (bridge_sets, bridge_chains) = bridge::table(state);
    sets.extend(bridge_sets);
    chains.extend(bridge_chains);
    Ruleset::new(table.clone(), sets, chains)
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::{Attachment, Mac, Network, PublishedPort, Transport};

    fn network() -> Network {
        Network {
            name: "default".parse().unwrap(),
            bridge: "ofs-01234567".into(),
            ipv4: "10.87.0.0/22".parse().unwrap(),
            ipv6: "fd12:3456:789a::/64".parse().unwrap(),
            created_ms: 0,
        }
    }

    fn vm(number: u8) -> Guarded {
        let port = |address: Option<&str>, transport| PublishedPort {
            address: address.map(|address| address.parse().unwrap()),
            host: 8000 + u16::from(number),
            guest: 80,
            transport,
        };
        Guarded {
            tap: format!("os-0000000000{number:02x}"),
            attachment: Attachment {
                network: "default".parse().unwrap(),
                mac: Mac([2, 0x6f, 10, 87, 0, number]),
                ipv4: [10, 87, 0, number].into(),
                ipv6: format!("fd12:3456:789a::{number:x}").parse().unwrap(),
                publish: vec![
                    port(None, Transport::Tcp),
                    port(Some("127.0.0.1"), Transport::Udp),
                    port(Some("::"), Transport::Udp),
                ],
            },
            nat: true,
            isolate: number == 3,
            host: false,
            metadata: number == 3,
        }
    }

    fn planned(numbers: &[u8]) -> Ruleset {
        let mut state = FirewallState::default();
        for number in numbers {
            state.insert(&network(), vm(*number));
        }
        plan(&TableName::new([1, 2, 3, 4]), &state, &Forwarding::default())
    }

    /// A transaction, one command a line.
    fn lines(transaction: &nftables::schema::Nftables<'_>) -> String {
        let lines = transaction
            .objects
            .iter()
            .map(|command| serde_json::to_string(command).unwrap());
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_rules_for_two_vms() {
        insta::assert_snapshot!(lines(&planned(&[2, 3]).replace()));
    }

    #[test]
    fn a_vm_that_comes_or_goes_is_a_few_elements() {
        let (one, two) = (planned(&[2]), planned(&[2, 3]));
        insta::assert_snapshot!("a_vm_comes", lines(&two.change(&one).unwrap()));
        insta::assert_snapshot!("a_vm_goes", lines(&one.change(&two).unwrap()));
        assert!(two.change(&two).is_none());
    }

    #[test]
    fn the_order_in_which_vms_came_does_not_matter() {
        assert_eq!(planned(&[2, 3, 4]), planned(&[4, 2, 3]));
        let mut state = FirewallState::default();
        state.insert(&network(), vm(2));
        state.insert(&network(), vm(2));
        assert_eq!(state.vms().len(), 1);
        assert!(state.remove(&vm(2).tap) && state.is_empty() && state.networks().is_empty());
        assert!(!state.remove(&vm(2).tap));
    }

    #[test]
    fn a_guest_makes_its_link_local_address_of_its_mac() {
        assert_eq!(vm(2).link_local().to_string(), "fe80::6f:aff:fe57:2");
    }
}
