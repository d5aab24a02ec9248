//! Operations: the id that ties a request to its log lines, events and errors; and hooks as timed stages.

use std::future::Future;
use std::time::{Duration, Instant};

use offshoot_model::{OperationId, StageOutcome, StageTiming};

use crate::fail_point::{self, When};
use crate::measure;

tokio::task_local! {
    static CURRENT: OperationId;
}

/// An id for an operation that begins now.
pub fn new_id() -> OperationId {
    // Without random bytes there is nothing to tell operations apart by; they still go on.
    OperationId::from_bytes(&offshoot_sys::random::bytes::<4>().unwrap_or_default())
}

/// The operation that the running future belongs to.
pub fn current() -> Option<OperationId> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Runs `work` as part of operation `id`. A task that it spawns does not belong to it unless told so.
pub async fn within<F: Future>(id: OperationId, work: F) -> F::Output {
    CURRENT.scope(id, work).await
}

/// The stages of one operation so far.
#[derive(Debug)]
pub struct Stages {
    operation: &'static str,
    id: OperationId,
    began: Instant,
    timings: Vec<StageTiming>,
}

impl Stages {
    /// An operation begins now, as a part of the current one where there is one.
    pub fn begin(operation: &'static str) -> Self {
        Self {
            operation,
            id: current().unwrap_or_else(new_id),
            began: Instant::now(),
            timings: Vec::new(),
        }
    }

    /// The operation's name.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// Runs one stage, times and logs it. On both sides of it a test may end the daemon ([`fail_point`]).
    pub async fn stage<T, E>(
        &mut self,
        name: &str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let start = self.began.elapsed();
        fail_point::pass(self.operation, name, When::Before);
        let result = work.await;
        fail_point::pass(self.operation, name, When::After);
        let duration = self.began.elapsed() - start;
        measure::stage(self.operation, name, duration);
        let outcome = if result.is_ok() {
            StageOutcome::Done
        } else {
            StageOutcome::Failed
        };
        tracing::debug!(
            op = %self.id,
            operation = self.operation,
            stage = name,
            ?outcome,
            us = micros(duration),
            "stage"
        );
        self.timings.push(StageTiming {
            operation: self.operation.to_owned(),
            stage: name.to_owned(),
            start_us: micros(start),
            duration_us: micros(duration),
            outcome,
        });
        result
    }

    /// Adds steps that were timed inside the guest, one after another from the start of `stage` on.
    pub fn note_within(&mut self, stage: &str, steps: Vec<(String, Duration)>) {
        let mut start_us = self
            .timings
            .iter()
            .find(|t| t.stage == stage)
            .map_or(0, |t| t.start_us);
        for (name, duration) in steps {
            self.note(&name, start_us, duration);
            start_us = start_us.saturating_add(micros(duration));
        }
    }

    /// Adds a step that was timed elsewhere and began `start_us` after the operation.
    pub fn note(&mut self, name: &str, start_us: u64, duration: Duration) {
        self.timings.push(StageTiming {
            operation: self.operation.to_owned(),
            stage: name.to_owned(),
            start_us,
            duration_us: micros(duration),
            outcome: StageOutcome::Done,
        });
    }

    /// Marks every stage that succeeded as undone: a later one failed.
    pub fn undone(&mut self) {
        for timing in &mut self.timings {
            if timing.outcome == StageOutcome::Done {
                timing.outcome = StageOutcome::Undone;
            }
        }
    }

    /// What was timed, in the order it ran.
    pub fn into_timings(self) -> Vec<StageTiming> {
        self.timings.clone()
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        measure::operation(self.operation, &self.timings, self.began.elapsed());
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn steps_of_the_guest_lie_within_their_stage() {
        let mut stages = Stages::begin("start");
        stages
            .stage("a", async {
                tokio::task::yield_now().await;
                Ok::<_, ()>(())
            })
            .await
            .unwrap();
        stages.stage("b", async { Ok::<_, ()>(()) }).await.unwrap();
        let step = |name: &str| (name.to_owned(), Duration::from_micros(7));
        stages.note_within("b", vec![step("x"), step("y")]);
        let timings = stages.into_timings();
        assert_eq!(timings[2].start_us, timings[1].start_us);
        assert_eq!(timings[3].start_us, timings[2].start_us + 7);
    }

    #[tokio::test]
    async fn a_failure_marks_what_was_done_before_it() {
        let mut stages = Stages::begin("start");
        stages.stage("a", async { Ok::<_, ()>(1) }).await.unwrap();
        stages.stage("b", async { Err::<(), _>(()) }).await.unwrap_err();
        stages.undone();
        let timings = stages.into_timings();
        let seen: Vec<_> = timings.iter().map(|t| (t.stage.as_str(), t.outcome)).collect();
        assert_eq!(seen, [("a", StageOutcome::Undone), ("b", StageOutcome::Failed)]);
        assert!(timings[1].start_us >= timings[0].start_us + timings[0].duration_us);
    }
}
