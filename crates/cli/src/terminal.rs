//! The client's own terminal: raw while a session has it, its size, and input that does not block anything else.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;

use bytes::Bytes;
use offshoot_api::channel::WindowSize;
use tokio::sync::mpsc;

use crate::error::Failure;

/// How much of standard input is read at once: what one session message carries.
const STDIN_CHUNK: usize = 64 << 10;
/// How many pieces of input wait for the session; more only costs memory.
const STDIN_QUEUE: usize = 4;

/// The terminal in raw mode until this is dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    pub(crate) fn enter() -> Result<Self, Failure> {
        crossterm::terminal::enable_raw_mode()
            .map_err(|e| Failure::io("cannot make the terminal raw", &e))?;
        Ok(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone, and then there is nothing to restore.
        let _ = crossterm::terminal::disable_raw_mode();
    }
}

/// The size of the terminal; `None` when there is none.
pub(crate) fn window_size() -> Option<WindowSize> {
    if !io::stdin().is_terminal() && !io::stdout().is_terminal() {
        return None;
    }
    let (width, height) = crossterm::terminal::size().ok()?;
    (width > 0 && height > 0).then_some(WindowSize { width, height })
}

/// Refuses `-it` where standard input is no terminal, as Docker does.
pub(crate) fn check_tty(stdin: bool, tty: bool) -> Result<(), Failure> {
    if stdin && tty && !io::stdin().is_terminal() {
        return Err(Failure::invalid(
            "cannot give a terminal to the guest: standard input is not a terminal",
        )
        .hint("leave out `-t` to pipe input into a command"));
    }
    Ok(())
}

/// Standard input in pieces, read by a thread of its own; the end of the channel is the end of input.
pub(crate) fn stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(STDIN_QUEUE);
    std::thread::spawn(move || {
        // A file of its own: the buffer of `std::io::Stdin` would cut pieces to 8 KiB.
        let Ok(fd) = io::stdin().as_fd().try_clone_to_owned() else {
            return;
        };
        let mut input = File::from(fd);
        let mut buffer = vec![0; STDIN_CHUNK];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => {
                    if sender
                        .blocking_send(Bytes::copy_from_slice(&buffer[..n]))
                        .is_err()
                    {
                        return;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
