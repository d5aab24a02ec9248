//! Which VMs there are and what each may: all that the rules follow from.

use std::fmt;
use std::net::Ipv6Addr;

use offshoot_model::{Attachment, Mac, Network};

/// How the names of bridges begin, those of other daemons as well.
pub(super) const BRIDGES: &str = "ofs-";

/// The name of our tables: `offshoot_<hex>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName(String);

impl TableName {
    /// The name for a daemon that `hash` tells from others on the same host.
    pub fn new(hash: [u8; 4]) -> Self {
        let [a, b, c, d] = hash;
        Self(format!("offshoot_{a:02x}{b:02x}{c:02x}{d:02x}"))
    }

    /// The name of tables of some daemon, when it is one.
    pub(super) fn read(name: &str) -> Option<Self> {
        name.starts_with("offshoot_").then(|| Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableName({})", self.0)
    }
}

/// A VM and what it may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guarded {
    /// Its TAP.
    pub tap: String,
    /// Its place on its network.
    pub attachment: Attachment,
    /// Whether it reaches what lies beyond the host.
    pub nat: bool,
    /// Whether it and the other VMs of its network are kept from each other.
    pub isolate: bool,
    /// Whether it reaches services of the host.
    pub host: bool,
    /// Whether it reaches the cloud's metadata service.
    pub metadata: bool,
}

impl Guarded {
    /// The address that its kernel makes from its MAC for the link alone (RFC 4291, appendix A).
    pub fn link_local(&self) -> Ipv6Addr {
        let Mac([a, b, c, d, e, f]) = self.attachment.mac;
        let interface_id = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
        Ipv6Addr::from((0xfe80_u128 << 112) | u128::from(interface_id))
    }
}

/// The networks that have VMs, and those VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirewallState {
    networks: Vec<Network>,
    vms: Vec<Guarded>,
}

impl FirewallState {
    /// Adds a VM and the network that it is on, in place of one with the same TAP.
    pub fn insert(&mut self, network: &Network, vm: Guarded) {
        match self.networks.iter_mut().find(|known| known.name == network.name) {
            Some(known) => known.clone_from(network),
            None => self.networks.push(network.clone()),
        }
        match self.vms.iter_mut().find(|known| known.tap == vm.tap) {
            Some(known) => *known = vm,
            None => self.vms.push(vm),
        }
        self.settle();
    }

    /// Takes a VM out, and its network when it was the last one there. Whether there was one.
    pub fn remove(&mut self, tap: &str) -> bool {
        let before = self.vms.len();
        self.vms.retain(|vm| vm.tap != tap);
        self.settle();
        self.vms.len() != before
    }

    /// Whether there is no VM.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }

    /// The networks that have VMs, by name.
    pub fn networks(&self) -> &[Network] {
        &self.networks
    }

    /// The VMs, by TAP.
    pub fn vms(&self) -> &[Guarded] {
        &self.vms
    }

    /// The VM with this TAP.
    pub fn get(&self, tap: &str) -> Option<&Guarded> {
        self.vms.iter().find(|vm| vm.tap == tap)
    }

    fn settle(&mut self) {
        let vms = &self.vms;
        self.networks
            .retain(|network| vms.iter().any(|vm| vm.attachment.network == network.name));
        self.networks.sort_by(|one, other| one.name.cmp(&other.name));
        self.vms.sort_by(|one, other| one.tap.cmp(&other.tap));
    }
}
