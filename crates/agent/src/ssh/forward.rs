//! Forwarded connections: to sockets of the guest (`-L`), and from sockets in it (`-R`).
//!
//! Addresses, names and paths are the guest's, and so are rights: a socket is opened by a thread that is the user who
//! logged in. As for sshd with `GatewayPorts clientspecified` and `StreamLocalBindMask 0177`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use russh::server::{ChannelOpenHandle, Handle, Msg};
use russh::{Channel, ChannelOpenFailure};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::inbox::Inboxes;
use super::pump::pump;
use super::{Server, listener, resolve};
use crate::users::Identity;
use crate::workload::Workload;

/// Forwarded connections at once, for one client.
const MAX_CONNECTIONS: usize = 512;

/// Sockets that one client has us listen on.
const MAX_LISTENERS: usize = 64;

/// How long a connection may take to be made, the look-up of its name included.
const CONNECT_TIME: Duration = Duration::from_secs(30);

/// How long accepting rests when there is no descriptor or memory left.
const REST: Duration = Duration::from_millis(100);

/// Nobody but its owner may connect to a socket.
pub(super) const SOCKET_MASK: u32 = 0o177;

/// Where a client's forwards lead.
#[derive(Clone)]
pub(super) struct Guest {
    /// For its tasks.
    pub(super) server: Arc<Server>,
    /// What it sees.
    pub(super) workload: Arc<Workload>,
    /// Who it is.
    pub(super) identity: Identity,
    /// Its channels.
    pub(super) inboxes: Arc<Inboxes>,
}

impl Guest {
    /// Carries between a channel and a socket until both are done.
    pub(super) async fn carry<S>(&self, channel: Channel<Msg>, socket: S)
    where
        S: AsyncRead + AsyncWrite,
    {
        // What comes in is in the inbox; nobody reads the library's own copy.
        let (_, out) = channel.split();
        if let Some(inbox) = self.inboxes.inbox(out.id()) {
            pump(socket, &inbox, &out).await;
        }
        self.inboxes.close(out.id());
    }

    async fn connect_tcp(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in resolve::addresses(&self.workload, host).await? {
            match TcpStream::connect((address, port)).await {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_local(&self, path: String) -> io::Result<UnixStream> {
        let socket = self.workload.run_as(&self.identity, move || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // A server that is busy refuses (EAGAIN); waiting for it would hold the guest's files.
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        });
        UnixStream::from_std(std::os::unix::net::UnixStream::from(socket.await?))
    }

    async fn bind_tcp(&self, family: AddressFamily, address: SocketAddr) -> io::Result<TcpListener> {
        let listener = self
            .workload
            .run_as(&self.identity, move || listener::open(family, address));
        TcpListener::from_std(listener.await?)
    }

    /// Listens on a path, which only its owner may use.
    pub(super) async fn bind_local(&self, path: PathBuf) -> io::Result<UnixListener> {
        let socket = self.workload.run_as(&self.identity, move || {
            // The thread's own, as its root and working directory are.
            rustix::process::umask(Mode::from_raw_mode(SOCKET_MASK));
            let listener = std::os::unix::net::UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok(OwnedFd::from(listener))
        });
        UnixListener::from_std(std::os::unix::net::UnixListener::from(socket.await?))
    }

    /// Removes what was listened on; a user who did so already is right.
    pub(super) async fn remove(&self, paths: Vec<PathBuf>) {
        let removed = self.workload.run_as(&self.identity, move || {
            for path in paths {
                let result = if path.is_dir() {
                    fs::remove_dir(path)
                } else {
                    fs::remove_file(path)
                };
                drop(result);
            }
            Ok(())
        });
        drop(removed.await);
    }
}

/// The sockets to listen on for an address that a client asked for.
fn bind_addresses(address: &str) -> Option<Vec<IpAddr>> {
    match address {
        // One socket for both families.
        "" | "*" => Some(vec![Ipv6Addr::UNSPECIFIED.into()]),
        "localhost" => Some(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]),
        _ => address.parse().ok().map(|address| vec![address]),
    }
}

/// What one client has open.
pub(super) struct Forwards {
    connections: Arc<Semaphore>,
    tcp: HashMap<(String, u32), CancellationToken>,
    local: HashMap<String, CancellationToken>,
    over: CancellationToken,
}

impl Forwards {
    /// Nothing yet; everything ends with `over`.
    pub(super) fn new(over: CancellationToken) -> Self {
        Self {
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            tcp: HashMap::new(),
            local: HashMap::new(),
            over,
        }
    }

