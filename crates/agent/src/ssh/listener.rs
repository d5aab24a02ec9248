//! The TCP port on the guest's addresses.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen as listen_on, socket_with, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::Server;
use super::connection::{Peer, serve};
use crate::log;

/// Connections that have not logged in; more are closed at once (sshd's MaxStartups ends at 100).
const MAX_UNKNOWN: usize = 64;

/// Connections that the kernel keeps while the agent is busy.
const BACKLOG: i32 = 128;

/// How long accepting rests when there is no descriptor or memory left.
const REST: Duration = Duration::from_millis(100);

/// A client that is gone without a word is noticed after a minute and three more tries.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TRIES: u32 = 3;

/// Listens on every address there is or will be, until the server closes.
pub(crate) fn listen(server: &Arc<Server>, port: u16) -> io::Result<()> {
    let listener = match open(AddressFamily::INET6, (Ipv6Addr::UNSPECIFIED, port).into()) {
        // A kernel without IPv6.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            open(AddressFamily::INET, (Ipv4Addr::UNSPECIFIED, port).into())?
        }
        listener => listener?,
    };
    attend(server, TcpListener::from_std(listener)?);
    Ok(())
}

/// Serves whoever connects, until the server closes.
pub(super) fn attend(server: &Arc<Server>, listener: TcpListener) {
    let task = Arc::clone(server);
    server.tasks.spawn(async move {
        tokio::select! {
            () = task.closing.cancelled() => {}
            () = accept(&task, &listener) => {}
        }
    });
}

/// A listening socket; with IPv6, for both families.
pub(super) fn open(family: AddressFamily, address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if family == AddressFamily::INET6 {
        let one_family = !address.ip().is_unspecified();
        sockopt::set_ipv6_v6only(&socket, one_family)?;
    }
    bind(&socket, &address)?;
    listen_on(&socket, BACKLOG)?;
    Ok(socket.into())
}

async fn accept(server: &Arc<Server>, listener: &TcpListener) {
    let unknown = Arc::new(Semaphore::new(MAX_UNKNOWN));
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                log::warning(format_args!("cannot accept an SSH connection: {error}"));
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&unknown).try_acquire_owned() else {
            continue;
        };
        // One that is gone again shows that when it is read from.
        let _ = prepare(&stream);
        let Ok(address) = stream.local_addr() else {
            continue;
        };
        let peer = Peer::Network {
            client,
            server: address,
        };
        let connection = serve(Arc::clone(server), stream, peer, Vec::new(), Some(permit));
        server.tasks.spawn(connection);
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    Ok(sockopt::set_tcp_keepcnt(stream, KEEPALIVE_TRIES)?)
}
