//! Hooks as timed stages of one operation.

use std::future::Future;
use std::time::{Duration, Instant};

use offshoot_model::{StageOutcome, StageTiming};

/// The stages of one operation so far.
#[derive(Debug)]
pub struct Stages {
    operation: &'static str,
    began: Instant,
    timings: Vec<StageTiming>,
}

impl Stages {
    /// An operation begins now.
    pub fn begin(operation: &'static str) -> Self {
        Self {
            operation,
            began: Instant::now(),
            timings: Vec::new(),
        }
    }

    /// The operation's name.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// Runs one stage, times and logs it.
    pub async fn stage<T, E>(
        &mut self,
        name: &str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let start = self.began.elapsed();
        let result = work.await;
        let duration = self.began.elapsed() - start;
        let outcome = if result.is_ok() {
            StageOutcome::Done
        } else {
            StageOutcome::Failed
        };
        tracing::debug!(
            operation = self.operation,
            stage = name,
            ?outcome,
            ?duration,
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
        self.timings
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
