//! Ports of the host that lead into VMs, held so that nobody else takes them.
//!
//! A published port is a translation of addresses: no socket is needed for it. One is bound all the same, and never
//! listens: a program that wants the port is told that it is taken, instead of listening where nothing arrives.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use offshoot_model::{ErrorKind, Explain, PublishedPort, Transport};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, getsockname, socket_with, sockopt};

use crate::Namespace;

/// How often a free port is looked for that is free for IPv4 and IPv6 alike.
const TRIES: usize = 32;

/// Why a port cannot be held.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Another VM has it.
    #[error("{} port {} of the host leads to `{holder}` already", port.transport, port.host)]
    Published {
        /// Which.
        port: PublishedPort,
        /// Who has it.
        holder: String,
    },
    /// A program on this host has it.
    #[error("{} port {} of the host is taken by a program on this host", port.transport, port.host)]
    Taken {
        /// Which.
        port: PublishedPort,
    },
    /// The address is none of this host's.
    #[error("{address} is not an address of this host")]
    Address {
        /// Which.
        address: IpAddr,
    },
    /// The kernel.
    #[error("cannot hold {} port {} of the host", port.transport, port.host)]
    Bind {
        /// Which.
        port: PublishedPort,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl PortError {
    /// What an error of bind(2) means.
    fn of(port: &PublishedPort, source: io::Error) -> Self {
        match (source.kind(), port.address) {
            (io::ErrorKind::AddrInUse, _) => Self::Taken { port: *port },
            (io::ErrorKind::AddrNotAvailable, Some(address)) => Self::Address { address },
            _ => Self::Bind { port: *port, source },
        }
    }
}

impl Explain for PortError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Published { .. } | Self::Taken { .. } => ErrorKind::Conflict,
            Self::Address { .. } => ErrorKind::NotPossible,
            Self::Bind { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Published { holder, .. } => vec![format!(
                "stop it with `offshoot stop {holder}`, or make the VM with another port of the host: `-p 0:GUEST` takes a free one"
            )],
            Self::Taken { port } => {
                let listing = match port.transport {
                    Transport::Tcp => "ss -ltnp",
                    Transport::Udp => "ss -lunp",
                };
                vec![format!(
                    "see who has it with `{listing} 'sport = :{}'`, or make the VM with another port of the host: `-p 0:{}` takes a free one",
                    port.host, port.guest
                )]
            }
            Self::Address { .. } => {
                vec!["see this host's addresses with `ip address`, or leave the address away".into()]
            }
            Self::Bind { .. } => Vec::new(),
        }
    }
}

/// Binds a published port in the namespace that the thread is in, port 0 to a free one; gives the sockets and the port.
pub fn bind(port: &PublishedPort) -> io::Result<(Vec<OwnedFd>, u16)> {
    let one = |address, number| {
        let (socket, number) = bind_one(SocketAddr::new(address, number), port.transport)?;
        Ok((vec![socket], number))
    };
    match port.address {
        Some(address) => one(address, port.host),
        None if port.host != 0 => bind_both(port.host, port.transport),
        None => {
            for _ in 0..TRIES {
                let (socket, number) = one(Ipv4Addr::UNSPECIFIED.into(), 0)?;
                drop(socket);
                match bind_both(number, port.transport) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                    bound => return bound,
                }
            }
            Err(io::ErrorKind::AddrInUse.into())
        }
    }
}

/// Every address of IPv4 and, where the host has it, of IPv6.
fn bind_both(number: u16, transport: Transport) -> io::Result<(Vec<OwnedFd>, u16)> {
    let four = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), number);
    let mut sockets = vec![bind_one(four, transport)?.0];
    match bind_one(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), number), transport) {
        Ok((socket, _)) => sockets.push(socket),
        Err(error) if without_ipv6(&error) => {}
        Err(error) => return Err(error),
    }
    Ok((sockets, number))
}

