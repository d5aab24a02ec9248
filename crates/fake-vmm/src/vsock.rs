//! The guest's vsock as a Unix socket: a line asks for a port, a line answers, and then it is the agent's connection.

use std::io;
use std::path::Path;
use std::sync::Arc;

use offshoot_agent_proto::limits::VSOCK_PORT;
use offshoot_agent_proto::serve::{serve as serve_calls, service};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::guest::Guest;
use crate::machine::Machine;
use crate::port::Port;
use crate::service::Service;

/// `CONNECT ` and a number of 32 bits.
const MAX_LINE: usize = 24;

/// Makes the socket; the real ones do so when they are told of the device.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    UnixListener::bind(path)
}

/// Answers every host that comes, for as long as the socket lives.
pub(crate) async fn serve(socket: UnixListener, machine: Arc<Machine>, guest: Arc<Guest>) {
    let service = service(Arc::new(Service::new(guest)));
    while let Ok((mut stream, _)) = socket.accept().await {
        let (machine, service) = (Arc::clone(&machine), service.clone());
        tokio::spawn(async move {
            if asked_for_the_agent(&mut stream).await.unwrap_or(false) {
                let _ = serve_calls(Port::new(stream, machine), service).await;
            }
        });
    }
}

async fn asked_for_the_agent(stream: &mut UnixStream) -> io::Result<bool> {
    let mut line = Vec::new();
    while line.len() < MAX_LINE {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    if line != format!("CONNECT {VSOCK_PORT}").as_bytes() {
        return Ok(false);
    }
    stream.write_all(b"OK 1073741824\n").await?;
    Ok(true)
}
