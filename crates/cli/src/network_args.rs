//! The flags of `run` and `create` that are about a VM's network.

use std::net::Ipv4Addr;

use clap::Args;
use offshoot_model::{Allowed, NetworkChoice, NetworkConfig, PublishedPort, SshConfig};

use crate::values::api_words;

#[derive(Clone, Debug, Args)]
pub(crate) struct NetworkArgs {
    /// Let a port of the host lead into it: `[ADDR:]HOST:GUEST[/udp]`, or GUEST for any free port
    #[arg(short, long = "publish", value_name = "HOST:GUEST", value_parser = PublishedPort::parse_all)]
    publish: Vec<Vec<PublishedPort>>,
    // One rule for names, and one error for all who break it: the model's.
    /// Network to be on, or `none` [default: the network `default`]
    #[arg(long, value_name = "NAME", alias = "net")]
    network: Option<NetworkChoice>,
    /// Let it reach what lies beyond the host, by the host's address, as it does by default
    #[arg(long, overrides_with = "no_nat")]
    nat: bool,
    /// Let it reach nothing beyond the host
    #[arg(long, overrides_with = "nat")]
    no_nat: bool,
    /// Keep it and the other VMs of its network from each other
    #[arg(long)]
    isolate: bool,
    /// Let it reach the host's own services, or the cloud's metadata service
    #[arg(long, value_name = "WHAT", value_delimiter = ',',
        value_parser = api_words::<Allowed>(&["host", "metadata"]))]
    allow: Vec<Allowed>,
    /// IPv4 address to have on its network [default: a free one]
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<Ipv4Addr>,
    /// TCP port of its SSH server, 0 for none [default: 22, or none beside an image's own]
    #[arg(long, value_name = "PORT")]
    ssh_port: Option<u16>,
}

impl NetworkArgs {
    /// What is asked of networks.
    pub(crate) fn config(&self) -> NetworkConfig {
        let mut allow = self.allow.clone();
        allow.sort_unstable();
        allow.dedup();
        NetworkConfig {
            network: self.network.clone().unwrap_or_default(),
            nat: !self.no_nat,
            isolate: self.isolate,
            allow,
            publish: self.publish.iter().flatten().copied().collect(),
            ipv4: self.ip,
        }
    }

    /// What is asked of the SSH server, but for its keys.
    pub(crate) fn ssh(&self) -> SshConfig {
        SshConfig {
            port: self.ssh_port,
            ..SshConfig::default()
        }
    }
}
