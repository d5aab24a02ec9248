//! Networks over the wire.

use std::net::{Ipv4Addr, Ipv6Addr};

use offshoot_model::{Attachment, Mac, Network, NetworkName, VmId, VmName, VmState};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// One row of `net ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkSummary {
    /// Its name.
    #[schema(value_type = String)]
    pub name: NetworkName,
    /// Its IPv4 addresses, `10.87.0.0/22`.
    pub ipv4: String,
    /// Its unique local IPv6 addresses, a /64.
    pub ipv6: String,
    /// The host's IPv4 address on it: gateway and DNS server of its VMs.
    #[schema(value_type = String, format = Ipv4)]
    pub gateway4: Ipv4Addr,
    /// The host's IPv6 address on it.
    #[schema(value_type = String, format = Ipv6)]
    pub gateway6: Ipv6Addr,
    /// The bridge in the host's kernel, which is there while VMs run on the network.
    pub bridge: String,
    /// When it was made, milliseconds since the epoch.
    pub created_ms: u64,
    /// How many VMs are on it, running or not.
    pub vms: u64,
}

impl NetworkSummary {
    /// What is shown of a network with so many VMs.
    pub fn new(network: &Network, vms: u64) -> Self {
        Self {
            name: network.name.clone(),
            ipv4: network.ipv4.to_string(),
            ipv6: network.ipv6.to_string(),
            gateway4: network.gateway4(),
            gateway6: network.gateway6(),
            bridge: network.bridge.clone(),
            created_ms: network.created_ms,
            vms,
        }
    }
}

/// Everything about a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkDetails {
    /// What `net ls` shows.
    #[serde(flatten)]
    pub summary: NetworkSummary,
    /// The VMs on it, running or not.
    pub members: Vec<NetworkMember>,
}

/// One VM on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkMember {
    /// The VM's id.
    #[schema(value_type = String)]
    pub id: VmId,
    /// The VM's name.
    #[schema(value_type = String)]
    pub name: VmName,
    /// Where the VM is in its life.
    pub state: VmState,
    /// Its IPv4 address.
    #[schema(value_type = String, format = Ipv4)]
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address.
    #[schema(value_type = String, format = Ipv6)]
    pub ipv6: Ipv6Addr,
    /// Its MAC address.
    #[schema(value_type = String)]
    pub mac: Mac,
}

/// A VM's place on its network, which it keeps as long as it exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmNetwork {
    /// The network.
    #[schema(value_type = String)]
    pub name: NetworkName,
    /// The VM's IPv4 address.
    #[schema(value_type = String, format = Ipv4)]
    pub ipv4: Ipv4Addr,
    /// The VM's IPv6 address.
    #[schema(value_type = String, format = Ipv6)]
    pub ipv6: Ipv6Addr,
    /// The VM's MAC address.
    #[schema(value_type = String)]
    pub mac: Mac,
}

impl From<&Attachment> for VmNetwork {
    fn from(attachment: &Attachment) -> Self {
        Self {
            name: attachment.network.clone(),
            ipv4: attachment.ipv4,
            ipv6: attachment.ipv6,
            mac: attachment.mac,
        }
    }
}

/// Body of `POST /v1/networks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkRequest {
    /// Its name: one DNS label in lower case, and not `none`.
    #[schema(min_length = 1, max_length = 32, pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    pub name: String,
    /// Its IPv4 addresses, `ADDRESS/PREFIX`; free ones out of the daemon's `network_pool` when absent.
    #[schema(max_length = 18, pattern = "^[0-9.]+/[0-9]+$")]
    #[serde(default)]
    pub subnet: Option<String>,
}

/// What a path under `/v1/networks/{name}` names.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct NetworkPath {
    /// The network's name.
    #[param(min_length = 1, max_length = 32, pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    pub name: String,
}