    fn is_full(&self) -> bool {
        self.tcp.len() + self.local.len() >= MAX_LISTENERS
    }

    /// `-L` to an address.
    pub(super) async fn direct_tcp(
        &self,
        guest: Guest,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        reply: ChannelOpenHandle,
    ) {
        let Ok(port) = u16::try_from(port) else {
            return reply.reject(ChannelOpenFailure::ConnectFailed).await;
        };
        let (host, connecting) = (host.to_owned(), guest.clone());
        let connecting = async move { connecting.connect_tcp(&host, port).await };
        self.direct(guest, channel, reply, connecting).await;
    }

    /// `-L` to a path.
    pub(super) async fn direct_local(
        &self,
        guest: Guest,
        channel: Channel<Msg>,
        path: &str,
        reply: ChannelOpenHandle,
    ) {
        let (path, connecting) = (path.to_owned(), guest.clone());
        let connecting = async move { connecting.connect_local(path).await };
        self.direct(guest, channel, reply, connecting).await;
    }

    async fn direct<S>(
        &self,
        guest: Guest,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        connecting: impl Future<Output = io::Result<S>> + Send + 'static,
    ) where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
            return reply.reject(ChannelOpenFailure::ResourceShortage).await;
        };
        let over = self.over.clone();
        let tasks = guest.server.tasks.clone();
        tasks.spawn(async move {
            let connected = tokio::select! {
                connected = timeout(CONNECT_TIME, connecting) => connected,
                () = over.cancelled() => return,
            };
            match connected {
                Ok(Ok(socket)) => {
                    guest.inboxes.insert(channel.id());
                    reply.accept().await;
                    guest.carry(channel, socket).await;
                }
                _ => reply.reject(ChannelOpenFailure::ConnectFailed).await,
            }
            drop(permit);
        });
    }

    /// `-R` from a port; returns which it became.
    pub(super) async fn listen_tcp(
        &mut self,
        guest: Guest,
        handle: Handle,
        address: &str,
        port: u32,
    ) -> Option<u32> {
        if self.is_full() {
            return None;
        }
        let mut bound = u16::try_from(port).ok()?;
        let mut listeners = Vec::new();
        for ip in bind_addresses(address)? {
            let family = if ip.is_ipv6() {
                AddressFamily::INET6
            } else {
                AddressFamily::INET
            };
            match guest.bind_tcp(family, (ip, bound).into()).await {
                Ok(listener) => {
                    // The other family gets the same.
                    bound = listener.local_addr().ok()?.port();
                    listeners.push(listener);
                }
                // Without IPv6, IPv4 does.
                Err(_) if !listeners.is_empty() => {}
                Err(_) if ip == IpAddr::from(Ipv6Addr::UNSPECIFIED) => {
                    let any = (Ipv4Addr::UNSPECIFIED, bound).into();
                    let listener = guest.bind_tcp(AddressFamily::INET, any).await.ok()?;
                    bound = listener.local_addr().ok()?.port();
                    listeners.push(listener);
                }
                Err(_) => return None,
            }
        }
        let bound = u32::from(bound);
        let cancel = self.over.child_token();
        for listener in listeners {
            let forward = Remote {
                guest: guest.clone(),
                handle: handle.clone(),
                cancel: cancel.clone(),
                connections: Arc::clone(&self.connections),
            };
            guest
                .server
                .tasks
                .spawn(forward.accept_tcp(listener, address.to_owned(), bound));
        }
        self.tcp.insert((address.to_owned(), bound), cancel);
        Some(bound)
    }

    /// Listens no more; open connections go on.
    pub(super) fn cancel_tcp(&mut self, address: &str, port: u32) -> bool {
        let cancel = self.tcp.remove(&(address.to_owned(), port));
        cancel.inspect(CancellationToken::cancel).is_some()
    }

    /// `-R` from a path.
    pub(super) async fn listen_local(&mut self, guest: Guest, handle: Handle, path: &str) -> bool {
        if self.is_full() || !path.starts_with('/') {
            return false;
        }
        let Ok(listener) = guest.bind_local(path.into()).await else {
            return false;
        };
        let cancel = self.over.child_token();
        let forward = Remote {
            guest: guest.clone(),
            handle,
            cancel: cancel.clone(),
            connections: Arc::clone(&self.connections),
        };
        guest
            .server
            .tasks
            .spawn(forward.accept_local(listener, path.to_owned()));
        self.local.insert(path.to_owned(), cancel);
        true
    }

    /// Listens no more; open connections go on.
    pub(super) fn cancel_local(&mut self, path: &str) -> bool {
        let cancel = self.local.remove(path);
        cancel.inspect(CancellationToken::cancel).is_some()
    }
}