fn without_ipv6(error: &io::Error) -> bool {
    [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Without `SO_REUSEADDR`: with it, another one that has it, too, gets the same port.
fn bind_one(address: SocketAddr, transport: Transport) -> io::Result<(OwnedFd, u16)> {
    let kind = match transport {
        Transport::Tcp => SocketType::STREAM,
        Transport::Udp => SocketType::DGRAM,
    };
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    match address {
        SocketAddr::V4(address) => rustix::net::bind(&socket, &address)?,
        SocketAddr::V6(address) => {
            sockopt::set_ipv6_v6only(&socket, true)?;
            rustix::net::bind(&socket, &address)?;
        }
    }
    let bound: SocketAddr = getsockname(&socket)?
        .try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((socket, bound.port()))
}

/// Whether two published ports want the same packets.
pub fn meet(one: &PublishedPort, other: &PublishedPort) -> bool {
    let address = one.address.is_none() || other.address.is_none() || one.address == other.address;
    address && one.host == other.host && one.transport == other.transport
}

/// The ports that are held, by who has them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Reservations {
    namespace: Namespace,
    held: Arc<Mutex<BTreeMap<String, Held>>>,
}

#[derive(Debug)]
struct Held {
    /// What the holder is called, for those who want the same.
    name: String,
    ports: Vec<PublishedPort>,
    /// Closed when dropped, which gives the ports back.
    _sockets: Vec<OwnedFd>,
}

impl Reservations {
    /// Nothing is held yet.
    pub fn new(namespace: Namespace) -> Self {
        Self {
            namespace,
            held: Arc::default(),
        }
    }

    /// Holds all of `ports` for `holder`, which is called `name`, or none of them. Whoever holds some already keeps them.
    pub fn hold(&self, holder: &str, name: &str, ports: &[PublishedPort]) -> Result<(), PortError> {
        let mut held = self.held();
        if ports.is_empty() || held.get(holder).is_some_and(|held| held.ports == ports) {
            return Ok(());
        }
        held.remove(holder);
        for port in ports {
            let other = held
                .values()
                .find(|held| held.ports.iter().any(|other| meet(port, other)));
            if let Some(other) = other {
                return Err(PortError::Published {
                    port: *port,
                    holder: other.name.clone(),
                });
            }
        }
        let bound = self.namespace.run(|| {
            let mut sockets = Vec::new();
            for port in ports {
                sockets.extend(bind(port).map_err(|source| PortError::of(port, source))?.0);
            }
            Ok(sockets)
        });
        let sockets = bound.map_err(|source| PortError::Bind {
            port: ports[0],
            source,
        })??;
        held.insert(
            holder.to_owned(),
            Held {
                name: name.to_owned(),
                ports: ports.to_vec(),
                _sockets: sockets,
            },
        );
        Ok(())
    }

    /// Gives back what `holder` has.
    pub fn release(&self, holder: &str) {
        self.held().remove(holder);
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn port(host: u16, transport: Transport) -> PublishedPort {
        PublishedPort {
            address: Some(Ipv4Addr::LOCALHOST.into()),
            host,
            guest: 80,
            transport,
        }
    }

    #[test]
    fn what_is_held_is_taken_and_what_is_given_back_is_free() {
        for transport in [Transport::Tcp, Transport::Udp] {
            let (sockets, number) = bind(&port(0, transport)).unwrap();
            let address = (Ipv4Addr::LOCALHOST, number);
            let others = || match transport {
                Transport::Tcp => TcpListener::bind(address).map(|_| ()),
                Transport::Udp => UdpSocket::bind(address).map(|_| ()),
            };
            assert_eq!(others().unwrap_err().kind(), io::ErrorKind::AddrInUse);
            drop(sockets);
            others().unwrap();
        }
    }

    #[test]
    fn a_holder_has_all_or_nothing_and_is_named() {
        let reservations = Reservations::new(Namespace::own());
        let (sockets, one) = bind(&port(0, Transport::Tcp)).unwrap();
        let (more, other) = bind(&port(0, Transport::Tcp)).unwrap();
        drop((sockets, more));
        let (one, other) = (port(one, Transport::Tcp), port(other, Transport::Tcp));
        reservations.hold("1", "web", &[one]).unwrap();
        reservations.hold("1", "web", &[one]).unwrap();
        let everywhere = PublishedPort { address: None, ..one };
        let refused = reservations.hold("2", "db", &[other, everywhere]).unwrap_err();
        assert!(matches!(&refused, PortError::Published { holder, .. } if holder == "web"));
        assert!(refused.hints()[0].contains("offshoot stop web"), "{refused}");
        // Not even the first one.
        reservations.hold("3", "mail", &[other]).unwrap();
        reservations.release("1");
        reservations.hold("2", "db", &[one]).unwrap();
    }

    #[test]
    fn a_program_that_listens_keeps_its_port() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let wanted = port(listener.local_addr().unwrap().port(), Transport::Tcp);
        let reservations = Reservations::new(Namespace::own());
        let refused = reservations.hold("1", "web", &[wanted]).unwrap_err();
        assert!(matches!(refused, PortError::Taken { .. }), "{refused}");
        assert!(refused.hints()[0].contains("ss -ltnp"), "{refused}");
        let nowhere = PublishedPort {
            address: Some("192.0.2.1".parse().unwrap()),
            ..wanted
        };
        let refused = reservations.hold("1", "web", &[nowhere]).unwrap_err();
        assert!(matches!(refused, PortError::Address { .. }), "{refused}");
    }

    #[test]
    fn a_free_port_is_free_for_both_versions() {
        let asked = PublishedPort {
            address: None,
            ..port(0, Transport::Udp)
        };
        let (_sockets, number) = bind(&asked).unwrap();
        assert_ne!(number, 0);
        for address in ["0.0.0.0", "::"] {
            let address: IpAddr = address.parse().unwrap();
            assert!(UdpSocket::bind((address, number)).is_err(), "{address}");
        }
    }
}
