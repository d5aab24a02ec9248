//! What ssh(1) runs by itself to get to a VM: a pipe to its server (`ProxyCommand`), and the keys by which it is known
//! (`KnownHostsCommand`).

use clap::Args;
use offshoot_api::client::{Client, SshTunnel};
use offshoot_api::ssh::{SshHostsQuery, SshQuery};
use offshoot_model::ErrorKind;
use tokio::io::AsyncWriteExt as _;

use super::keys::{Places, own_key};
use crate::error::Failure;
use crate::output::line;
use crate::terminal;

#[derive(Clone, Debug, Args)]
pub(crate) struct ProxyArgs {
    /// Name or id, or a name with the domain (`%h`)
    #[arg(value_name = "VM")]
    host: String,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct KnownHostsArgs {
    /// The name that a key is looked for (`%H`)
    host: String,
}

/// Joins standard input and output with a VM's SSH server.
pub(crate) async fn proxy(client: &Client, args: &ProxyArgs) -> Result<u8, Failure> {
    // This user's key is good for this connection, whoever made the VM: who may use the socket may do as much by `exec`.
    let query = SshQuery {
        key: own_key(&Places::of_this_user()).ok().map(|key| key.public),
    };
    let tunnel = client.ssh(vm_of(&args.host), &query).await?;
    relay(tunnel).await?;
    Ok(0)
}

async fn relay(tunnel: SshTunnel) -> Result<(), Failure> {
    let (mut sink, mut stream) = tunnel.split();
    let up = async {
        let mut input = terminal::stdin();
        while let Some(bytes) = input.recv().await {
            sink.send(bytes).await?;
        }
        Ok(())
    };
    let down = async {
        let mut output = tokio::io::stdout();
        while let Some(bytes) = stream.next().await? {
            output.write_all(&bytes).await.map_err(|e| Failure::write(&e))?;
            output.flush().await.map_err(|e| Failure::write(&e))?;
        }
        Ok(())
    };
    tokio::select! {
        done = up => done,
        done = down => done,
    }
}

/// Prints the line of known_hosts for a VM. An unknown VM fails, and ssh goes no further.
pub(crate) async fn known_hosts(client: &Client, args: &KnownHostsArgs) -> Result<u8, Failure> {
    let vm = vm_of(&args.host);
    let query = SshHostsQuery {
        vm: Some(vm.to_owned()),
    };
    let hosts = client.ssh_hosts(&query).await?;
    let key = hosts.vms.first().and_then(|host| host.host_key.as_ref());
    let key = key.ok_or_else(|| {
        Failure::new(
            ErrorKind::NotPossible,
            format!("VM `{vm}` has no SSH host key yet"),
        )
        .hint(format!("it gets one when it starts: `offshoot start {vm}`"))
    })?;
    line(&format!("{} {key}", args.host))?;
    Ok(0)
}

/// The VM that a host's name means: `web`, `web.vm.internal`, or `[web.vm.internal]:2222` as ssh looks keys up. Names of
/// VMs have no dots.
fn vm_of(host: &str) -> &str {
    let host = host.strip_prefix('[').unwrap_or(host);
    host.split(['.', ']']).next().unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_the_vm_before_the_domain() {
        for host in ["web", "web.vm.internal", "[web.vm.internal]:2222", "[web]:22"] {
            assert_eq!(vm_of(host), "web");
        }
        assert_eq!(vm_of(""), "");
    }
}
