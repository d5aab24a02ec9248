//! What this host offers for networks. VMs of this version have none, so nothing here is a failure, and it costs nothing
//! yet: who prepares a host sees in time what will be missing. The resolver is used today, for pulls.

use std::net::IpAddr;
use std::path::Path;

use offshoot_model::{Finding, Severity};
use offshoot_sys::programs::find;

use super::ports::bound_to;

const PART: &str = "network";
/// The bridge that VMs will be on.
const BRIDGE: &str = "offshoot0";
const DNS_PORT: u16 = 53;
const LATER: &str = "nothing yet: networks of VMs, which come with a later version, need it";

/// What the host says.
#[derive(Clone, Debug, Default)]
struct Facts {
    nft: Option<String>,
    /// `net.ipv4.ip_forward`.
    forwarding: Option<bool>,
    /// An interface has the name of our bridge.
    bridge_name_taken: bool,
    /// Who has port 53, UDP or TCP.
    dns_port: Vec<IpAddr>,
    /// `/etc/resolv.conf`.
    resolv_conf: Option<String>,
}

/// Asks the kernel and reads two small files.
pub(super) fn check() -> Vec<Finding> {
    let read = |path: &str| std::fs::read_to_string(path);
    let tables = [("udp", false), ("udp6", false), ("tcp", true), ("tcp6", true)];
    let mut dns_port: Vec<_> = tables
        .iter()
        .flat_map(|(name, is_tcp)| {
            bound_to(
                &read(&format!("/proc/net/{name}")).unwrap_or_default(),
                DNS_PORT,
                *is_tcp,
            )
        })
        .collect();
    dns_port.sort();
    dns_port.dedup();
    judge(&Facts {
        nft: find("nft").map(|path| path.display().to_string()),
        forwarding: read("/proc/sys/net/ipv4/ip_forward")
            .ok()
            .map(|text| text.trim() != "0"),
        bridge_name_taken: Path::new("/sys/class/net").join(BRIDGE).exists(),
        dns_port,
        resolv_conf: read("/etc/resolv.conf").ok(),
    })
}

fn judge(facts: &Facts) -> Vec<Finding> {
    vec![
        nft(facts),
        forwarding(facts),
        bridge(facts),
        dns_port(facts),
        resolver(facts),
    ]
}

fn warning(id: &str, message: impl Into<String>, cost: &str, hint: &str) -> Finding {
    Finding::new(PART, Severity::Warning, message, hint)
        .id(id)
        .cost(cost)
}

fn nft(facts: &Facts) -> Finding {
    match &facts.nft {
        Some(path) => Finding::ok(PART, format!("nft at {path}")).id("nft"),
        None => warning(
            "nft-missing",
            "nft is not installed",
            LATER,
            "apt install nftables",
        ),
    }
}

/// Never more than a word: who brings networks up turns it on, and it is not ours to turn on before.
fn forwarding(facts: &Facts) -> Finding {
    let message = match facts.forwarding {
        Some(true) => "the host forwards packets (net.ipv4.ip_forward)",
        Some(false) => "the host does not forward packets (net.ipv4.ip_forward = 0); nothing needs it yet",
        None => "whether the host forwards packets cannot be read",
    };
    Finding::ok(PART, message).id("forwarding")
}

fn bridge(facts: &Facts) -> Finding {
    if facts.bridge_name_taken {
        return warning(
            "bridge-name-taken",
            format!("an interface is called `{BRIDGE}` and is not ours"),
            "nothing yet: the bridge of VMs, which comes with a later version, cannot have that name",
            &format!("look at it with `ip -d link show {BRIDGE}`, and rename or remove it"),
        );
    }
    Finding::ok(PART, format!("the name `{BRIDGE}` is free")).id("bridge-name")
}

