//! A daemon's Unix socket as a TCP port of this machine, for programs that know nothing else.

use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Passes connections to a port of the loopback interface on to a Unix socket, until it is dropped.
pub struct Forwarder {
    port: u16,
    ended: Arc<AtomicBool>,
}

impl Forwarder {
    /// Forwards a port that was free to `socket`.
    pub fn start(socket: &Path) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let ended = Arc::new(AtomicBool::new(false));
        let (socket, over) = (socket.to_owned(), Arc::clone(&ended));
        std::thread::spawn(move || accept(&listener, &socket, &over));
        Self { port, ended }
    }

    /// `http://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        // Wakes the one who accepts.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

fn accept(listener: &TcpListener, socket: &PathBuf, over: &AtomicBool) {
    for client in listener.incoming() {
        if over.load(Ordering::Acquire) {
            return;
        }
        let (Ok(client), Ok(daemon)) = (client, UnixStream::connect(socket)) else {
            continue;
        };
        let (Ok(from_client), Ok(to_daemon)) = (client.try_clone(), daemon.try_clone()) else {
            continue;
        };
        std::thread::spawn(move || pass_on(from_client, to_daemon, |to| to.shutdown(Shutdown::Write)));
        std::thread::spawn(move || pass_on(daemon, client, |to| to.shutdown(Shutdown::Both)));
    }
}

/// Passes bytes on until there are no more, and the end as well.
fn pass_on<W: io::Write>(mut from: impl io::Read, mut to: W, end: impl FnOnce(&W) -> io::Result<()>) {
    let _ = io::copy(&mut from, &mut to);
    let _ = end(&to);
}
