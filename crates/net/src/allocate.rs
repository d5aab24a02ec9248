//! Which subnet a network gets, and which addresses a VM gets on it. Pure: it looks at nothing and remembers nothing.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use offshoot_model::Mac;

/// The length of a network's prefix where nobody asks for another one: 1,021 VMs. A Linux bridge has 1,024 ports
/// (`BR_MAX_PORTS`), so a larger one could not be used.
const PREFIX: u8 = 22;
/// A shorter prefix is no network of VMs but a mistake.
const SHORTEST_PREFIX: u8 = 8;
/// A longer one has no room for host, broadcast and two VMs.
const LONGEST_PREFIX: u8 = 29;
/// A route this wide says where everything goes, as a default route does; VPNs split that one in two.
const DEFAULT_ROUTE_PREFIX: u8 = 1;

/// Why a subnet cannot be a network's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Too large or too small.
    #[error(
        "{subnet} is not possible: a network's prefix is {SHORTEST_PREFIX} to {LONGEST_PREFIX} bits long"
    )]
    Prefix {
        /// What was asked for.
        subnet: Ipv4Net,
    },
    /// Addresses with a meaning of their own.
    #[error("{subnet} is not possible: those addresses have a meaning of their own")]
    Reserved {
        /// What was asked for.
        subnet: Ipv4Net,
    },
    /// Somebody on this host has it.
    #[error("{subnet} collides with {with}, to which this host has a route")]
    Route {
        /// What was asked for.
        subnet: Ipv4Net,
        /// The route's destination.
        with: Ipv4Net,
    },
    /// Another network has it.
    #[error("{subnet} collides with another network's {with}")]
    Network {
        /// What was asked for.
        subnet: Ipv4Net,
        /// The other one's.
        with: Ipv4Net,
    },
    /// Nothing of the pool is free.
    #[error("no subnet of {pool} is free: each collides with a route of this host or is a network's")]
    PoolExhausted {
        /// The pool.
        pool: Ipv4Net,
    },
}

/// Whether two subnets have an address in common.
pub fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

/// The first of `routes` that leads somewhere else than `subnet` says it does.
pub fn colliding_route(subnet: Ipv4Net, routes: &[Ipv4Net]) -> Option<Ipv4Net> {
    routes
        .iter()
        .copied()
        .find(|route| route.prefix_len() > DEFAULT_ROUTE_PREFIX && overlap(*route, subnet))
}

/// Whether `subnet` can be a network's beside the host's `routes` and the other `networks`; gives it without host bits.
pub fn check_subnet(
    subnet: Ipv4Net,
    routes: &[Ipv4Net],
    networks: &[Ipv4Net],
) -> Result<Ipv4Net, SubnetError> {
    let subnet = subnet.trunc();
    if !(SHORTEST_PREFIX..=LONGEST_PREFIX).contains(&subnet.prefix_len()) {
        return Err(SubnetError::Prefix { subnet });
    }
    // RFC 6890: this host, loopback, link-local, multicast and what lies behind it.
    let reserved = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"];
    let reserved = reserved.iter().filter_map(|text| text.parse::<Ipv4Net>().ok());
    if reserved.into_iter().any(|net| overlap(net, subnet)) {
        return Err(SubnetError::Reserved { subnet });
    }
    if let Some(with) = networks.iter().copied().find(|net| overlap(*net, subnet)) {
        return Err(SubnetError::Network { subnet, with });
    }
    match colliding_route(subnet, routes) {
        Some(with) => Err(SubnetError::Route { subnet, with }),
        None => Ok(subnet),
    }
}

/// The first /22 of `pool` (or the pool itself, when it is smaller) that collides with nothing.
pub fn free_subnet(pool: Ipv4Net, routes: &[Ipv4Net], networks: &[Ipv4Net]) -> Result<Ipv4Net, SubnetError> {
    let prefix = PREFIX.max(pool.prefix_len());
    let mut candidates = pool.trunc().subnets(prefix).into_iter().flatten();
    candidates
        .find_map(|subnet| check_subnet(subnet, routes, networks).ok())
        .ok_or(SubnetError::PoolExhausted { pool })
}

