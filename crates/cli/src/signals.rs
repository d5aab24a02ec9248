//! The signals that a session passes on to its process.

use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::Failure;

/// So many interrupts within [`IMPATIENCE`] leave a session whose process does not end.
const LEAVE_AFTER: usize = 3;
/// Slower interrupts are all meant for the process.
const IMPATIENCE: Duration = Duration::from_secs(2);

/// A signal that came, by its number on this machine, which is the guest's as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// One to pass on.
    Signal(i32),
    /// The terminal has another size.
    Resized,
}

/// Catches signals from when it is made: from then on none of them ends this program.
#[derive(Debug)]
pub(crate) struct Signals {
    caught: Vec<(SignalKind, Signal)>,
    interrupts: Vec<Instant>,
}

impl Signals {
    pub(crate) fn catch() -> Result<Self, Failure> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::window_change(),
        ];
        let caught = kinds
            .into_iter()
            .map(|kind| signal(kind).map(|signal| (kind, signal)))
            .collect::<Result<_, _>>();
        let caught = caught.map_err(|e| Failure::io("cannot catch signals", &e))?;
        Ok(Self {
            caught,
            interrupts: Vec::new(),
        })
    }

    /// The next signal. Safe to drop.
    pub(crate) async fn next(&mut self) -> Event {
        let kind = poll_fn(|cx| {
            for (kind, signal) in &mut self.caught {
                if signal.poll_recv(cx).is_ready() {
                    return Poll::Ready(*kind);
                }
            }
            Poll::Pending
        })
        .await;
        if kind == SignalKind::window_change() {
            return Event::Resized;
        }
        if kind == SignalKind::interrupt() || kind == SignalKind::terminate() {
            self.interrupts.push(Instant::now());
        }
        Event::Signal(kind.as_raw_value())
    }

    /// Waits for a signal that means "stop what you do": interrupt, terminate, hang-up or quit.
    pub(crate) async fn cancelled(&mut self) {
        let ending = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
        ];
        loop {
            if let Event::Signal(number) = self.next().await
                && ending.iter().any(|kind| kind.as_raw_value() == number)
            {
                return;
            }
        }
    }

    /// Whether the user wants out, whatever the process does.
    pub(crate) fn impatient(&self) -> bool {
        let last = self.interrupts.iter().rev().nth(LEAVE_AFTER - 1);
        last.is_some_and(|then| then.elapsed() < IMPATIENCE)
    }
}
