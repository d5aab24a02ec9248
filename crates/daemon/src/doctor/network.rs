//! What this host offers for networks beside interfaces (which are the `network` capability's own), filters (the
//! `firewall`'s) and port 53 (the `names`'): forwarding, a resolver. VMs with `--network none` run without any of it, so
//! nothing here is a failure.

use offshoot_model::{Finding, Severity};
use offshoot_net::Namespace;

const PART: &str = "network";

/// What the host says.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// `net.ipv4.ip_forward`.
    forwarding: Option<bool>,
    /// `/etc/resolv.conf`.
    resolv_conf: Option<String>,
}

/// Asks the kernel about the namespace of VMs, and reads two small files.
pub(super) fn check(namespace: &Namespace) -> Vec<Finding> {
    let read = |path: &str| std::fs::read_to_string(path);
    // The thread's own: it is in the namespace, the process is not.
    let forwarding = namespace.run(|| read("/proc/sys/net/ipv4/ip_forward"));
    judge(&Facts {
        forwarding: forwarding.flatten().ok().map(|text| text.trim() != "0"),
        resolv_conf: read("/etc/resolv.conf").ok(),
    })
}

fn judge(facts: &Facts) -> Vec<Finding> {
    vec![forwarding(facts), resolver(facts)]
}

fn warning(id: &str, message: impl Into<String>, cost: &str, hint: &str) -> Finding {
    Finding::new(PART, Severity::Warning, message, hint)
        .id(id)
        .cost(cost)
}

/// Never more than a word: it is turned on with the first VM that needs it.
fn forwarding(facts: &Facts) -> Finding {
    let message = match facts.forwarding {
        Some(true) => "packets are forwarded (net.ipv4.ip_forward)",
        Some(false) => "packets are not forwarded until the first VM needs it (net.ipv4.ip_forward = 0)",
        None => "whether packets are forwarded cannot be read",
    };
    Finding::ok(PART, message).id("forwarding")
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
            forwarding: Some(true),
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
    fn what_networks_need_is_a_warning() {
        check(&well(), &[]);
        check(
            &Facts {
                forwarding: Some(false),
                ..well()
            },
            &[],
        );
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
