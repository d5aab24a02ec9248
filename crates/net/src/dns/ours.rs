//! What this server says by itself, without asking anybody: a pure function of the question, who asks, and what runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::op::{Query, ResponseCode};
use hickory_proto::rr::rdata::{NS, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use ipnet::IpNet;
use offshoot_model::Network;

use super::domain::Domain;
use super::measure::Kind;
use super::reply::Reply;
use super::{Addresses, HOST, Sight, Zone};

/// How long clients may keep what is said of a VM, that it is not there included, seconds. It is gone for them when it is
/// gone here, and a second later for those that keep answers.
const TTL_S: u32 = 1;

/// What becomes of a question.
#[derive(Debug, PartialEq)]
pub(crate) enum Decision {
    /// This is the answer.
    Say(Reply, Kind),
    /// It is not ours: ask an upstream.
    Forward,
}

/// Whose words these are: the server on one network's gateway.
pub(crate) struct Authority<'a> {
    pub(crate) domain: &'a Domain,
    pub(crate) zone: &'a dyn Zone,
    /// The network on whose gateway it was asked.
    pub(crate) network: &'a Network,
    /// What the client gets to see.
    pub(crate) sight: Sight<'a>,
}

/// A name of ours, as far as it exists.
enum Owned {
    /// With these addresses.
    Host(Addresses),
    /// With this name.
    Pointer(Name),
    /// The top of a zone.
    Apex,
    /// Something lies below it.
    Between,
    /// Nothing.
    Missing,
}

