//! The fake's QMP: one client at a time, as QEMU does it.

use std::io;
use std::sync::Arc;

use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::codec::{FramedRead, LinesCodec};

use crate::Behaviour;
use crate::guest::Guest;
use crate::machine::Machine;

/// A command of ours has a few hundred bytes.
const MAX_LINE: usize = 64 << 10;

/// Serves clients until told to quit; returns the status to exit with.
pub(crate) async fn serve(
    socket: &UnixListener,
    machine: &Machine,
    guest: &Arc<Guest>,
    behaviour: &Behaviour,
) -> io::Result<i32> {
    loop {
        let (stream, _) = socket.accept().await?;
        // A client that leaves in the middle is its own business.
        let _ = talk(stream, machine, guest, behaviour).await;
        machine.set_client(None);
        if let Some(status) = machine.exit() {
            return Ok(status);
        }
    }
}

async fn talk(
    mut stream: UnixStream,
    machine: &Machine,
    guest: &Arc<Guest>,
    behaviour: &Behaviour,
) -> io::Result<()> {
    if behaviour.hang {
        return std::future::pending().await;
    }
    let (reader, mut writer) = stream.split();
    if behaviour.garbage {
        return writer.write_all(b"\x01\x02 220 this is no QMP\n").await;
    }
    writer
        .write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n")
        .await?;
    // Answers and events in the order in which they came to be.
    let (lines, mut to_write) = mpsc::unbounded_channel();
    machine.set_client(Some(lines.clone()));
    let mut commands = FramedRead::new(reader, LinesCodec::new_with_max_length(MAX_LINE));
    loop {
        tokio::select! {
            biased;
            Some(line) = to_write.recv() => writer.write_all(format!("{line}\r\n").as_bytes()).await?,
            line = commands.next(), if machine.exit().is_none() => match line {
                Some(Ok(line)) => {
                    // The other end of the channel is ours.
                    let _ = lines.send(answer(&line, machine, guest, behaviour).to_string());
                }
                Some(Err(_)) | None => return Ok(()),
            },
            else => return Ok(()),
        }
        if machine.exit().is_some() && to_write.is_empty() {
            return Ok(());
        }
    }
}

fn answer(line: &str, machine: &Machine, guest: &Arc<Guest>, behaviour: &Behaviour) -> Value {
    let command: Value = serde_json::from_str(line).unwrap_or_default();
    let name = command["execute"].as_str().unwrap_or_default();
    let reply = if behaviour.refuse.iter().any(|refused| refused == name) {
        Err(format!("this fake refuses {name}"))
    } else {
        machine.carry_out(name, &command["arguments"], behaviour.deaf)
    };
    if name == "system_powerdown" && reply.is_ok() {
        guest.power_button();
    }
    let mut reply = match reply {
        Ok(value) => json!({"return": value}),
        Err(desc) => json!({"error": {"class": "GenericError", "desc": desc}}),
    };
    reply["id"] = command["id"].clone();
    reply
}