/// One socket that connections for the client come from.
pub(super) struct Remote {
    pub(super) guest: Guest,
    pub(super) handle: Handle,
    pub(super) cancel: CancellationToken,
    pub(super) connections: Arc<Semaphore>,
}

impl Remote {
    async fn accept_tcp(self, listener: TcpListener, address: String, port: u32) {
        while let Some(((socket, peer), permit)) = self.next(|| listener.accept()).await {
            let (guest, handle, address) = (self.guest.clone(), self.handle.clone(), address.clone());
            self.guest.server.tasks.spawn(async move {
                // A socket that is gone again shows that when it is read from.
                let _ = socket.set_nodelay(true);
                let from = peer.ip().to_canonical().to_string();
                let opened = handle.channel_open_forwarded_tcpip(address, port, from, peer.port().into());
                if let Ok(channel) = opened.await {
                    guest.carry(channel, socket).await;
                }
                drop(permit);
            });
        }
    }

    async fn accept_local(self, listener: UnixListener, path: String) {
        while let Some(((socket, _), permit)) = self.next(|| listener.accept()).await {
            let (guest, handle, path) = (self.guest.clone(), self.handle.clone(), path.clone());
            self.guest.server.tasks.spawn(async move {
                if let Ok(channel) = handle.channel_open_forwarded_streamlocal(path).await {
                    guest.carry(channel, socket).await;
                }
                drop(permit);
            });
        }
        drop(listener);
        self.guest.remove(vec![path.into()]).await;
    }

    /// The next connection that there is room for; nothing when listening ends.
    pub(super) async fn next<T, F>(&self, accept: impl Fn() -> F) -> Option<(T, OwnedSemaphorePermit)>
    where
        F: Future<Output = io::Result<T>>,
    {
        loop {
            let accepted = tokio::select! {
                accepted = accept() => accepted,
                () = self.cancel.cancelled() => return None,
            };
            match accepted {
                Ok(accepted) => {
                    // One too many is closed again.
                    if let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() {
                        return Some((accepted, permit));
                    }
                }
                Err(_) => tokio::time::sleep(REST).await,
            }
        }
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_client_says_where_to_listen() {
        let check = |address: &str, expected: &[&str]| {
            let found = bind_addresses(address).unwrap_or_default();
            let found: Vec<String> = found.iter().map(ToString::to_string).collect();
            assert_eq!(found, expected, "{address:?}");
        };
        check("", &["::"]);
        check("*", &["::"]);
        check("localhost", &["127.0.0.1", "::1"]);
        check("0.0.0.0", &["0.0.0.0"]);
        check("10.0.0.2", &["10.0.0.2"]);
        check("example.com", &[]);
    }
}