impl Authority<'_> {
    /// Decides about a question.
    pub(crate) fn decide(&self, query: &Query) -> Decision {
        let kind = query.query_type();
        let code = u16::from(kind);
        // Transfers and what else is no type of a record, but ANY (255); and OPT (41), which is none either.
        if query.query_class() != DNSClass::IN || code == 0 || code == 41 || (128..255).contains(&code) {
            return refuse();
        }
        let name = query.name();
        if self.domain.name().zone_of(name) {
            let owned = self.in_domain(name);
            return self.say(query, &owned, self.domain.name(), Kind::Name);
        }
        let reverse = match name.parse_arpa_name() {
            Ok(range) => self.reverse(query, range),
            Err(_) => self.no_address(query),
        };
        if let Some(decision) = reverse {
            return decision;
        }
        if name.is_localhost() {
            let loopback = Addresses {
                ipv4: Ipv4Addr::LOCALHOST,
                ipv6: Ipv6Addr::LOCALHOST,
            };
            return say_records(query, &Owned::Host(loopback), Kind::Other);
        }
        let last = name.iter().next_back().map(<[u8]>::to_ascii_lowercase);
        // Names that never are in the DNS (RFC 7686, RFC 6761).
        if matches!(last.as_deref(), Some(b"onion" | b"invalid")) {
            return Decision::Say(Reply::empty(ResponseCode::NXDomain), Kind::Other);
        }
        if name.num_labels() == 1 {
            return self.single_label(query);
        }
        Decision::Forward
    }

    /// A name in or at the top of the domain.
    fn in_domain(&self, name: &Name) -> Owned {
        match name.num_labels() - self.domain.name().num_labels() {
            0 => Owned::Apex,
            1 => name
                .iter()
                .next()
                .and_then(|label| std::str::from_utf8(label).ok())
                .and_then(|label| self.host(label))
                .map_or(Owned::Missing, Owned::Host),
            _ => Owned::Missing,
        }
    }

    /// The VM with this name, or the host.
    fn host(&self, label: &str) -> Option<Addresses> {
        let vm = self.zone.addresses(label, self.sight);
        vm.or_else(|| {
            label.eq_ignore_ascii_case(HOST).then(|| Addresses {
                ipv4: self.network.gateway4(),
                ipv6: self.network.gateway6(),
            })
        })
    }

    /// An address, or a part of one, in a range of ours.
    fn reverse(&self, query: &Query, range: IpNet) -> Option<Decision> {
        let address = range.network();
        let whole = range.prefix_len() == range.max_prefix_len();
        if whole && address.is_loopback() {
            let owned = self.loopback(address, query.name());
            return Some(say_records(query, &owned, Kind::Other));
        }
        let (network, apex) = self.zone.networks().into_iter().find_map(|network| {
            let apex = apex_of(&network, address)?;
            Some((network, apex))
        })?;
        if range.prefix_len() < apex.prefix_len() {
            return None;
        }
        let owned = if range == apex && !whole {
            Owned::Apex
        } else if whole {
            self.pointer(&network, address, query.name())
        } else {
            Owned::Between
        };
        Some(self.say(query, &owned, &reverse_name(apex), Kind::Address))
    }

    /// What is below an address or a reverse zone of ours, and no address itself.
    fn no_address(&self, query: &Query) -> Option<Decision> {
        let above = std::iter::successors(Some(query.name().base_name()), |name| {
            (!name.is_root()).then(|| name.base_name())
        });
        let range = above.into_iter().find_map(|name| name.parse_arpa_name().ok())?;
        let networks = self.zone.networks();
        let apex = networks
            .iter()
            .find_map(|network| apex_of(network, range.network()))?;
        (range.prefix_len() >= apex.prefix_len())
            .then(|| self.say(query, &Owned::Missing, &reverse_name(apex), Kind::Address))
    }

    fn pointer(&self, network: &Arc<Network>, address: IpAddr, name: &Name) -> Owned {
        // Other spellings of the numbers are other names.
        if Name::from(address) != *name {
            return Owned::Missing;
        }
        if let Some(vm) = self.zone.name(address, self.sight) {
            return Owned::Pointer(self.domain.below(&vm.as_str().to_ascii_lowercase()));
        }
        let visible = match self.sight {
            Sight::Everything => true,
            Sight::Network(own) => *own == network.name,
        };
        let gateways = [IpAddr::V4(network.gateway4()), IpAddr::V6(network.gateway6())];
        if visible && gateways.contains(&address) {
            Owned::Pointer(self.domain.below(HOST))
        } else {
            Owned::Missing
        }
    }

    fn loopback(&self, address: IpAddr, name: &Name) -> Owned {
        let localhost = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        match Name::from_ascii("localhost.") {
            Ok(target) if localhost.contains(&address) && Name::from(address) == *name => {
                Owned::Pointer(target)
            }
            _ => Owned::Missing,
        }
    }

    /// A name without a dot: a VM's, or nobody's. The world is not told what people call their machines.
    fn single_label(&self, query: &Query) -> Decision {
        // What a resolver that checks signatures by itself must know of top-level domains.
        if matches!(
            query.query_type(),
            RecordType::NS | RecordType::SOA | RecordType::DS | RecordType::DNSKEY
        ) {
            return Decision::Forward;
        }
        // Above our domain there is something, even if nobody else says so: "no such name" would include all below it.
        if query.name().zone_of(self.domain.name()) {
            return say_records(query, &Owned::Between, Kind::Name);
        }
        let label = query.name().iter().next();
        let label = label.and_then(|label| std::str::from_utf8(label).ok());
        let vm = label.and_then(|label| self.zone.addresses(label, self.sight));
        say_records(query, &vm.map_or(Owned::Missing, Owned::Host), Kind::Name)
    }

    /// An answer with authority: who has it is named where there is nothing to say.
    fn say(&self, query: &Query, owned: &Owned, apex: &Name, kind: Kind) -> Decision {
        let soa = || {
            let mailbox = self.domain.below("hostmaster");
            // Nobody transfers the zone, so its number says nothing.
            let soa = SOA::new(self.domain.below(HOST), mailbox, 1, 3600, 600, 86_400, TTL_S);
            Record::from_rdata(apex.clone(), TTL_S, RData::SOA(soa))
        };
        let Decision::Say(mut reply, kind) = say_records(query, owned, kind) else {
            return Decision::Forward;
        };
        if matches!(owned, Owned::Apex) {
            let asked = query.query_type();
            if matches!(asked, RecordType::SOA | RecordType::ANY) {
                reply.answers.push(soa());
            }
            if matches!(asked, RecordType::NS | RecordType::ANY) {
                let server = RData::NS(NS(self.domain.below(HOST)));
                reply
                    .answers
                    .push(Record::from_rdata(apex.clone(), TTL_S, server));
            }
        }
        if reply.answers.is_empty() {
            reply.authorities.push(soa());
        }
        Decision::Say(reply, kind)
    }
}

