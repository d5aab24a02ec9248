//! Which networks are served: those on which a VM runs.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use offshoot_model::{Network, NetworkName, VmId};

use super::forward::Forwarder;
use super::server::{Common, Server};
use super::{Domain, ListenError, UpstreamAddress, Zone};
use crate::Namespace;

/// What names are served with.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// The domain of VMs.
    pub domain: Domain,
    /// Who is asked for other names; the host's resolvers where there is none.
    pub upstream: Vec<UpstreamAddress>,
}

/// The DNS servers of all networks.
pub struct DnsServers {
    namespace: Namespace,
    common: Arc<Common>,
    open: Mutex<HashMap<NetworkName, Open>>,
}

/// A server, and for whom it is there.
struct Open {
    server: Server,
    users: HashSet<VmId>,
}

impl DnsServers {
    /// None listens yet.
    pub fn new(namespace: Namespace, config: DnsConfig, zone: Arc<dyn Zone>) -> Self {
        let forwarder = Forwarder::new(namespace.clone(), &config.upstream);
        Self {
            namespace,
            common: Arc::new(Common::new(config.domain, zone, forwarder)),
            open: Mutex::default(),
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<NetworkName, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves this network for as long as `user` or another VM needs it. The gateway's addresses need not be there yet.
    /// Within the async runtime; blocks for no longer than it takes to make four sockets.
    pub fn ensure(&self, network: &Arc<Network>, user: &VmId) -> Result<(), ListenError> {
        let mut open = self.open();
        if let Some(there) = open.get_mut(&network.name)
            && there.server.network == *network
        {
            there.users.insert(user.clone());
            return Ok(());
        }
        // One of this name was removed and made anew with other addresses.
        open.remove(&network.name);
        let server = Server::start(&self.common, &self.namespace, Arc::clone(network))?;
        let users = HashSet::from([user.clone()]);
        open.insert(network.name.clone(), Open { server, users });
        Ok(())
    }

    /// Says that `user` needs no server any more; those that nobody needs end.
    pub fn release(&self, user: &VmId) {
        self.open().retain(|_, open| {
            open.users.remove(user);
            !open.users.is_empty()
        });
    }

    /// Which networks are served, and where.
    pub fn listening(&self) -> Vec<(NetworkName, Vec<SocketAddr>)> {
        let open = self.open();
        let mut listening: Vec<_> = open
            .iter()
            .map(|(name, open)| (name.clone(), open.server.addresses.clone()))
            .collect();
        listening.sort();
        listening
    }

    /// The domain of VMs.
    pub fn domain(&self) -> &Domain {
        &self.common.domain
    }

    /// Who is asked for other names now, and where that is written.
    pub fn upstreams(&self) -> (Vec<SocketAddr>, String) {
        let forwarder = &self.common.forwarder;
        (
            forwarder.servers(&*self.common.zone),
            forwarder.source().to_string(),
        )
    }
}
