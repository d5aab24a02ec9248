//! `ssh-config`: what ssh(1) and all that use it must know to reach VMs by name, as ssh_config(5).
//!
//! ```text
//! Host web web.vm.internal      one block a VM: short names, and what tools list
//! Host *.vm.internal            VMs of any time: the daemon is asked when a connection is made
//! ```

use std::fmt::Write as _;

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::ssh::{SshHost, SshHosts, SshHostsQuery};

use super::command::{FIXED, Programs, USER};
use super::connect::{socket, this_program};
use super::install;
use super::keys::{Places, own_key};
use super::quote;
use crate::error::Failure;
use crate::output::line;

#[derive(Clone, Debug, Args)]
pub(crate) struct SshConfigArgs {
    /// Let `~/.ssh/config` include it, so that `ssh VM.vm.internal` works for all VMs
    #[arg(long)]
    install: bool,
    /// Undo that
    #[arg(long, conflicts_with = "install")]
    uninstall: bool,
}

pub(crate) async fn ssh_config(client: &Client, args: &SshConfigArgs) -> Result<u8, Failure> {
    let places = Places::of_this_user();
    if args.uninstall {
        line(&install::uninstall(&places)?)?;
        return Ok(0);
    }
    let hosts = client.ssh_hosts(&SshHostsQuery::default()).await?;
    let identity = own_key(&places)?.path;
    let (offshoot, socket) = (this_program()?, socket(client)?);
    let programs = Programs {
        offshoot: &offshoot,
        socket: &socket,
        identity: &identity,
    };
    if args.install {
        // Nothing of single VMs: their short names would hide hosts of the user's own when they are gone.
        let text = head(programs) + &any(&hosts.domain, programs)?;
        line(&install::install(&places, &text, &hosts.domain)?)?;
    } else {
        line(&fragment(&hosts, programs)?)?;
    }
    Ok(0)
}

/// The whole fragment.
fn fragment(hosts: &SshHosts, programs: Programs<'_>) -> Result<String, Failure> {
    let mut text = head(programs);
    for host in &hosts.vms {
        text += &one(host, programs)?;
    }
    text += &any(&hosts.domain, programs)?;
    Ok(text)
}

fn head(programs: Programs<'_>) -> String {
    format!(
        "# VMs of the daemon at {}, for ssh_config(5); made by `offshoot ssh-config`.\n",
        crate::output::clean(&programs.socket.display().to_string())
    )
}

/// The block of one VM.
fn one(host: &SshHost, programs: Programs<'_>) -> Result<String, Failure> {
    let SshHost {
        name, domain_name, ..
    } = host;
    let mut text = format!("\nHost {name} {domain_name}\n    HostName {domain_name}\n");
    if let Some(port) = host.port {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "    Port {port}");
    }
    Ok(text + &way(programs)?)
}

/// The block of all VMs, whether or not they are there yet.
fn any(domain: &str, programs: Programs<'_>) -> Result<String, Failure> {
    Ok(format!("\nHost *.{domain}\n{}", way(programs)?))
}

/// How a VM is reached, and known.
fn way(programs: Programs<'_>) -> Result<String, Failure> {
    let mut text = format!(
        "    User {USER}\n    IdentityFile {}\n    ProxyCommand {} %h\n    KnownHostsCommand {} %H\n",
        quote::argument(programs.identity)?,
        programs.command("ssh-proxy")?,
        programs.command("ssh-known-hosts")?,
    );
    for fixed in FIXED {
        let _ = writeln!(text, "    {}", fixed.replace('=', " "));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use offshoot_model::{VmId, VmState};

    use super::*;

    #[test]
    fn every_vm_has_a_block_and_all_have_one() {
        let hosts = SshHosts {
            domain: "vm.internal".into(),
            vms: vec![SshHost {
                id: VmId::from_bytes(&[1; 6]),
                name: "web".parse().unwrap(),
                domain_name: "web.vm.internal".into(),
                state: VmState::Running,
                ipv4: Some("10.87.0.2".parse().unwrap()),
                ipv6: None,
                port: Some(22),
                host_key: Some("ssh-ed25519 AAAA".into()),
            }],
        };
        let programs = Programs {
            offshoot: Path::new("/usr/local/bin/offshoot"),
            socket: Path::new("/run/offshoot/api.sock"),
            identity: Path::new("/home/me/.config/offshoot/id_ed25519"),
        };
        insta::assert_snapshot!(fragment(&hosts, programs).unwrap(), @"
        # VMs of the daemon at /run/offshoot/api.sock, for ssh_config(5); made by `offshoot ssh-config`.

        Host web web.vm.internal
            HostName web.vm.internal
            Port 22
            User root
            IdentityFile /home/me/.config/offshoot/id_ed25519
            ProxyCommand /usr/local/bin/offshoot --socket /run/offshoot/api.sock ssh-proxy %h
            KnownHostsCommand /usr/local/bin/offshoot --socket /run/offshoot/api.sock ssh-known-hosts %H
            UserKnownHostsFile /dev/null
            GlobalKnownHostsFile /dev/null
            StrictHostKeyChecking yes
            UpdateHostKeys no
            IdentitiesOnly yes
            PreferredAuthentications publickey

        Host *.vm.internal
            User root
            IdentityFile /home/me/.config/offshoot/id_ed25519
            ProxyCommand /usr/local/bin/offshoot --socket /run/offshoot/api.sock ssh-proxy %h
            KnownHostsCommand /usr/local/bin/offshoot --socket /run/offshoot/api.sock ssh-known-hosts %H
            UserKnownHostsFile /dev/null
            GlobalKnownHostsFile /dev/null
            StrictHostKeyChecking yes
            UpdateHostKeys no
            IdentitiesOnly yes
            PreferredAuthentications publickey
        ");
    }
}
