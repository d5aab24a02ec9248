//! The names and addresses of VMs that run, as DNS asks for them: read from what the owners say now, never copied.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock, Weak};

use offshoot_model::{Attachment, Network, VmName};
use offshoot_net::dns::{Addresses, Sight, Zone};

use crate::definition::VmRecord;
use crate::engine::{Engine, Registry};
use crate::networks::Networks;

/// What one daemon's VMs are called. Made before the engine, whose capabilities serve it; knows nothing until then.
pub struct LiveZone {
    networks: Networks,
    // The engine keeps its capabilities, one of which serves this.
    vms: OnceLock<Weak<Registry>>,
}

impl LiveZone {
    /// Knows the networks, and no VM yet.
    pub fn new(networks: Networks) -> Arc<Self> {
        Arc::new(Self {
            networks,
            vms: OnceLock::new(),
        })
    }

    /// From now on, it knows VMs. Only the first engine counts.
    pub fn follow(&self, engine: &Engine) {
        self.vms.get_or_init(|| engine.registry());
    }
}

/// The place of a VM that has its addresses now and may be seen. From the start on: the guest may ask for itself before
/// anybody is told that it runs.
fn seen<'a>(vm: &'a VmRecord, sight: Sight<'_>) -> Option<&'a Attachment> {
    let attachment = vm.definition.attachment.as_ref()?;
    let visible = match sight {
        Sight::Everything => true,
        Sight::Network(network) => *network == attachment.network,
    };
    (visible && vm.life.state.has_vmm() && !vm.life.removing).then_some(attachment)
}

impl Zone for LiveZone {
    fn is_ready(&self) -> bool {
        self.vms.get().is_some()
    }

    fn addresses(&self, name: &str, sight: Sight<'_>) -> Option<Addresses> {
        let named = |vm: &VmRecord| vm.name.as_str().eq_ignore_ascii_case(name) && seen(vm, sight).is_some();
        let vm = self.vms.get()?.upgrade()?.find_record(named)?;
        let attachment = seen(&vm, sight)?;
        Some(Addresses {
            ipv4: attachment.ipv4,
            ipv6: attachment.ipv6,
        })
    }

    fn name(&self, address: IpAddr, sight: Sight<'_>) -> Option<VmName> {
        let has = |vm: &VmRecord| {
            seen(vm, sight).is_some_and(|at| match address {
                IpAddr::V4(v4) => at.ipv4 == v4,
                IpAddr::V6(v6) => at.ipv6 == v6,
            })
        };
        self.vms
            .get()?
            .upgrade()?
            .find_record(has)
            .map(|vm| vm.name.clone())
    }

    fn networks(&self) -> Vec<Arc<Network>> {
        self.networks.list()
    }
}
