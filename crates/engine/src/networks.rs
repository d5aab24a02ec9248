//! The networks of VMs: rows that last, bridges that come and go with the VMs that run on them.
//!
//! A network has its subnets from its creation to its removal, and a VM its addresses from its creation to its removal; both
//! are written in one transaction with what they belong to. The default network is made when the first VM asks for it.
//!
//! Not here: bridges and TAPs ([`offshoot_net::links`]), and which VM runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use ipnet::Ipv4Net;
use offshoot_model::{
    Attachment, ErrorKind, Explain, Mac, Network, NetworkChoice, NetworkConfig, NetworkName, PublishedPort,
    VmName,
};
use offshoot_net::Namespace;
use offshoot_net::allocate::{self, SubnetError};
use offshoot_net::host_ports::HostPorts;
use offshoot_net::links::{BridgePlan, LinkError, Links};
use offshoot_store::db::{AddressRow, Db, DbError};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex, MutexGuard};

use crate::error::StageFailure;
use crate::owner::now_ms;
use crate::tap_pool::TapPool;

/// Packets as Ethernet has them; what lies beyond the host takes no larger ones either.
const MTU: u32 = 1500;

/// What networks are made from.
#[derive(Clone, Debug)]
pub struct NetworksConfig {
    /// Where subnets come from.
    pub pool: Ipv4Net,
    /// The daemon's data directory: bridges of another daemon have other names.
    pub data_dir: PathBuf,
    /// How many idle TAPs each bridge shall have.
    pub tap_pool_size: usize,
}

/// Why networks could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetworksOpenError {
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The kernel.
    #[error(transparent)]
    Links(#[from] LinkError),
}

/// Why a network, or a VM's place on one, is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No such network.
    #[error("no network named `{name}`")]
    NotFound {
        /// What was asked for.
        name: NetworkName,
    },
    /// There is one of that name.
    #[error("a network named `{name}` exists already")]
    NameTaken {
        /// What was asked for.
        name: NetworkName,
    },
    /// VMs are on it.
    #[error("cannot remove the network `{name}`: {} on it", on_it(vms))]
    InUse {
        /// The network.
        name: NetworkName,
        /// Those that are on it, running or not.
        vms: Vec<VmName>,
    },
    /// No subnet for it.
    #[error("cannot make the network `{name}`")]
    Subnet {
        /// The network.
        name: NetworkName,
        /// Whether a certain subnet was asked for.
        asked: bool,
        /// Why.
        #[source]
        source: SubnetError,
    },
    /// Every address is taken.
    #[error("every address of the network `{name}` ({subnet}) is taken")]
    Full {
        /// The network.
        name: NetworkName,
        /// Its addresses.
        subnet: Ipv4Net,
    },
    /// An address that is none of a VM's on this network.
    #[error("{address} is no address for a VM on the network `{name}` ({subnet})")]
    NotForVms {
        /// The network.
        name: NetworkName,
        /// Its addresses.
        subnet: Ipv4Net,
        /// What was asked for.
        address: Ipv4Addr,
    },
    /// Another VM has it.
    #[error("another VM on the network `{name}` has {address}")]
    AddressTaken {
        /// The network.
        name: NetworkName,
        /// What was asked for.
        address: Ipv4Addr,
    },
    /// A port to publish is not to be had.
    #[error("cannot publish the VM's ports")]
    Ports(#[source] StageFailure),
    /// The kernel gave no random bytes.
    #[error("no random bytes for a network's IPv6 addresses")]
    Random(#[source] std::io::Error),
    /// The kernel.
    #[error(transparent)]
    Links(#[from] LinkError),
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
}

/// `web is` or `web and db are`, at most a few of them.
fn on_it(vms: &[VmName]) -> String {
    const SHOWN: usize = 5;
    let mut text = String::new();
    for (n, vm) in vms.iter().take(SHOWN).enumerate() {
        let _ = write!(text, "{}`{vm}`", if n == 0 { "" } else { ", " });
    }
    if vms.len() > SHOWN {
        let _ = write!(text, " and {} more", vms.len() - SHOWN);
    }
    text + if vms.len() == 1 { " is" } else { " are" }
}

impl Explain for NetworkError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::NameTaken { .. } | Self::InUse { .. } | Self::AddressTaken { .. } => ErrorKind::Conflict,
            Self::Subnet { source, .. } => match source {
                SubnetError::Prefix { .. } | SubnetError::Reserved { .. } => ErrorKind::InvalidRequest,
                SubnetError::Route { .. } | SubnetError::Network { .. } => ErrorKind::Conflict,
                SubnetError::PoolExhausted { .. } => ErrorKind::NotPossible,
            },
            Self::NotForVms { .. } => ErrorKind::InvalidRequest,
            Self::Full { .. } => ErrorKind::NoSpace,
            Self::Ports(error) => error.0.kind(),
            Self::Random(_) => ErrorKind::Internal,
            Self::Links(error) => error.kind(),
            Self::Db(error) => error.kind(),
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotFound { name } => vec![format!(
                "make it with `offshoot net create {name}`, or see `offshoot net ls`"
            )],
            Self::NameTaken { name } => vec![format!(
                "use it, choose another name, or remove it with `offshoot net rm {name}`"
            )],
            Self::InUse { vms, .. } => vms
                .first()
                .map(|vm| format!("remove its VMs first, for example with `offshoot rm -f {vm}`"))
                .into_iter()
                .collect(),
            Self::Subnet { name, asked: true, .. } => vec![format!(
                "leave the subnet away and `offshoot net create {name}` finds a free one, or see what is taken with `ip route` and `offshoot net ls`"
            )],
            Self::Subnet { .. } => vec![
                "see what is taken with `ip route` and `offshoot net ls`, and set another `network_pool` in the daemon's config"
                    .into(),
            ],
            Self::Full { .. } => vec![
                "remove VMs with `offshoot rm`, or make a larger network with `offshoot net create NAME --subnet ADDRESS/PREFIX`"
                    .into(),
            ],
            Self::NotForVms { subnet, .. } => vec![format!(
                "choose one from {} to {}, or leave it away and the daemon chooses",
                Ipv4Addr::from(u32::from(subnet.network()).saturating_add(2)),
                Ipv4Addr::from(u32::from(subnet.broadcast()).saturating_sub(1)),
            )],
            Self::AddressTaken { .. } => {
                vec!["see who has it with `offshoot ps -a`, or leave it away and the daemon chooses".into()]
            }
            Self::Ports(error) => error.0.hints(),
            Self::Random(_) => Vec::new(),
            Self::Links(error) => error.hints(),
            Self::Db(error) => error.hints(),
        }
    }
}