/// Whether a VM may have `address` in `subnet`: not the subnet's own, not the host's (the first), not the broadcast.
pub fn is_for_vms(subnet: Ipv4Net, address: Ipv4Addr) -> bool {
    let (first, last) = for_vms(subnet);
    (first..=last).contains(&u32::from(address))
}

/// The first and the last address for VMs.
fn for_vms(subnet: Ipv4Net) -> (u32, u32) {
    let (network, broadcast) = (u32::from(subnet.network()), u32::from(subnet.broadcast()));
    (network.saturating_add(2), broadcast.saturating_sub(1))
}

/// The next free address behind the `last` one that was handed out, round and round: one that was given back rests until
/// all others had their turn, so that nobody who remembers it reaches the wrong VM. `taken` is sorted.
pub fn next_address(subnet: Ipv4Net, taken: &[Ipv4Addr], last: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
    let (first_host, last_host) = for_vms(subnet);
    if first_host > last_host {
        return None;
    }
    let start = match last.map(u32::from) {
        Some(last) if (first_host..last_host).contains(&last) => last + 1,
        _ => first_host,
    };
    let free = |from: u32, to: u32| {
        let mut next = from;
        let position = taken.partition_point(|address| u32::from(*address) < from);
        for address in &taken[position..] {
            if u32::from(*address) != next || next > to {
                break;
            }
            next = next.saturating_add(1);
        }
        (next <= to).then(|| Ipv4Addr::from(next))
    };
    free(start, last_host).or_else(|| free(first_host, start.saturating_sub(1)))
}

/// The MAC address that goes with an address: locally administered, not a group's, unique as the address is.
pub fn mac_of(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    Mac([0x02, 0x6f, a, b, c, d])
}

/// The IPv6 address that goes with an address: it has the same number in its subnet.
pub fn ipv6_of(ipv6: Ipv6Net, ipv4: Ipv4Net, address: Ipv4Addr) -> Ipv6Addr {
    let number = u32::from(address) - u32::from(ipv4.network()).min(u32::from(address));
    Ipv6Addr::from(u128::from(ipv6.network()) + u128::from(number))
}

