//! Interfaces, addresses and routes of a namespace, by rtnetlink(7).
//!
//! `bridge.rs` makes and mends bridges, `tap.rs` TAP devices, `routes.rs` says what the host has a way to. Nothing here
//! remembers anything: the kernel is asked each time.

mod bridge;
mod routes;
mod tap;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use futures::TryStreamExt as _;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use offshoot_model::{ErrorKind, Explain, Mac};
use tokio::task::JoinHandle;

pub use bridge::BridgePlan;
pub use tap::Tap;

use crate::Namespace;

/// Why the kernel's interfaces could not be asked or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The namespace or its socket.
    #[error("cannot speak to the kernel about networks")]
    Socket(#[source] io::Error),
    /// One request.
    #[error("cannot {doing}")]
    Request {
        /// What was being done, with the interface's name.
        doing: String,
        /// The kernel's answer.
        #[source]
        source: RequestError,
    },
    /// `/dev/net/tun`.
    #[error("cannot make the TAP {name} by /dev/net/tun")]
    Tap {
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The name of a bridge of ours, on something that is not.
    #[error("the interface {name} is not ours")]
    NotOurs {
        /// The interface.
        name: String,
    },
    /// It vanished in between.
    #[error("the interface {name} is gone")]
    Gone {
        /// The interface.
        name: String,
    },
}

impl Explain for LinkError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotOurs { .. } => ErrorKind::Conflict,
            Self::Socket(_) | Self::Tap { .. } => ErrorKind::NotPossible,
            Self::Request { .. } | Self::Gone { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotOurs { name } => vec![format!(
                "look at it with `ip -d link show {name}`, and rename or remove it"
            )],
            Self::Socket(_) | Self::Tap { .. } => {
                vec!["see what this host lacks with `offshoot doctor`".into()]
            }
            Self::Request { .. } | Self::Gone { .. } => Vec::new(),
        }
    }
}

/// The kernel's answer to one request.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// It refused.
    #[error(transparent)]
    Refused(io::Error),
    /// The conversation broke.
    #[error(transparent)]
    Broken(rtnetlink::Error),
}

impl From<rtnetlink::Error> for RequestError {
    fn from(error: rtnetlink::Error) -> Self {
        match error {
            rtnetlink::Error::NetlinkError(message) => Self::Refused(message.to_io()),
            other => Self::Broken(other),
        }
    }
}

impl RequestError {
    fn is(&self, errno: rustix::io::Errno) -> bool {
        matches!(self, Self::Refused(error) if error.raw_os_error() == Some(errno.raw_os_error()))
    }
}

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// The number of the bridge it is on.
    pub bridge: Option<u32>,
    /// Its own address, where it is of that kind.
    pub mac: Option<Mac>,
    /// The largest packet, bytes.
    pub mtu: u32,
    /// Whether it is switched on.
    pub up: bool,
}

/// What an interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge.
    Bridge,
    /// A TUN or TAP device.
    Tun,
    /// Anything else.
    Other,
}

/// The interfaces of one namespace. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Links {
    namespace: Namespace,
    connection: Arc<Connection>,
}

#[derive(Debug)]
struct Connection {
    handle: rtnetlink::Handle,
    task: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Links {
    /// Opens a netlink socket in the namespace. Called within a Tokio runtime, which carries the conversation.
    pub fn open(namespace: Namespace) -> Result<Self, LinkError> {
        let runtime = tokio::runtime::Handle::current();
        let opened = namespace.run(|| {
            let _entered = runtime.enter();
            rtnetlink::new_connection()
        });
        let (connection, handle, _unasked) = opened.and_then(|opened| opened).map_err(LinkError::Socket)?;
        let task = tokio::spawn(connection);
        Ok(Self {
            namespace,
            connection: Arc::new(Connection { handle, task }),
        })
    }

    /// The namespace they are in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    fn handle(&self) -> &rtnetlink::Handle {
        &self.connection.handle
    }

    /// Every interface.
    pub async fn list(&self) -> Result<Vec<Link>, LinkError> {
        let listed: Result<Vec<LinkMessage>, _> = self.handle().link().get().execute().try_collect().await;
        let messages = listed.map_err(|error| refused("list interfaces", error))?;
        Ok(messages.iter().filter_map(link_of).collect())
    }

    /// The interface of this name, if there is one.
    pub async fn find(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let mut found = self.handle().link().get().match_name(name).execute();
        match found.try_next().await.map_err(RequestError::from) {
            Ok(message) => Ok(message.as_ref().and_then(link_of)),
            Err(source) if source.is(rustix::io::Errno::NODEV) => Ok(None),
            Err(source) => Err(LinkError::Request {
                doing: format!("look for the interface {name}"),
                source,
            }),
        }
    }

    async fn change(&self, message: LinkMessage, doing: &str) -> Result<(), LinkError> {
        let changed = self.handle().link().change(message).execute().await;
        changed.map_err(|error| refused(doing, error))
    }

    /// Removes an interface; it is no error if it is gone.
    pub async fn remove(&self, link: &Link) -> Result<(), LinkError> {
        match self.handle().link().del(link.index).execute().await {
            Ok(()) => Ok(()),
            Err(error) => match RequestError::from(error) {
                source if source.is(rustix::io::Errno::NODEV) => Ok(()),
                source => Err(LinkError::Request {
                    doing: format!("remove the interface {}", link.name),
                    source,
                }),
            },
        }
    }

    /// The addresses of an interface, with the lengths of their prefixes.
    pub async fn addresses(&self, link: &Link) -> Result<Vec<(IpAddr, u8)>, LinkError> {
        let request = self.handle().address().get().set_link_index_filter(link.index);
        let messages: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused(&format!("read the addresses of {}", link.name), error))?;
        let address = |message: &netlink_packet_route::address::AddressMessage| {
            let length = message.header.prefix_len;
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some((*address, length)),
                _ => None,
            })
        };
        Ok(messages.iter().filter_map(address).collect())
    }
}

fn refused(doing: &str, error: rtnetlink::Error) -> LinkError {
    LinkError::Request {
        doing: doing.to_owned(),
        source: error.into(),
    }
}

/// What we want to know of an interface; nothing for one without a name.
fn link_of(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: LinkKind::Other,
        bridge: None,
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.bridge = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok().map(Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Bridge) => link.kind = LinkKind::Bridge,
                        LinkInfo::Kind(InfoKind::Tun) => link.kind = LinkKind::Tun,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}