/// The records of a name that is asked for.
fn say_records(query: &Query, owned: &Owned, kind: Kind) -> Decision {
    let asked = query.query_type();
    let wants = |kind| asked == kind || asked == RecordType::ANY;
    let record = |data| Record::from_rdata(query.name().clone(), TTL_S, data);
    let mut answers = Vec::new();
    match owned {
        Owned::Host(addresses) => {
            if wants(RecordType::A) {
                answers.push(record(RData::from(addresses.ipv4)));
            }
            if wants(RecordType::AAAA) {
                answers.push(record(RData::from(addresses.ipv6)));
            }
        }
        Owned::Pointer(target) if wants(RecordType::PTR) => {
            answers.push(record(RData::PTR(PTR(target.clone()))));
        }
        Owned::Pointer(_) | Owned::Apex | Owned::Between | Owned::Missing => {}
    }
    let code = match owned {
        Owned::Missing => ResponseCode::NXDomain,
        _ => ResponseCode::NoError,
    };
    let reply = Reply {
        code,
        authoritative: true,
        answers,
        authorities: Vec::new(),
    };
    Decision::Say(reply, kind)
}

fn refuse() -> Decision {
    Decision::Say(Reply::empty(ResponseCode::Refused), Kind::Other)
}

/// The reverse zone in which an address of a network lies: its prefix, to the next whole label of the name.
fn apex_of(network: &Network, address: IpAddr) -> Option<IpNet> {
    let (contains, length, label) = match address {
        IpAddr::V4(v4) => (network.ipv4.contains(&v4), network.ipv4.prefix_len(), 8),
        IpAddr::V6(v6) => (network.ipv6.contains(&v6), network.ipv6.prefix_len(), 4),
    };
    let length = length.div_ceil(label) * label;
    let apex = IpNet::new(address, length).ok()?;
    contains.then(|| apex.trunc())
}

/// The domains in which the addresses of a network have names, without a dot at the end.
pub fn reverse_zones(network: &Network) -> Vec<String> {
    let v4 = IpNet::V4(network.ipv4);
    let v6 = IpNet::V6(network.ipv6);
    [v4, v6]
        .into_iter()
        .flat_map(|range| {
            let apex = apex_of(network, range.network()).unwrap_or(range);
            range
                .subnets(apex.prefix_len())
                .into_iter()
                .flatten()
                .map(reverse_name)
        })
        .map(|name| name.to_ascii().trim_end_matches('.').to_owned())
        .collect()
}

/// The name of a reverse zone.
fn reverse_name(zone: IpNet) -> Name {
    let name = Name::from(zone.network());
    let (label, rest) = match zone {
        IpNet::V4(_) => (8, 2),
        IpNet::V6(_) => (4, 2),
    };
    name.trim_to(usize::from(zone.prefix_len() / label) + rest)
}

#[cfg(test)]
pub(crate) mod tests {
    use offshoot_model::{NetworkName, VmName};

    use super::*;

    /// Two networks with a VM each.
    pub(crate) struct Two;

    pub(crate) fn network(n: u8) -> Arc<Network> {
        Arc::new(Network {
            name: ["default", "lab"][usize::from(n)].parse().unwrap(),
            bridge: format!("ofs-{n}"),
            ipv4: format!("10.87.{n}.0/24").parse().unwrap(),
            ipv6: format!("fd12:3456:789a:{n}::/64").parse().unwrap(),
            created_ms: 0,
        })
    }