/// All networks of one daemon. Cheap to clone.
#[derive(Clone)]
pub struct Networks {
    inner: Arc<Inner>,
}

struct Inner {
    db: Db,
    links: Links,
    taps: TapPool,
    ports: Arc<dyn HostPorts>,
    config: NetworksConfig,
    /// What the database holds.
    known: RwLock<BTreeMap<NetworkName, Arc<Network>>>,
    /// Looking for what is free and writing the row that takes it must not be interleaved.
    changing: Mutex<()>,
}

/// The right to change what is taken. Whoever holds it writes the row before it lets go.
pub(crate) struct Changing<'a> {
    _guard: MutexGuard<'a, ()>,
}

impl Networks {
    /// Reads what there is.
    pub async fn open(
        db: Db,
        namespace: Namespace,
        ports: Arc<dyn HostPorts>,
        config: NetworksConfig,
    ) -> Result<Self, NetworksOpenError> {
        let links = Links::open(namespace)?;
        let rows = db.call(Db::networks).await?;
        let known = rows
            .into_iter()
            .map(|network| (network.name.clone(), Arc::new(network)))
            .collect();
        Ok(Self {
            inner: Arc::new(Inner {
                db,
                taps: TapPool::new(links.clone(), config.tap_pool_size),
                links,
                ports,
                config,
                known: RwLock::new(known),
                changing: Mutex::default(),
            }),
        })
    }

    /// The namespace that they are in.
    pub fn namespace(&self) -> &Namespace {
        self.inner.links.namespace()
    }

    /// The interfaces of that namespace.
    pub fn links(&self) -> &Links {
        &self.inner.links
    }

    /// Idle TAPs, and the lock of bridges.
    pub fn taps(&self) -> &TapPool {
        &self.inner.taps
    }

    /// Removes idle TAPs, and bridges without VMs, for good: no start of this daemon finds one any more.
    pub async fn drain(&self) -> Result<(), LinkError> {
        let plans = self.list().iter().map(|network| bridge_plan(network)).collect();
        self.taps().drain(plans).await
    }

    /// Where subnets come from.
    pub fn pool(&self) -> Ipv4Net {
        self.inner.config.pool
    }

    /// The network of this name.
    pub fn get(&self, name: &NetworkName) -> Option<Arc<Network>> {
        let known = self.inner.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(name).cloned()
    }

    /// Every network, by name.
    pub fn list(&self) -> Vec<Arc<Network>> {
        let known = self.inner.known.read().unwrap_or_else(PoisonError::into_inner);
        known.values().cloned().collect()
    }

    /// Makes a network with a subnet that collides with nothing on this host, or with this one.
    pub async fn create(
        &self,
        name: NetworkName,
        subnet: Option<Ipv4Net>,
    ) -> Result<Arc<Network>, NetworkError> {
        let changing = self.change().await;
        self.create_while(&changing, name, subnet).await
    }

    /// Removes a network and its bridge. Refused while VMs are on it, running or not.
    pub async fn remove(&self, name: &NetworkName) -> Result<(), NetworkError> {
        let _changing = self.change().await;
        let network = self
            .get(name)
            .ok_or_else(|| NetworkError::NotFound { name: name.clone() })?;
        let (db, row) = (&self.inner.db, name.clone());
        // Before the row, which says what the bridge is called. One that is in use stays.
        self.taps().clear(&bridge_plan(&network)).await?;
        let vms = db.call(move |db| db.remove_network(&row)).await?;
        if !vms.is_empty() {
            return Err(NetworkError::InUse {
                name: name.clone(),
                vms,
            });
        }
        let mut known = self.inner.known.write().unwrap_or_else(PoisonError::into_inner);
        known.remove(name);
        Ok(())
    }

