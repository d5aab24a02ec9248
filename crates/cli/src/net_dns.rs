//! `net dns`: who answers for the names of VMs, and how this host gets to ask.
//!
//! With systemd-resolved, one file sends it to us for the domain of VMs and the reverse domains of their networks. Without,
//! the user is told what to add where: that is not ours to change.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::dns::DnsInfo;
use offshoot_model::ErrorKind;

use crate::error::Failure;
use crate::output::{Output, clean, json, line, table};

/// What systemd-resolved reads besides its own file (resolved.conf(5)).
const DROP_IN: &str = "/etc/systemd/resolved.conf.d/offshoot.conf";

#[derive(Clone, Debug, Args)]
pub(crate) struct DnsArgs {
    /// Let this host look up VMs: set up systemd-resolved, or show what to add where there is none (root)
    #[arg(long, conflicts_with = "output")]
    install: bool,
    /// Undo it (root)
    #[arg(long, conflicts_with_all = ["install", "output"])]
    uninstall: bool,
    /// How to show the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// What this host looks names up with.
struct Host {
    drop_in: PathBuf,
    /// Whether systemd-resolved runs.
    resolved: bool,
}

pub(crate) async fn dns(client: &Client, args: &DnsArgs) -> Result<u8, Failure> {
    let host = Host::this();
    if args.uninstall {
        line(&host.uninstall()?)?;
        return Ok(0);
    }
    let info = client.dns().await?;
    if args.install {
        line(&host.install(&info)?)?;
        return Ok(0);
    }
    match args.output {
        Output::Json => json(&info)?,
        Output::Table => line(&shown(&info, &host))?,
    }
    Ok(0)
}

fn shown(info: &DnsInfo, host: &Host) -> String {
    let upstreams = match info.upstreams.as_slice() {
        [] => "nobody is asked".to_owned(),
        servers => servers.join(", "),
    };
    let mut text = format!(
        "Domain:       {}\nOther names:  {} ({})\n",
        clean(&info.domain),
        clean(&upstreams),
        clean(&info.upstream_source)
    );
    if let Some(netns) = &info.netns {
        text += &format!("Namespace:    {}\n", clean(netns));
    }
    text += &format!("This host:    {}\n\n", host.words(info));
    let rows = info.servers.iter().map(|server| {
        let state = if server.listening { "yes" } else { "no VM runs" };
        vec![
            server.network.clone(),
            server.ipv4.clone(),
            server.ipv6.clone(),
            state.to_owned(),
        ]
    });
    text + &table(&["NETWORK", "IPV4", "IPV6", "ANSWERS"], rows)
}

/// The file for systemd-resolved: for these domains, and no others, it asks these servers (resolved.conf(5)).
fn drop_in(info: &DnsInfo) -> String {
    let servers: Vec<_> = info.servers.iter().map(|server| server.ipv4.as_str()).collect();
    let reverse = info.servers.iter().flat_map(|server| &server.reverse);
    let domains: Vec<_> = std::iter::once(&info.domain)
        .chain(reverse)
        .map(|domain| format!("~{domain}"))
        .collect();
    format!(
        "# Written by `offshoot net dns --install`.\n[Resolve]\nDNS={}\nDomains={}\n",
        servers.join(" "),
        domains.join(" ")
    )
}

/// What to add where there is no systemd-resolved.
fn by_hand(info: &DnsInfo) -> String {
    let domain = clean(&info.domain);
    let mut dnsmasq = String::new();
    let mut resolv_conf = String::new();
    for server in &info.servers {
        let (address, subnet) = (clean(&server.ipv4), clean(&server.subnet));
        dnsmasq += &format!("    server=/{domain}/{address}\n    rev-server={subnet},{address}\n");
        resolv_conf += &format!("    nameserver {address}\n");
    }
    format!(
        "add to /etc/dnsmasq.d/offshoot.conf where dnsmasq runs, or to /etc/NetworkManager/dnsmasq.d/offshoot.conf where \
         NetworkManager runs it (`dns=dnsmasq`):\n\n{dnsmasq}\nor, where neither runs, above the first `nameserver` of \
         /etc/resolv.conf:\n\n{resolv_conf}    search {domain}\n"
    )
}

impl Host {
    fn this() -> Self {
        // It is there without running, and runs without answering.
        let answers = Command::new("resolvectl")
            .args(["--no-pager", "status"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        Self {
            drop_in: DROP_IN.into(),
            resolved: answers.is_ok_and(|status| status.success()),
        }
    }

    /// How it is set up now.
    fn words(&self, info: &DnsInfo) -> &'static str {
        match std::fs::read_to_string(&self.drop_in) {
            Ok(text) if text == drop_in(info) && self.resolved => "systemd-resolved asks here",
            Ok(_) if self.resolved => {
                "systemd-resolved asks here, but for other networks than there are; run `offshoot net dns --install` again"
            }
            _ => "does not ask here; `offshoot net dns --install` changes that",
        }
    }

    fn install(&self, info: &DnsInfo) -> Result<String, Failure> {
        if info.servers.is_empty() {
            return Err(Failure::new(
                ErrorKind::WrongState,
                "there is no network whose names could be looked up",
            )
            .hint("run a VM, or make a network with `offshoot net create default`"));
        }
        if let Some(netns) = &info.netns {
            let netns = clean(netns);
            let servers = info.servers.iter().map(|server| clean(&server.ipv4));
            let lines: String = servers
                .map(|address| format!("    nameserver {address}\n"))
                .collect();
            return Ok(format!(
                "the networks are in the network namespace `{netns}`, which this host's resolver does not reach; for programs \
                 in it (`ip netns exec {netns} ...`), write /etc/netns/{netns}/resolv.conf:\n\n{lines}    search {}\n",
                clean(&info.domain)
            ));
        }
        if !self.resolved {
            return Ok(format!(
                "systemd-resolved does not run here, so nothing was changed. To look up VMs from this host,\n{}",
                by_hand(info)
            ));
        }
        let written = write(&self.drop_in, &drop_in(info));
        written.map_err(|error| self.refused("write", &error))?;
        reload()?;
        Ok(format!(
            "wrote {}; systemd-resolved asks here for {}",
            self.drop_in.display(),
            clean(&info.domain)
        ))
    }

    fn uninstall(&self) -> Result<String, Failure> {
        match std::fs::remove_file(&self.drop_in) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(format!(
                    "there is no {}; nothing was changed",
                    self.drop_in.display()
                ));
            }
            Err(error) => return Err(self.refused("remove", &error)),
        }
        if self.resolved {
            reload()?;
        }
        Ok(format!("removed {}", self.drop_in.display()))
    }

