//! Single flight within a process: one preparation for an id, however many wait for it.
//!
//! ```text
//! join ─► nobody prepares it ─► a blocking thread does ──┬─► outcome to all who wait
//!      └► somebody does ───────► wait ───────────────────┘
//! the last who waits goes away ─► the thread is told to stop
//! ```
//!
//! Between processes a lock file does the same; see `prepare`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use offshoot_model::BaseId;
use tokio::sync::watch;

use super::{Base, PrepareError};

type Outcome = Result<Base, PrepareError>;

/// The preparations that run.
#[derive(Debug, Default)]
pub(super) struct Flights {
    running: Mutex<HashMap<BaseId, Weak<Flight>>>,
}

/// One preparation. Dropped by the last who waits.
#[derive(Debug)]
struct Flight {
    outcome: watch::Receiver<Option<Outcome>>,
    cancelled: Arc<AtomicBool>,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// A place among those who wait.
#[derive(Debug)]
pub(super) struct Seat {
    flight: Arc<Flight>,
    joined: bool,
}

impl Seat {
    /// Whether the preparation was somebody else's.
    pub(super) fn joined(&self) -> bool {
        self.joined
    }

    /// Waits for the outcome; `None` if the thread died of a panic.
    pub(super) async fn outcome(self) -> Option<Outcome> {
        let mut outcome = self.flight.outcome.clone();
        outcome
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|outcome| outcome.clone())
    }
}

impl Flights {
    /// Joins the preparation of `id`, or starts the one that `work` makes, which is given the flag that stops it.
    ///
    /// Must be called within a Tokio runtime.
    pub(super) fn join<W>(&self, id: &BaseId, work: impl FnOnce(Arc<AtomicBool>) -> W) -> Seat
    where
        W: FnOnce() -> Outcome + Send + 'static,
    {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = running.get(id).and_then(Weak::upgrade)
            // An old outcome is not handed to those who come after it: what failed may work now.
            && flight.outcome.borrow().is_none()
        {
            return Seat { flight, joined: true };
        }
        running.retain(|_, flight| flight.strong_count() > 0);
        let cancelled = Arc::new(AtomicBool::new(false));
        let (sender, outcome) = watch::channel(None);
        let work = work(cancelled.clone());
        tokio::task::spawn_blocking(move || {
            // Nobody may be left to hear it.
            let _ = sender.send(Some(work()));
        });
        let flight = Arc::new(Flight { outcome, cancelled });
        running.insert(id.clone(), Arc::downgrade(&flight));
        Seat {
            flight,
            joined: false,
        }
    }
}