    const VMS: [&str; 2] = ["web", "db"];

    impl Zone for Two {
        fn is_ready(&self) -> bool {
            true
        }

        fn addresses(&self, name: &str, sight: Sight<'_>) -> Option<Addresses> {
            let n = VMS.iter().position(|vm| vm.eq_ignore_ascii_case(name))?;
            let n = u8::try_from(n).unwrap();
            seen(sight, n).then(|| Addresses {
                ipv4: Ipv4Addr::new(10, 87, n, 2),
                ipv6: format!("fd12:3456:789a:{n}::2").parse().unwrap(),
            })
        }

        fn name(&self, address: IpAddr, sight: Sight<'_>) -> Option<VmName> {
            VMS.iter()
                .find(|vm| {
                    self.addresses(vm, sight).is_some_and(|found| {
                        [IpAddr::V4(found.ipv4), IpAddr::V6(found.ipv6)].contains(&address)
                    })
                })
                .map(|vm| vm.parse().unwrap())
        }

        fn networks(&self) -> Vec<Arc<Network>> {
            vec![network(0), network(1)]
        }
    }

    fn seen(sight: Sight<'_>, n: u8) -> bool {
        match sight {
            Sight::Everything => true,
            Sight::Network(name) => *name == network(n).name,
        }
    }

    /// `CODE [AA] answers... [| authority...]`, or `forward`.
    fn decide(name: &str, kind: RecordType, everything: bool) -> String {
        let (own, default) = (network(0), NetworkName::default_network());
        let domain: Domain = "vm.internal".parse().unwrap();
        let authority = Authority {
            domain: &domain,
            zone: &Two,
            network: &own,
            sight: if everything {
                Sight::Everything
            } else {
                Sight::Network(&default)
            },
        };
        let name = Name::from_ascii(name).unwrap();
        match authority.decide(&Query::query(name, kind)) {
            Decision::Forward => "forward".into(),
            Decision::Say(reply, _) => {
                let words = |records: &[Record]| -> String {
                    let words = records.iter().map(|record| format!(" {}", record.data));
                    words.collect()
                };
                let aa = if reply.authoritative { " AA" } else { "" };
                let mut text = format!("{:?}{aa}{}", reply.code, words(&reply.answers));
                if let [soa] = &reply.authorities[..] {
                    text += &format!(" | {} {}", soa.name, soa.record_type());
                }
                text
            }
        }
    }

    #[test]
    fn a_guest_is_told_of_its_network() {
        use RecordType as T;
        for (name, kind, expected) in [
            ("web.vm.internal.", T::A, "NoError AA 10.87.0.2"),
            ("WEB.VM.Internal.", T::AAAA, "NoError AA fd12:3456:789a::2"),
            ("web.vm.internal.", T::MX, "NoError AA | vm.internal. SOA"),
            ("nobody.vm.internal.", T::A, "NXDomain AA | vm.internal. SOA"),
            ("x.web.vm.internal.", T::A, "NXDomain AA | vm.internal. SOA"),
            ("db.vm.internal.", T::A, "NXDomain AA | vm.internal. SOA"),
            ("host.vm.internal.", T::A, "NoError AA 10.87.0.1"),
            ("vm.internal.", T::NS, "NoError AA host.vm.internal."),
            ("vm.internal.", T::A, "NoError AA | vm.internal. SOA"),
            (
                "vm.internal.",
                T::SOA,
                "NoError AA host.vm.internal. hostmaster.vm.internal. 1 3600 600 86400 1",
            ),
            ("web.", T::A, "NoError AA 10.87.0.2"),
            ("printer.", T::A, "NXDomain AA"),
            ("internal.", T::A, "NoError AA"),
            ("com.", T::DS, "forward"),
            (".", T::NS, "forward"),
            ("example.org.", T::A, "forward"),
            ("other.internal.", T::A, "forward"),
            ("notvm.internal.", T::A, "forward"),
            ("localhost.", T::A, "NoError AA 127.0.0.1"),
            ("x.onion.", T::A, "NXDomain"),
            ("vm.internal.", T::AXFR, "Refused"),
            ("vm.internal.", T::IXFR, "Refused"),
            ("example.org.", T::AXFR, "Refused"),
            ("web.vm.internal.", T::OPT, "Refused"),
        ] {
            assert_eq!(decide(name, kind, false), expected, "{name} {kind}");
        }
    }

