//! Relays between a session and this program's own streams, signals and terminal.
//!
//! ```text
//! stdin ─► detach keys ─┐
//! signals, SIGWINCH ────┴─► session ─► stdout, stderr ─► status
//! ```
//!
//! The two directions are two futures: a process that does not read must not keep us from reading what it writes.

use std::cell::OnceCell;
use std::io::Write;
use std::time::Instant;

use futures::future;
use offshoot_api::channel::Status;
use offshoot_api::client::{Client, ClientMessage, DaemonMessage, Session, SessionSink, SessionStream};
use offshoot_api::vm::KillQuery;
use offshoot_model::ErrorKind;
use tokio::io::AsyncWriteExt;

use crate::detach::DetachKeys;
use crate::error::Failure;
use crate::signals::{Event, Signals};
use crate::terminal::{self, RawTerminal};

/// What a session has of this program.
#[derive(Debug)]
pub(crate) struct Relay<'a> {
    /// Standard input.
    pub(crate) stdin: bool,
    /// The terminal.
    pub(crate) tty: bool,
    pub(crate) signals: &'a mut Signals,
    /// The VM whose main process this is; signals that input holds up go there directly.
    pub(crate) main_of: Option<(&'a Client, &'a str)>,
}

/// How a session ended for this program.
#[derive(Debug)]
pub(crate) enum End {
    /// The process ended, or did not start.
    Status(Status),
    /// The user typed the detach keys.
    Detached,
    /// The user insisted on leaving.
    Left,
}

/// Relays until the process ends or the user leaves. The terminal is as before when this returns.
pub(crate) async fn relay(session: Session, relay: Relay<'_>) -> Result<End, Failure> {
    relay_timed(session, relay, &OnceCell::new()).await
}

/// The same, noting when the first output came.
pub(crate) async fn relay_timed(
    session: Session,
    relay: Relay<'_>,
    first_output: &OnceCell<Instant>,
) -> Result<End, Failure> {
    let raw = (relay.tty && relay.stdin).then(RawTerminal::enter).transpose()?;
    let (sink, stream) = session.split();
    let end = tokio::select! {
        end = bring_output(stream, first_output) => end,
        end = take_input(sink, relay) => Ok(end),
    };
    drop(raw);
    end
}

async fn bring_output(mut stream: SessionStream, first_output: &OnceCell<Instant>) -> Result<End, Failure> {
    let mut stdout = tokio::io::stdout();
    let mut stderr = tokio::io::stderr();
    loop {
        let message = stream.next().await?;
        if let Some(DaemonMessage::Stdout(_) | DaemonMessage::Stderr(_)) = message {
            first_output.get_or_init(Instant::now);
        }
        match message {
            Some(DaemonMessage::Stdout(data)) => {
                stdout.write_all(&data).await.map_err(|e| Failure::write(&e))?;
                stdout.flush().await.map_err(|e| Failure::write(&e))?;
            }
            Some(DaemonMessage::Stderr(data)) => {
                stderr.write_all(&data).await.map_err(|e| Failure::write(&e))?;
                stderr.flush().await.map_err(|e| Failure::write(&e))?;
            }
            Some(DaemonMessage::Status(status)) => return Ok(End::Status(status)),
            None => {
                return Err(Failure::new(
                    ErrorKind::Internal,
                    "the daemon closed the session before the process ended",
                )
                .hint("the VM may still run: `offshoot ps`, then `offshoot attach`"));
            }
        }
    }
}

/// Ends only when the user leaves; a session that takes no more is left to [`bring_output`], which hears why.
async fn take_input(mut sink: SessionSink, relay: Relay<'_>) -> End {
    let Relay {
        stdin,
        tty,
        signals,
        main_of,
    } = relay;
    let mut keys = DetachKeys::default();
    let mut input = stdin.then(terminal::stdin);
    if tty
        && let Some(size) = terminal::window_size()
        && sink.send(ClientMessage::Resize(size)).await.is_err()
    {
        return future::pending().await;
    }
    loop {
        let message = tokio::select! {
            typed = receive(&mut input) => match typed {
                None => {
                    input = None;
                    ClientMessage::CloseStdin
                }
                Some(typed) if tty => {
                    let (passed, detached) = keys.feed(&typed);
                    if detached {
                        // What was typed before the keys still counts; nobody is left to tell when it does not arrive.
                        let _ = sink.send(ClientMessage::Stdin(passed)).await;
                        return End::Detached;
                    }
                    ClientMessage::Stdin(passed)
                }
                Some(typed) => ClientMessage::Stdin(typed),
            },
            event = signals.next() => match event {
                Event::Signal(_) if signals.impatient() => return End::Left,
                Event::Signal(number) => ClientMessage::Signal(number),
                Event::Resized => match terminal::window_size() {
                    Some(size) if tty => ClientMessage::Resize(size),
                    _ => continue,
                },
            },
        };
        let mut send = std::pin::pin!(sink.send(message));
        let sent = loop {
            tokio::select! {
                sent = &mut send => break sent,
                // The process does not read its input: a signal must not wait behind it.
                event = signals.next() => {
                    if signals.impatient() {
                        return End::Left;
                    }
                    if let (Event::Signal(number), Some((client, vm))) = (event, main_of) {
                        // A process that is gone needs no signal; its status is on the way.
                        let _ = client.kill_vm(vm, &KillQuery { signal: Some(number.to_string()) }).await;
                    }
                }
            }
        };
        if sent.is_err() {
            return future::pending().await;
        }
    }
}

async fn receive(input: &mut Option<tokio::sync::mpsc::Receiver<bytes::Bytes>>) -> Option<bytes::Bytes> {
    match input {
        Some(input) => input.recv().await,
        None => future::pending().await,
    }
}

/// Turns the end of a session into an exit status.
pub(crate) fn exit_code(end: End) -> Result<u8, Failure> {
    match end {
        End::Status(status) => crate::error::status_code(status),
        End::Detached => {
            // The prompt would otherwise stand in the guest's last line.
            let _ = std::io::stderr().write_all(b"\n");
            Ok(0)
        }
        End::Left => Err(Failure::new(
            ErrorKind::Cancelled,
            "left the session after three interrupts; the process runs on",
        )
        .hint("`offshoot kill` ends a VM at once")),
    }
}