    fn refused(&self, what: &str, error: &io::Error) -> Failure {
        let failure = Failure::io(format!("cannot {what} {}", self.drop_in.display()), error);
        if error.kind() == io::ErrorKind::PermissionDenied {
            failure.hint("run it as root, for example with `sudo`")
        } else {
            failure
        }
    }
}

/// Writes the whole file or nothing of it.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path)
}

/// Lets systemd-resolved read its files again.
fn reload() -> Result<(), Failure> {
    let command = ["systemctl", "reload-or-restart", "systemd-resolved"];
    let ran = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .output();
    let failure = || {
        Failure::new(
            ErrorKind::Internal,
            "systemd-resolved did not read its files again",
        )
        .hint(format!("run `{}`", command.join(" ")))
    };
    match ran {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(failure().caused_by(&io::Error::other(clean(
            String::from_utf8_lossy(&output.stderr).trim(),
        )))),
        Err(error) => Err(failure().caused_by(&error)),
    }
}

#[cfg(test)]
mod tests {
    use offshoot_api::dns::DnsServer;

    use super::*;

    fn info() -> DnsInfo {
        DnsInfo {
            domain: "vm.internal".into(),
            netns: None,
            servers: vec![DnsServer {
                network: "default".into(),
                ipv4: "10.87.0.1".into(),
                ipv6: "fd00::1".into(),
                subnet: "10.87.0.0/24".into(),
                reverse: vec!["0.87.10.in-addr.arpa".into()],
                listening: true,
            }],
            upstreams: vec!["9.9.9.9:53".into()],
            upstream_source: "/etc/resolv.conf".into(),
        }
    }

    fn host(dir: &Path, resolved: bool) -> Host {
        Host {
            drop_in: dir.join("resolved.conf.d/offshoot.conf"),
            resolved,
        }
    }

    #[test]
    fn systemd_resolved_is_sent_here_for_our_domains_only() {
        assert_eq!(
            drop_in(&info()),
            "# Written by `offshoot net dns --install`.\n[Resolve]\nDNS=10.87.0.1\nDomains=~vm.internal \
             ~0.87.10.in-addr.arpa\n"
        );
    }

    #[test]
    fn without_systemd_resolved_the_user_is_told_what_to_add() {
        let dir = tempfile::tempdir().unwrap();
        let text = host(dir.path(), false).install(&info()).unwrap();
        for part in [
            "    server=/vm.internal/10.87.0.1\n",
            "    rev-server=10.87.0.0/24,10.87.0.1\n",
            "    nameserver 10.87.0.1\n",
            "    search vm.internal\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "nothing changed"
        );
    }

    #[test]
    fn what_the_host_cannot_reach_is_not_installed() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = DnsInfo {
            netns: Some("lab".into()),
            ..info()
        };
        let text = host(dir.path(), true).install(&elsewhere).unwrap();
        assert!(text.contains("/etc/netns/lab/resolv.conf"), "{text}");
        let nothing = DnsInfo {
            servers: Vec::new(),
            ..info()
        };
        host(dir.path(), true).install(&nothing).unwrap_err();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn it_is_told_how_the_host_is_set_up() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), true);
        assert!(host.words(&info()).contains("--install"));
        write(&host.drop_in, &drop_in(&info())).unwrap();
        assert_eq!(host.words(&info()), "systemd-resolved asks here");
        let mut other = info();
        other.servers[0].ipv4 = "10.88.0.1".into();
        assert!(host.words(&other).contains("again"));
        let text = shown(&info(), &host);
        assert!(text.contains("Domain:       vm.internal\n"), "{text}");
        assert!(text.contains("9.9.9.9:53 (/etc/resolv.conf)"), "{text}");
        assert!(text.contains("default   10.87.0.1   fd00::1   yes"), "{text}");
    }
}