    #[test]
    fn the_host_is_told_of_all() {
        assert_eq!(
            decide("db.vm.internal.", RecordType::A, true),
            "NoError AA 10.87.1.2"
        );
        assert_eq!(
            decide("2.1.87.10.in-addr.arpa.", RecordType::PTR, true),
            "NoError AA db.vm.internal."
        );
    }

    #[test]
    fn a_large_network_has_several_reverse_zones() {
        let network = Network {
            ipv4: "10.87.4.0/22".parse().unwrap(),
            ..(*network(0)).clone()
        };
        assert_eq!(
            reverse_zones(&network),
            [
                "4.87.10.in-addr.arpa",
                "5.87.10.in-addr.arpa",
                "6.87.10.in-addr.arpa",
                "7.87.10.in-addr.arpa",
                "0.0.0.0.a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa",
            ]
        );
    }

    #[test]
    fn addresses_have_names() {
        let v6 = |n: u8, rest: &str| format!("{rest}.{n}.0.0.0.a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa.");
        let low = "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0";
        let apex = "0.0.0.0.a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa.";
        for (name, expected) in [
            (
                "2.0.87.10.in-addr.arpa.".to_owned(),
                "NoError AA web.vm.internal.".to_owned(),
            ),
            (
                "1.0.87.10.in-addr.arpa.".into(),
                "NoError AA host.vm.internal.".into(),
            ),
            (
                "9.0.87.10.IN-ADDR.arpa.".into(),
                "NXDomain AA | 0.87.10.in-addr.arpa. SOA".into(),
            ),
            (
                "02.0.87.10.in-addr.arpa.".into(),
                "NXDomain AA | 0.87.10.in-addr.arpa. SOA".into(),
            ),
            // Another network's: it is not told, and nobody else is asked.
            (
                "2.1.87.10.in-addr.arpa.".into(),
                "NXDomain AA | 1.87.10.in-addr.arpa. SOA".into(),
            ),
            (
                "1.1.87.10.in-addr.arpa.".into(),
                "NXDomain AA | 1.87.10.in-addr.arpa. SOA".into(),
            ),
            (
                "0.87.10.in-addr.arpa.".into(),
                "NoError AA | 0.87.10.in-addr.arpa. SOA".into(),
            ),
            ("87.10.in-addr.arpa.".into(), "forward".into()),
            ("2.9.87.10.in-addr.arpa.".into(), "forward".into()),
            (
                "x.0.87.10.in-addr.arpa.".into(),
                "NXDomain AA | 0.87.10.in-addr.arpa. SOA".into(),
            ),
            (
                "x.2.0.87.10.in-addr.arpa.".into(),
                "NXDomain AA | 0.87.10.in-addr.arpa. SOA".into(),
            ),
            ("x.9.87.10.in-addr.arpa.".into(), "forward".into()),
            ("1.0.0.127.in-addr.arpa.".into(), "NoError AA localhost.".into()),
            (v6(0, low), "NoError AA web.vm.internal.".into()),
            (v6(0, &low.replace('2', "9")), format!("NXDomain AA | {apex} SOA")),
            (v6(0, "0.0"), format!("NoError AA | {apex} SOA")),
            (apex.into(), format!("NoError AA | {apex} SOA")),
        ] {
            assert_eq!(decide(&name, RecordType::PTR, false), expected, "{name}");
        }
    }
}
