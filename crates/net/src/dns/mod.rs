//! Names of VMs, answered from what runs, and everybody else's, asked of the host's resolvers.
//!
//! ```text
//!            ┌ who is it? not of the network, not the host: silence
//! UDP, TCP ──┤ is it a question? FORMERR, NOTIMP, or silence
//!            └ ours ─► Zone (what runs now) ─► an answer with authority, gone with the VM
//!              not ours ─► cache ─► an upstream, from within the namespace ─► SERVFAIL after four seconds
//! ```
//!
//! One `Server` a network, on its gateway's addresses. Sockets, limits and the question of who may ask are our
//! own: hickory's ready-made server starts a task for each packet and takes any number of connections, and here a guest
//! is on the other side. Messages, and the talk with upstreams, are hickory's.
//!
//! What a guest can make this hold is bounded everywhere: `limits.rs` for what waits, `cache.rs` for what is kept.

mod cache;
mod domain;
mod forward;
mod limits;
pub mod measure;
mod ours;
mod question;
mod reply;
mod server;
mod servers;
mod sockets;
mod upstream;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use offshoot_model::{Network, NetworkName, VmName};

pub use domain::{Domain, DomainError};
pub use ours::reverse_zones;
pub use servers::{DnsConfig, DnsServers};
pub use sockets::{ListenError, port_holder};
pub use upstream::{UpstreamAddress, UpstreamError, UpstreamSource};

/// The port of DNS.
pub const PORT: u16 = 53;

/// The name of the host in the domain: the gateway's addresses, unless a VM is called so.
pub const HOST: &str = "host";

/// The addresses of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Its IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address.
    pub ipv6: Ipv6Addr,
}

/// What a client gets to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight<'a> {
    /// The VMs of every network: the host asks.
    Everything,
    /// The VMs of this network: one of them asks.
    Network(&'a NetworkName),
}

/// What there is now. Asked for every question, so that a VM that was stopped, renamed or removed counts at once; must
/// not block.
pub trait Zone: Send + Sync {
    /// Whether it knows what there is. Until then nobody is told that a name does not exist.
    fn is_ready(&self) -> bool;

    /// The addresses of the VM with this name, in any case of letters.
    fn addresses(&self, name: &str, sight: Sight<'_>) -> Option<Addresses>;

    /// The name of the VM with this address.
    fn name(&self, address: IpAddr, sight: Sight<'_>) -> Option<VmName>;

    /// Every network; reverse look-ups of their addresses are answered here and never forwarded.
    fn networks(&self) -> Vec<Arc<Network>>;
}
