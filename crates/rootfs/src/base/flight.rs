//! Single flight within a process: one piece of work for a base, however many wait for it.
//!
//! ```text
//! join ─► nobody does it ─────► a blocking thread does ──┬─► outcome to all who wait
//!      └► somebody does ───────► wait ───────────────────┘
//! the last who waits goes away ─► the thread is told to stop
//! ```
//!
//! Between processes a lock file does the same; see `lock`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use offshoot_model::BaseId;
use tokio::sync::watch;

/// The pieces of work of one sort that run, with outcomes of one type.
#[derive(Debug)]
pub(super) struct Flights<T> {
    running: Mutex<HashMap<BaseId, Weak<Flight<T>>>>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self {
            running: Mutex::default(),
        }
    }
}

/// One piece of work. Dropped by the last who waits.
#[derive(Debug)]
struct Flight<T> {
    outcome: watch::Receiver<Option<T>>,
    cancelled: Arc<AtomicBool>,
}

impl<T> Drop for Flight<T> {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// A place among those who wait.
#[derive(Debug)]
pub(super) struct Seat<T> {
    flight: Arc<Flight<T>>,
    joined: bool,
}

impl<T: Clone> Seat<T> {
    /// Whether the work was somebody else's.
    pub(super) fn joined(&self) -> bool {
        self.joined
    }

    /// Waits for the outcome; `None` if the thread died of a panic.
    pub(super) async fn outcome(self) -> Option<T> {
        let mut outcome = self.flight.outcome.clone();
        outcome
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|outcome| outcome.clone())
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// Joins the work for `id`, or starts the one that `work` makes, which is given the flag that stops it.
    ///
    /// Must be called within a Tokio runtime.
    pub(super) fn join<W>(&self, id: &BaseId, work: impl FnOnce(Arc<AtomicBool>) -> W) -> Seat<T>
    where
        W: FnOnce() -> T + Send + 'static,
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
