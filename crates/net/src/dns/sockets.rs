//! Sockets in the daemon's namespace: those that listen, and those that ask upstreams.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::time::Duration;

use hickory_resolver::net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_resolver::net::runtime::{RuntimeProvider, TokioHandle, TokioTime};
use offshoot_model::{ErrorKind, Explain};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use super::PORT;
use crate::Namespace;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;
/// How long an upstream may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(2);

/// Nobody's addresses, to find out whether somebody has the port on all addresses (RFC 5737, RFC 3849).
const NOBODYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 53)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53)),
];

/// Why names cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve names on {address}")]
pub struct ListenError {
    /// Where.
    pub address: SocketAddr,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl ListenError {
    /// Whether somebody else has the port.
    pub fn is_taken(&self) -> bool {
        self.source.kind() == io::ErrorKind::AddrInUse
    }
}

impl Explain for ListenError {
    fn kind(&self) -> ErrorKind {
        if self.is_taken() {
            ErrorKind::Conflict
        } else {
            ErrorKind::NotPossible
        }
    }

    fn hints(&self) -> Vec<String> {
        if self.is_taken() {
            vec![taken_hint()]
        } else {
            vec!["run `offshoot doctor`, and look for the address with `ip addr`".into()]
        }
    }
}

fn taken_hint() -> String {
    format!(
        "another DNS server has port {PORT} on every address; `ss -lntup 'sport = :{PORT}'` names it. Let it listen on its \
         own addresses only (`bind-interfaces` in dnsmasq.conf), or give VMs `--network none`"
    )
}

/// Whether somebody has the DNS port on all addresses of the namespace, so that no network could be served; what to do
/// about it.
pub fn port_holder(namespace: &Namespace) -> Result<(), ListenError> {
    NOBODYS.into_iter().try_for_each(|ip| {
        let address = SocketAddr::new(ip, PORT);
        match bind(namespace, address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(ListenError {
                address: SocketAddr::new(
                    match ip {
                        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                    },
                    PORT,
                ),
                source: error,
            }),
            _ => Ok(()),
        }
    })
}

/// Both sockets of an address.
pub(crate) struct Bound {
    pub(crate) address: SocketAddr,
    pub(crate) udp: UdpSocket,
    pub(crate) tcp: TcpListener,
}

/// Listens on an address.
pub(crate) fn listen(namespace: &Namespace, address: SocketAddr) -> Result<Bound, ListenError> {
    let bound = bind(namespace, address).and_then(|(udp, tcp)| {
        Ok(Bound {
            address,
            udp: UdpSocket::from_std(udp.into())?,
            tcp: TcpListener::from_std(tcp.into())?,
        })
    });
    bound.map_err(|source| ListenError { address, source })
}

fn bind(namespace: &Namespace, address: SocketAddr) -> io::Result<(OwnedFd, OwnedFd)> {
    namespace.run(|| {
        let udp = bound(address, SocketType::DGRAM)?;
        let tcp = bound(address, SocketType::STREAM)?;
        rustix::net::listen(&tcp, BACKLOG)?;
        Ok((udp, tcp))
    })?
}

fn bound(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    // A bridge's IPv6 address is tentative for a second or two after it was given.
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true)?,
    }
    if kind == SocketType::STREAM {
        // Connections of an earlier daemon may still be dying.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

/// What hickory makes its sockets with: they belong to the namespace.
#[derive(Clone)]
pub(crate) struct InNamespace {
    namespace: Namespace,
    handle: TokioHandle,
}

impl InNamespace {
    pub(crate) fn new(namespace: Namespace) -> Self {
        Self {
            namespace,
            handle: TokioHandle::default(),
        }
    }

    /// Makes a socket. Another namespace is entered on a thread that may wait.
    async fn make<T: Send + 'static>(
        namespace: Namespace,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if namespace.name().is_none() {
            return make();
        }
        tokio::task::spawn_blocking(move || namespace.run(make).flatten())
            .await
            .map_err(io::Error::other)?
    }
}

impl RuntimeProvider for InNamespace {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> Self::Handle {
        self.handle.clone()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        from: Option<SocketAddr>,
        wait_for: Option<Duration>,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Tcp>>>> {
        let namespace = self.namespace.clone();
        Box::pin(async move {
            let socket = Self::make(namespace, move || {
                let socket = match server {
                    SocketAddr::V4(_) => TcpSocket::new_v4(),
                    SocketAddr::V6(_) => TcpSocket::new_v6(),
                }?;
                if let Some(from) = from {
                    socket.bind(from)?;
                }
                Ok(socket)
            })
            .await?;
            let connected = tokio::time::timeout(wait_for.unwrap_or(CONNECT), socket.connect(server)).await;
            let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            stream.set_nodelay(true)?;
            Ok(AsyncIoTokioAsStd(stream))
        })
    }

    fn bind_udp(
        &self,
        local: SocketAddr,
        _server: SocketAddr,
    ) -> Pin<Box<dyn Send + Future<Output = io::Result<Self::Udp>>>> {
        let namespace = self.namespace.clone();
        Box::pin(async move {
            let socket = Self::make(namespace, move || {
                let socket = std::net::UdpSocket::bind(local)?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .await?;
            UdpSocket::from_std(socket)
        })
    }
}
