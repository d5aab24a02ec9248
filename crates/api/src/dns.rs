//! Names of VMs over the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer to `GET /v1/dns`: who answers for the names of VMs, and who is asked for others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DnsInfo {
    /// The domain of VMs' names.
    pub domain: String,
    /// The network namespace that everything is in; absent when it is the host's own.
    pub netns: Option<String>,
    /// One for each network.
    pub servers: Vec<DnsServer>,
    /// Who is asked for other names, `ADDRESS:PORT`.
    pub upstreams: Vec<String>,
    /// Where these are written: a file, or the daemon's config.
    pub upstream_source: String,
}

/// The DNS server of one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DnsServer {
    /// The network.
    pub network: String,
    /// Its address: the network's gateway.
    pub ipv4: String,
    /// Its IPv6 address.
    pub ipv6: String,
    /// The network's addresses.
    pub subnet: String,
    /// The domains of reverse look-ups of these addresses.
    pub reverse: Vec<String>,
    /// Whether it answers now: a VM runs on the network.
    pub listening: bool,
}
