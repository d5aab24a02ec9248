//! `net`: the networks that VMs are on.

use clap::{Args, Subcommand};
use ipnet::Ipv4Net;
use offshoot_api::client::Client;
use offshoot_api::network::{NetworkRequest, NetworkSummary};
use offshoot_model::NetworkName;

use crate::age;
use crate::each::each;
use crate::error::Failure;
use crate::image::show;
use crate::net_dns::{self, DnsArgs};
use crate::output::{Output, OutputArgs, json, line, now_ms, table};

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// List networks
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Make a network
    Create(CreateArgs),
    /// Show everything about networks and the VMs on them, as JSON
    Inspect(NamesArgs),
    /// Remove networks that no VM is on
    #[command(visible_alias = "remove")]
    Rm(NamesArgs),
    /// Show who answers for the names of VMs, or let this host ask
    Dns(DnsArgs),
}

#[derive(Clone, Debug, Args)]
#[command(override_usage = "offshoot net ls [OPTIONS]")]
pub(crate) struct LsArgs {
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
#[command(override_usage = "offshoot net create [OPTIONS] NAME")]
pub(crate) struct CreateArgs {
    /// IPv4 addresses for it [default: free ones]
    #[arg(long, value_name = "CIDR")]
    subnet: Option<Ipv4Net>,
    #[command(flatten)]
    output: OutputArgs,
    /// Its name
    name: String,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct NamesArgs {
    /// Names
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

pub(crate) async fn net(client: &Client, command: NetCommand) -> Result<u8, Failure> {
    match command {
        NetCommand::Ls(args) => ls(client, &args).await,
        NetCommand::Create(args) => create(client, args).await,
        NetCommand::Inspect(args) => inspect(client, &args).await,
        NetCommand::Rm(args) => rm(client, &args).await,
        NetCommand::Dns(args) => net_dns::dns(client, &args).await,
    }
}

async fn ls(client: &Client, args: &LsArgs) -> Result<u8, Failure> {
    let networks = client.networks().await?;
    if args.output.output == Output::Json {
        json(&networks)?;
    } else if args.quiet {
        let names = networks.iter().map(|network| format!("{}\n", network.name));
        line(&names.collect::<String>())?;
    } else {
        line(&net_table(&networks, now_ms()))?;
    }
    Ok(0)
}

fn net_table(networks: &[NetworkSummary], now_ms: u64) -> String {
    let rows = networks.iter().map(|network| {
        vec![
            network.name.to_string(),
            network.ipv4.clone(),
            network.ipv6.clone(),
            network.bridge.clone(),
            network.vms.to_string(),
            age::ago(network.created_ms, now_ms),
        ]
    });
    table(&["NAME", "SUBNET", "IPV6", "BRIDGE", "VMS", "CREATED"], rows)
}

/// One rule for names, and one error with a hint for all who break it, here and in the daemon.
fn parse_name(name: &str) -> Result<NetworkName, Failure> {
    name.parse()
        .map_err(|error: offshoot_model::NetworkNameError| Failure::explained(&error))
}

async fn create(client: &Client, args: CreateArgs) -> Result<u8, Failure> {
    let request = NetworkRequest {
        name: parse_name(&args.name)?.to_string(),
        subnet: args.subnet.map(|subnet| subnet.to_string()),
    };
    let network = client.create_network(&request).await?;
    show(args.output, &network, |network| network.name.to_string())
}

async fn inspect(client: &Client, args: &NamesArgs) -> Result<u8, Failure> {
    let mut networks = Vec::new();
    for name in &args.names {
        networks.push(client.network(name).await?);
    }
    match networks.as_slice() {
        [network] => json(network)?,
        networks => json(&networks)?,
    }
    Ok(0)
}

async fn rm(client: &Client, args: &NamesArgs) -> Result<u8, Failure> {
    each(&args.names, |name| client.remove_network(name)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_in_a_table() {
        let network = NetworkSummary {
            name: "default".parse().unwrap(),
            ipv4: "10.87.0.0/22".into(),
            ipv6: "fd12:3456:789a::/64".into(),
            gateway4: [10, 87, 0, 1].into(),
            gateway6: "fd12:3456:789a::1".parse().unwrap(),
            bridge: "ofs-01234567".into(),
            created_ms: 1_000_000,
            vms: 3,
        };
        insta::assert_snapshot!(net_table(&[network], 1_000_000 + 180_000), @r"
        NAME      SUBNET         IPV6                  BRIDGE         VMS   CREATED
        default   10.87.0.0/22   fd12:3456:789a::/64   ofs-01234567   3     3 minutes ago
        ");
    }
}