/// A unique local /64 (RFC 4193, section 3.2) with this global id, which is random.
pub fn unique_local(global_id: [u8; 5]) -> Ipv6Net {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&global_id);
    Ipv6Net::new_assert(Ipv6Addr::from(octets), 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn nets(texts: &[&str]) -> Vec<Ipv4Net> {
        texts.iter().map(|text| net(text)).collect()
    }

    #[test]
    fn the_first_subnet_that_nobody_has() {
        let check = |routes: &[&str], networks: &[&str], expected: &str| {
            let found = free_subnet(net("10.87.0.0/16"), &nets(routes), &nets(networks));
            assert_eq!(found, Ok(net(expected)), "{routes:?} {networks:?}");
        };
        check(&[], &[], "10.87.0.0/22");
        check(&["0.0.0.0/0", "0.0.0.0/1", "192.168.1.0/24"], &[], "10.87.0.0/22");
        check(&[], &["10.87.0.0/24"], "10.87.4.0/22");
        check(&["10.87.1.128/25"], &["10.87.0.0/24"], "10.87.4.0/22");
        check(&["10.87.0.0/17"], &[], "10.87.128.0/22");
        check(&["10.87.0.7/32"], &[], "10.87.4.0/22");
        let all = free_subnet(net("10.87.0.0/16"), &nets(&["10.0.0.0/8"]), &[]);
        assert!(matches!(all, Err(SubnetError::PoolExhausted { .. })));
        assert_eq!(free_subnet(net("10.9.8.0/26"), &[], &[]), Ok(net("10.9.8.0/26")));
        let small = free_subnet(net("10.9.8.0/26"), &[], &nets(&["10.9.8.0/26"]));
        assert!(matches!(small, Err(SubnetError::PoolExhausted { .. })));
    }

    #[test]
    fn a_subnet_that_means_something_else_is_refused() {
        let refused =
            |subnet: &str| check_subnet(net(subnet), &nets(&["10.3.0.0/16"]), &nets(&["10.4.4.0/24"]));
        assert_eq!(refused("10.5.5.5/24"), Ok(net("10.5.5.0/24")));
        for bad in ["10.5.5.0/30", "10.5.5.5/32", "8.0.0.0/7", "0.0.0.0/0"] {
            assert!(matches!(refused(bad), Err(SubnetError::Prefix { .. })), "{bad}");
        }
        for bad in [
            "127.0.3.0/24",
            "169.254.1.0/24",
            "224.0.0.0/8",
            "240.0.0.0/24",
            "0.1.2.0/24",
        ] {
            assert!(matches!(refused(bad), Err(SubnetError::Reserved { .. })), "{bad}");
        }
        assert!(matches!(refused("10.3.9.0/24"), Err(SubnetError::Route { .. })));
        assert!(matches!(refused("10.4.0.0/16"), Err(SubnetError::Network { .. })));
    }

    fn any_subnet() -> impl Strategy<Value = Ipv4Net> {
        (any::<u32>(), SHORTEST_PREFIX..=LONGEST_PREFIX)
            .prop_map(|(address, prefix)| Ipv4Net::new_assert(Ipv4Addr::from(address), prefix).trunc())
    }

    proptest! {
        /// Whatever comes and goes: no address is given twice, none is the host's, and a full subnet is really full.
        #[test]
        fn addresses_are_unique_and_for_vms(
            subnet in any_subnet(),
            steps in proptest::collection::vec(any::<(bool, prop::sample::Index)>(), 1..200),
        ) {
            let (mut taken, mut last) = (BTreeSet::new(), None);
            let room = (1_u64 << (32 - subnet.prefix_len())) - 3;
            for (gives, which) in steps {
                if !gives && !taken.is_empty() {
                    let back = *which.get(&taken.iter().copied().collect::<Vec<_>>());
                    taken.remove(&back);
                    continue;
                }
                let sorted: Vec<_> = taken.iter().copied().collect();
                let Some(given) = next_address(subnet, &sorted, last) else {
                    prop_assert_eq!(taken.len() as u64, room);
                    continue;
                };
                prop_assert!(taken.insert(given), "{} twice", given);
                prop_assert!(is_for_vms(subnet, given));
                prop_assert!(subnet.contains(&given));
                prop_assert!(![subnet.network(), subnet.broadcast()].contains(&given));
                prop_assert!(u32::from(given) != u32::from(subnet.network()) + 1, "the host's");
                last = Some(given);
            }
        }

        /// An address that came back is handed out again only after every other free one.
        #[test]
        fn addresses_rest(last_octet in 2_u8..=254) {
            let subnet = net("10.1.1.0/24");
            let back = Ipv4Addr::new(10, 1, 1, last_octet);
            let (mut taken, mut last) = (Vec::new(), Some(back));
            for _ in 0..252 {
                let given = next_address(subnet, &taken, last).unwrap();
                prop_assert!(given != back);
                taken.push(given);
                taken.sort();
                last = Some(given);
            }
            prop_assert_eq!(next_address(subnet, &taken, last), Some(back));
        }

        /// A subnet that is chosen or let pass touches nothing that was there.
        #[test]
        fn subnets_collide_with_nothing(
            asked in any_subnet(),
            routes in proptest::collection::vec(any_subnet(), 0..8),
            networks in proptest::collection::vec(any_subnet(), 0..8),
        ) {
            for found in [check_subnet(asked, &routes, &networks), free_subnet(asked, &routes, &networks)] {
                let Ok(found) = found else { continue };
                prop_assert!(asked.contains(&found));
                for other in routes.iter().chain(&networks) {
                    prop_assert!(!other.contains(&found) && !found.contains(other), "{} {}", found, other);
                }
            }
        }

        /// What goes with an address is as unique as it is, and of the right kind.
        #[test]
        fn mac_and_ipv6_follow_the_address(subnet in any_subnet(), one in any::<u32>(), other in any::<u32>()) {
            let ula = unique_local([1, 2, 3, 4, 5]);
            let within = |n: u32| Ipv4Addr::from(u32::from(subnet.network()) | (n & u32::from(subnet.hostmask())));
            let (one, other) = (within(one), within(other));
            let mac = mac_of(one);
            prop_assert_eq!(mac.0[0] & 3, 2, "local, not a group's");
            prop_assert_eq!(mac == mac_of(other), one == other);
            let six = ipv6_of(ula, subnet, one);
            prop_assert!(ula.contains(&six));
            prop_assert_eq!(six == ipv6_of(ula, subnet, other), one == other);
        }
    }
}
