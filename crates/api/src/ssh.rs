//! SSH to VMs: what a client must know of each, and the bytes of one connection.
//!
//! `GET /v1/vms/{vm}/ssh` is a WebSocket without a subprotocol. Every binary message, in both directions, is the next
//! bytes of one SSH connection (RFC 4253) to the server in the VM's agent; nothing else is sent. It needs no network.

use std::net::{Ipv4Addr, Ipv6Addr};

use offshoot_model::{VmId, VmName, VmState};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// The largest message either side takes, bytes.
pub const MAX_MESSAGE: usize = 64 << 10;

/// Query of the WebSocket `GET /v1/vms/{vm}/ssh`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct SshQuery {
    /// Public keys that open this connection besides the VM's own, one a line, as `authorized_keys` has them (sshd(8)),
    /// without options.
    #[param(max_length = 16384)]
    pub key: Option<String>,
}

/// Query of `GET /v1/ssh`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct SshHostsQuery {
    /// Only this VM: a name, an id, or the first digits of an id.
    #[param(
        min_length = 1,
        max_length = 63,
        pattern = "^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$"
    )]
    pub vm: Option<String>,
}

/// Answer to `GET /v1/ssh`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshHosts {
    /// The domain in which VMs have their names, such as `vm.internal`.
    pub domain: String,
    /// The VMs, newest first.
    pub vms: Vec<SshHost>,
}

/// A VM as an SSH client sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshHost {
    /// Its id.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: VmName,
    /// Its name with the domain.
    pub domain_name: String,
    /// Where it is in its life.
    pub state: VmState,
    /// Its IPv4 address, on a network.
    #[schema(value_type = Option<String>)]
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address, on a network.
    #[schema(value_type = Option<String>)]
    pub ipv6: Option<Ipv6Addr>,
    /// The port on these addresses; absent when the agent's server listens on none.
    pub port: Option<u16>,
    /// The public key of the agent's server, as `known_hosts` has it (sshd(8)); absent before the first start.
    pub host_key: Option<String>,
}
