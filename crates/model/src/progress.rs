//! How long work tells what it is doing, without knowing who listens.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Names one task among those that report to the same listener.
pub type TaskId = u64;

/// What a task's numbers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ProgressUnit {
    /// Bytes.
    Bytes,
    /// Files, packages or other things.
    Items,
}

/// One step of progress. A task is started once, moves any number of times, and is finished once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum ProgressEvent {
    /// A task began.
    Started {
        /// The task.
        task: TaskId,
        /// What to show: `layer 3f2a91c07b11`, `writing root.erofs`.
        label: String,
        /// What the numbers count.
        unit: ProgressUnit,
        /// How much there is to do, where known.
        total: Option<u64>,
    },
    /// A task stands at `done` now.
    Moved {
        /// The task.
        task: TaskId,
        /// How much is done in all.
        done: u64,
    },
    /// A task ended well.
    Finished {
        /// The task.
        task: TaskId,
    },
    /// Something worth a line of its own: `waiting for another preparation of debian:bookworm`.
    Message {
        /// The line.
        text: String,
    },
}

/// The reporting end: cheap to clone, never blocks, never fails.
#[derive(Clone)]
pub struct Progress {
    sink: Arc<dyn Fn(ProgressEvent) + Send + Sync>,
    next: Arc<AtomicU64>,
}

impl Progress {
    /// Reports to `sink`, which must return at once.
    pub fn new(sink: impl Fn(ProgressEvent) + Send + Sync + 'static) -> Self {
        Self {
            sink: Arc::new(sink),
            next: Arc::default(),
        }
    }

    /// Reports to nobody.
    pub fn silent() -> Self {
        Self::new(|_| ())
    }

    /// The same, heard by `listener` as well, which must return at once.
    pub fn heard_by(&self, listener: impl Fn(&ProgressEvent) + Send + Sync + 'static) -> Self {
        let sink = Arc::clone(&self.sink);
        Self {
            sink: Arc::new(move |event| {
                listener(&event);
                sink(event);
            }),
            next: Arc::clone(&self.next),
        }
    }

    /// Begins a task and gives its id.
    pub fn start(&self, label: impl Into<String>, unit: ProgressUnit, total: Option<u64>) -> TaskId {
        let task = self.next.fetch_add(1, Ordering::Relaxed);
        (self.sink)(ProgressEvent::Started {
            task,
            label: label.into(),
            unit,
            total,
        });
        task
    }

    /// Says how far a task is. Callers report every MiB or so, not every buffer.
    pub fn moved(&self, task: TaskId, done: u64) {
        (self.sink)(ProgressEvent::Moved { task, done });
    }

    /// Ends a task.
    pub fn finish(&self, task: TaskId) {
        (self.sink)(ProgressEvent::Finished { task });
    }

    /// Says something in a line of its own.
    pub fn message(&self, text: impl Into<String>) {
        (self.sink)(ProgressEvent::Message { text: text.into() });
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}
