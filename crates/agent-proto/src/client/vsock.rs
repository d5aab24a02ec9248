//! A guest's vsock port behind a VMM's Unix socket, as Firecracker and Cloud Hypervisor offer it: one line asks for a port,
//! one line answers, and then the socket is the connection (Firecracker's `docs/vsock.md`).
//!
//! ```text
//! us   CONNECT 1024 ⏎ ──►                 the VMM asks the guest
//!      ◄── OK 1073741824 ⏎                somebody listens there
//!      ◄── end of the stream              nobody does, yet
//! ```

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// A guest that boots is asked again after a twentieth of the time that it took so far, within these. Saying no is work for
/// it: one whose kernel is interpreted had little time left for anything else when it was asked every 50 ms.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_secs(1);
const PART: u32 = 20;
/// A guest without a driver yet does not answer; the VMM forgets some of what it was asked meanwhile. At least this, and a
/// quarter of the time so far: a slow guest that answers one that was given up has the next one to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// `OK ` and a number of 32 bits.
const MAX_LINE: usize = 16;

/// Connects to `port`; waits for a guest that is still booting. `maker` is the process that must have made the socket: a
/// VMM that was taken over could have put a link to another one there.
pub(super) async fn connect(path: &Path, port: u32, maker: Option<u32>) -> io::Result<UnixStream> {
    let began = Instant::now();
    loop {
        let mut stream = super::open(path).await?;
        if let Some(maker) = maker
            && stream.peer_cred()?.pid().map(i32::cast_unsigned) != Some(maker)
        {
            return Err(io::Error::other("another process than the VMM listens there"));
        }
        let patience = ANSWER.max(began.elapsed() / 4);
        if let Ok(Ok(true)) = tokio::time::timeout(patience, ask(&mut stream, port)).await {
            return Ok(stream);
        }
        tokio::time::sleep((began.elapsed() / PART).clamp(FIRST_PAUSE, LAST_PAUSE)).await;
    }
}

/// Whether the guest took the connection.
async fn ask(stream: &mut UnixStream, port: u32) -> io::Result<bool> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut line = Vec::new();
    while line.len() < MAX_LINE {
        // Byte by byte: what follows is the agent's.
        match stream.read_u8().await? {
            b'\n' => return Ok(line.starts_with(b"OK ")),
            byte => line.push(byte),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_guest_that_does_not_listen_yet_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let serve = async {
            for answer in ["", "", "no\n", "OK 123456789012345678", "OK 1073741824\nhello"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 13];
                stream.read_exact(&mut asked).await.unwrap();
                assert_eq!(&asked, b"CONNECT 1024\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        let (stream, ()) = tokio::join!(connect(&path, 1024, Some(std::process::id())), serve);
        let mut said = String::new();
        stream.unwrap().read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "hello", "not a byte of the agent's was taken");
        assert!(connect(&path, 1024, Some(1)).await.is_err(), "a stranger");
        drop(listener);
        assert!(connect(&path, 1024, None).await.is_err(), "nobody");
    }
}