    /// Waits until nobody else changes what is taken.
    pub(crate) async fn change(&self) -> Changing<'_> {
        Changing {
            _guard: self.inner.changing.lock().await,
        }
    }

    /// A place for a new VM: what it asked for, or what is free. `given` are the published ports of all VMs.
    pub(crate) async fn attach(
        &self,
        changing: &Changing<'_>,
        config: &NetworkConfig,
        given: &[PublishedPort],
    ) -> Result<Option<Attachment>, NetworkError> {
        let NetworkChoice::On(name) = &config.network else {
            return Ok(None);
        };
        let network = match self.get(name) {
            Some(network) => network,
            None if *name == NetworkName::default_network() => {
                self.create_while(changing, name.clone(), None).await?
            }
            None => return Err(NetworkError::NotFound { name: name.clone() }),
        };
        let subnet = network.ipv4;
        let row = name.clone();
        let taken = self.inner.db.call(move |db| db.taken_addresses(&row)).await?;
        let ipv4 = match config.ipv4 {
            Some(address) if !allocate::is_for_vms(subnet, address) => {
                return Err(NetworkError::NotForVms {
                    name: name.clone(),
                    subnet,
                    address,
                });
            }
            Some(address) if taken.ipv4.contains(&address) => {
                return Err(NetworkError::AddressTaken {
                    name: name.clone(),
                    address,
                });
            }
            Some(address) => address,
            None => {
                allocate::next_address(subnet, &taken.ipv4, taken.last).ok_or_else(|| NetworkError::Full {
                    name: name.clone(),
                    subnet,
                })?
            }
        };
        let publish = if config.publish.is_empty() {
            Vec::new()
        } else {
            let chosen = self.inner.ports.choose(&config.publish, given);
            chosen.map_err(|error| NetworkError::Ports(StageFailure(error)))?
        };
        Ok(Some(Attachment {
            network: name.clone(),
            mac: allocate::mac_of(ipv4),
            ipv4,
            ipv6: allocate::ipv6_of(network.ipv6, subnet, ipv4),
            publish,
        }))
    }

    async fn create_while(
        &self,
        _changing: &Changing<'_>,
        name: NetworkName,
        subnet: Option<Ipv4Net>,
    ) -> Result<Arc<Network>, NetworkError> {
        if self.get(&name).is_some() {
            return Err(NetworkError::NameTaken { name });
        }
        let bridge = bridge_name(&self.inner.config.data_dir, &name);
        // A bridge of ours that outlived its row is no reason to move away from what it has.
        let own = self.links().find(&bridge).await?.map(|link| link.index);
        let routes = self.links().routes(own.as_slice()).await?;
        let networks: Vec<_> = self.list().iter().map(|network| network.ipv4).collect();
        let found = match subnet {
            Some(subnet) => allocate::check_subnet(subnet, &routes, &networks),
            None => allocate::free_subnet(self.inner.config.pool, &routes, &networks),
        };
        let ipv4 = found.map_err(|source| NetworkError::Subnet {
            name: name.clone(),
            asked: subnet.is_some(),
            source,
        })?;
        let global_id = offshoot_sys::random::bytes().map_err(NetworkError::Random)?;
        let network = Arc::new(Network {
            bridge,
            ipv4,
            ipv6: allocate::unique_local(global_id),
            created_ms: now_ms(),
            name,
        });
        let row = Arc::clone(&network);
        self.inner.db.call(move |db| db.insert_network(&row)).await?;
        let mut known = self.inner.known.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(network.name.clone(), Arc::clone(&network));
        Ok(network)
    }
}

/// The row that holds what a VM was given.
pub(crate) fn address_row(attachment: &Attachment) -> AddressRow {
    AddressRow {
        network: attachment.network.clone(),
        ipv4: attachment.ipv4,
        ipv6: attachment.ipv6,
        mac: attachment.mac,
    }
}

/// The first bytes of a digest of these texts.
fn digest4(texts: &[&[u8]]) -> [u8; 4] {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update(text);
        hash.update([0]);
    }
    let digest = hash.finalize();
    [digest[0], digest[1], digest[2], digest[3]]
}

/// `ofs-` and eight digits that no other daemon's network has.
fn bridge_name(data_dir: &Path, name: &NetworkName) -> String {
    let digest = digest4(&[data_dir.as_os_str().as_encoded_bytes(), name.as_str().as_bytes()]);
    format!("ofs-{:08x}", u32::from_be_bytes(digest))
}

/// The bridge of a network.
pub fn bridge_plan(network: &Network) -> BridgePlan {
    let [a, b, c, d] = digest4(&[network.bridge.as_bytes()]);
    BridgePlan {
        name: network.bridge.clone(),
        // Locally administered, and none that a VM gets.
        mac: Mac([0x06, 0x6f, a, b, c, d]),
        ipv4: (network.gateway4(), network.ipv4),
        ipv6: (network.gateway6(), network.ipv6),
        mtu: MTU,
    }
}