fn dns_port(facts: &Facts) -> Finding {
    // One that has only its own address, as systemd-resolved on 127.0.0.53, leaves the others to us.
    match facts.dns_port.iter().find(|address| address.is_unspecified()) {
        Some(address) => warning(
            "dns-port-taken",
            format!("a DNS server listens on every address ({address} port {DNS_PORT})"),
            "nothing yet: names of VMs, which come with a later version, cannot be served",
            &format!(
                "see who it is with `ss -lunp sport = :{DNS_PORT}`, and bind it to the addresses it needs"
            ),
        ),
        None => Finding::ok(PART, format!("port {DNS_PORT} is free on a bridge of ours")).id("dns-port"),
    }
}

fn resolver(facts: &Facts) -> Finding {
    let servers = name_servers(facts.resolv_conf.as_deref().unwrap_or_default());
    match servers.as_slice() {
        [] => warning(
            "resolver-missing",
            "/etc/resolv.conf names no DNS server",
            "images cannot be pulled from registries by name, nor made from a mirror",
            "write `nameserver ADDRESS` into /etc/resolv.conf, or install systemd-resolved",
        ),
        ["127.0.0.53" | "127.0.0.54", ..] => {
            Finding::ok(PART, "names are looked up by systemd-resolved").id("resolver")
        }
        [first, ..] => Finding::ok(PART, format!("names are looked up at {first}")).id("resolver"),
    }
}

/// The servers in the text of resolv.conf(5).
fn name_servers(text: &str) -> Vec<&str> {
    text.lines().filter_map(name_server).collect()
}

fn name_server(line: &str) -> Option<&str> {
    let mut words = line.split_ascii_whitespace();
    (words.next()? == "nameserver").then(|| words.next())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Facts {
        Facts {
            nft: Some("/usr/sbin/nft".into()),
            forwarding: Some(true),
            bridge_name_taken: false,
            dns_port: vec!["127.0.0.53".parse().unwrap()],
            resolv_conf: Some("# ours\nnameserver 10.0.0.1\nsearch lan\n".into()),
        }
    }

    fn check(facts: &Facts, expected: &[&str]) {
        let findings = judge(facts);
        let bad: Vec<_> = findings
            .iter()
            .filter(|found| found.severity != Severity::Ok)
            .collect();
        let ids: Vec<_> = bad.iter().map(|found| found.id.as_str()).collect();
        assert_eq!(ids, expected, "{facts:?}");
        for found in bad {
            assert_eq!(
                found.severity,
                Severity::Warning,
                "networks are no reason to refuse anything"
            );
            assert!(!found.cost.is_empty() && !found.hint.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn what_networks_will_need_is_a_warning() {
        check(&well(), &[]);
        check(&Facts { nft: None, ..well() }, &["nft-missing"]);
        check(
            &Facts {
                forwarding: Some(false),
                ..well()
            },
            &[],
        );
        check(
            &Facts {
                bridge_name_taken: true,
                ..well()
            },
            &["bridge-name-taken"],
        );
        for everywhere in ["0.0.0.0", "::"] {
            let dns_port = vec!["127.0.0.1".parse().unwrap(), everywhere.parse().unwrap()];
            check(&Facts { dns_port, ..well() }, &["dns-port-taken"]);
        }
        for nowhere in [None, Some(""), Some("#nameserver 1.1.1.1\nnameserver\n")] {
            let resolv_conf = nowhere.map(str::to_owned);
            check(
                &Facts {
                    resolv_conf,
                    ..well()
                },
                &["resolver-missing"],
            );
        }
    }

    #[test]
    fn name_servers_are_read() {
        assert_eq!(
            name_servers("nameserver 127.0.0.53\n  nameserver ::1\noptions edns0"),
            ["127.0.0.53", "::1"]
        );
        let resolved = judge(&Facts {
            resolv_conf: Some("nameserver 127.0.0.53".into()),
            ..well()
        });
        assert!(
            resolved
                .iter()
                .any(|found| found.message.contains("systemd-resolved"))
        );
    }
}
