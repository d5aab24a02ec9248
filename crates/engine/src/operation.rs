//! Operations: the id that ties a request to its log lines, events and errors; and hooks as timed stages.

use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use offshoot_model::{
    OperationId, OperationOutcome, OperationTiming, Progress, ProgressEvent, StageOutcome, StageTiming,
    TaskId, VmId,
};

use crate::fail_point::{self, When};
use crate::measure;
use crate::operation_log::OperationLog;

tokio::task_local! {
    static CURRENT: OperationId;
}

/// Parts of one stage that are kept: an image of more layers tells of its first ones.
const MAX_TASKS: usize = 64;

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

/// What an operation is done to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// The VM, where it is one.
    pub vm: Option<VmId>,
    /// Its name, or that of an image or a kernel.
    pub name: String,
}

impl Subject {
    /// Something that is no VM.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            vm: None,
            name: name.into(),
        }
    }
}

/// The stages of one operation so far. It is over when this is dropped: then it is counted, logged, and kept in the
/// [`OperationLog`] that it was begun with.
#[derive(Debug)]
pub struct Stages {
    operation: &'static str,
    id: OperationId,
    subject: Subject,
    began: Instant,
    /// The same moment for others, microseconds since the epoch.
    began_us: u64,
    timings: Vec<StageTiming>,
    /// So many of them do not count for how the operation ends.
    forgiven: usize,
    log: Option<OperationLog>,
}

impl Stages {
    /// An operation begins now, as a part of the current one where there is one; it is kept nowhere.
    pub fn begin(operation: &'static str) -> Self {
        Self::begin_in(None, operation, Subject::default())
    }

    /// The same, with where it is kept.
    pub(crate) fn begin_in(log: Option<OperationLog>, operation: &'static str, subject: Subject) -> Self {
        Self {
            operation,
            id: current().unwrap_or_else(new_id),
            subject,
            began: Instant::now(),
            began_us: now_us(),
            timings: Vec::new(),
            forgiven: 0,
            log,
        }
    }

    /// The operation's name.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// Says what it is done to, where that was not known when it began.
    pub fn set_subject(&mut self, subject: Subject) {
        self.subject = subject;
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
        self.add(name, None, micros(start), duration, outcome);
        result
    }

    /// The same, for work that cannot fail.
    pub async fn step<T>(&mut self, name: &str, work: impl Future<Output = T>) -> T {
        let Ok(value) = self.stage(name, async { Ok::<_, Infallible>(work.await) }).await;
        value
    }

    /// Runs one stage whose parts are told by `progress`: each task that it reports is a part. The work gets what to
    /// report to.
    pub async fn stage_with_tasks<T, E, F>(
        &mut self,
        name: &str,
        progress: &Progress,
        work: impl FnOnce(Progress) -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let tasks = Arc::new(Mutex::new(Tasks::default()));
        let heard = Arc::clone(&tasks);
        let began = self.began;
        let progress = progress.heard_by(move |event| {
            let mut tasks = heard.lock().unwrap_or_else(PoisonError::into_inner);
            tasks.hear(event, began.elapsed());
        });
        let result = self.stage(name, work(progress)).await;
        let done = std::mem::take(&mut tasks.lock().unwrap_or_else(PoisonError::into_inner).done);
        for (label, start, duration) in done {
            self.add(&label, Some(name), micros(start), duration, StageOutcome::Done);
        }
        result
    }

    /// Adds steps that were timed inside the guest, one after another from the start of `stage` on.
    pub fn note_within(&mut self, stage: &str, steps: Vec<(String, Duration)>) {
        let mut start_us = self
            .timings
            .iter()
            .rfind(|t| t.stage == stage && t.within.is_none())
            .map_or(0, |t| t.start_us);
        for (name, duration) in steps {
            self.add(&name, Some(stage), start_us, duration, StageOutcome::Done);
            start_us = start_us.saturating_add(micros(duration));
        }
    }

    fn add(
        &mut self,
        stage: &str,
        within: Option<&str>,
        start_us: u64,
        duration: Duration,
        outcome: StageOutcome,
    ) {
        tracing::debug!(
            op = %self.id,
            operation = self.operation,
            stage,
            within,
            ?outcome,
            start_us,
            us = micros(duration),
            "stage"
        );
        let timing = StageTiming {
            operation: self.operation.to_owned(),
            stage: stage.to_owned(),
            within: within.map(str::to_owned),
            start_us,
            duration_us: micros(duration),
            outcome,
        };
        let at = within.and_then(|parent| place_of_part(&self.timings, parent));
        self.timings.insert(at.unwrap_or(self.timings.len()), timing);
    }

    /// Adds a stage that was timed elsewhere and ends now. The operation began with it.
    pub(crate) fn note_ended(&mut self, stage: &str, duration: Duration) {
        self.began = self.began.checked_sub(duration).unwrap_or(self.began);
        self.began_us = self.began_us.saturating_sub(micros(duration));
        self.add(stage, None, 0, duration, StageOutcome::Done);
    }

    /// It has nothing to tell: it is not kept.
    pub(crate) fn forget(mut self) {
        self.log = None;
    }

    /// What failed up to now is made good by what follows: it does not make a failure of the whole.
    pub fn recovered(&mut self) {
        self.forgiven = self.timings.len();
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
    pub fn timings(&self) -> &[StageTiming] {
        &self.timings
    }
}

/// Where the next part of `parent` goes: behind it and the parts that it has.
fn place_of_part(timings: &[StageTiming], parent: &str) -> Option<usize> {
    let belongs = |timing: &StageTiming| timing.stage == parent || timing.within.as_deref() == Some(parent);
    timings.iter().rposition(belongs).map(|last| last + 1)
}

impl Drop for Stages {
    fn drop(&mut self) {
        let duration = self.began.elapsed();
        let outcome = OperationOutcome::of(self.timings.get(self.forgiven..).unwrap_or_default());
        measure::operation(self.operation, outcome, duration);
        tracing::debug!(
            op = %self.id,
            operation = self.operation,
            subject = self.subject.name,
            outcome = outcome.as_str(),
            stages = self.timings.len(),
            us = micros(duration),
            "operation ended"
        );
        let Some(log) = self.log.take() else { return };
        let subject = std::mem::take(&mut self.subject);
        log.keep(OperationTiming {
            operation: self.id.clone(),
            kind: self.operation.to_owned(),
            vm_id: subject.vm,
            subject: subject.name,
            began_us: self.began_us,
            duration_us: micros(duration),
            outcome,
            stages: std::mem::take(&mut self.timings),
        });
    }
}

/// Tasks that report their progress, as parts of a stage: when they began, and how long those took that ended well.
#[derive(Debug, Default)]
struct Tasks {
    begun: Vec<(TaskId, String, Duration)>,
    done: Vec<(String, Duration, Duration)>,
}

impl Tasks {
    fn hear(&mut self, event: &ProgressEvent, now: Duration) {
        match event {
            ProgressEvent::Started { task, label, .. } => self.begun.push((*task, label.clone(), now)),
            ProgressEvent::Finished { task } => {
                let Some(at) = self.begun.iter().position(|(begun, ..)| begun == task) else {
                    return;
                };
                let (_, label, start) = self.begun.swap_remove(at);
                if self.done.len() < MAX_TASKS {
                    self.done.push((label, start, now.saturating_sub(start)));
                }
            }
            ProgressEvent::Moved { .. } | ProgressEvent::Message { .. } => {}
        }
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Microseconds since the epoch.
fn now_us() -> u64 {
    micros(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::ProgressUnit;

    async fn done(stages: &mut Stages, name: &str) {
        let work = async {
            tokio::task::yield_now().await;
            Ok::<_, ()>(())
        };
        stages.stage(name, work).await.unwrap();
    }

    #[tokio::test]
    async fn steps_of_the_guest_lie_within_their_stage() {
        let mut stages = Stages::begin("start");
        done(&mut stages, "a").await;
        done(&mut stages, "b").await;
        done(&mut stages, "c").await;
        let step = |name: &str| (name.to_owned(), Duration::from_micros(7));
        stages.note_within("b", vec![step("x"), step("y")]);
        let timings = stages.timings();
        let seen: Vec<_> = timings
            .iter()
            .map(|t| (t.stage.as_str(), t.within.as_deref()))
            .collect();
        let b = Some("b");
        assert_eq!(seen, [("a", None), ("b", None), ("x", b), ("y", b), ("c", None)]);
        assert_eq!(timings[2].start_us, timings[1].start_us);
        assert_eq!(timings[3].start_us, timings[2].start_us + 7);
    }

    #[tokio::test]
    async fn a_failure_marks_what_was_done_before_it() {
        let mut stages = Stages::begin("start");
        stages.stage("a", async { Ok::<_, ()>(1) }).await.unwrap();
        stages.stage("b", async { Err::<(), _>(()) }).await.unwrap_err();
        stages.undone();
        let timings = stages.timings();
        let seen: Vec<_> = timings.iter().map(|t| (t.stage.as_str(), t.outcome)).collect();
        assert_eq!(seen, [("a", StageOutcome::Undone), ("b", StageOutcome::Failed)]);
        assert!(timings[1].start_us >= timings[0].end_us());
    }

    #[tokio::test]
    async fn what_was_made_good_is_no_failure_of_the_whole() {
        let mut stages = Stages::begin("start");
        let failed = stages.stage("agent.after_boot", async { Err::<(), _>(()) });
        failed.await.unwrap_err();
        stages.undone();
        stages.recovered();
        done(&mut stages, "agent.after_boot").await;
        stages.note_within(
            "agent.after_boot",
            vec![("guest.boot".to_owned(), Duration::ZERO)],
        );
        let timings = stages.timings();
        assert_eq!(timings[2].start_us, timings[1].start_us, "of the second one");
        assert_eq!(
            OperationOutcome::of(&timings[stages.forgiven..]),
            OperationOutcome::Done
        );
    }

    #[tokio::test]
    async fn tasks_are_parts_of_the_stage_that_reports_them() {
        let mut stages = Stages::begin("pull");
        let listener = Arc::new(Mutex::new(0));
        let counted = Arc::clone(&listener);
        let progress = Progress::new(move |_| *counted.lock().unwrap() += 1);
        let work = |progress: Progress| async move {
            let (one, two) = (
                progress.start("layer 1", ProgressUnit::Bytes, None),
                progress.start("layer 2", ProgressUnit::Bytes, None),
            );
            progress.moved(one, 5);
            progress.finish(two);
            progress.finish(one);
            progress.start("layer 3, which fails", ProgressUnit::Bytes, None);
            Ok::<_, ()>(())
        };
        stages.stage_with_tasks("fetch", &progress, work).await.unwrap();
        let timings = stages.timings();
        let names: Vec<_> = timings.iter().map(|t| t.stage.as_str()).collect();
        assert_eq!(names, ["fetch", "layer 2", "layer 1"]);
        assert!(timings[1..].iter().all(|t| t.within.as_deref() == Some("fetch")));
        assert!(timings[1..].iter().all(|t| t.end_us() <= timings[0].end_us()));
        assert_eq!(*listener.lock().unwrap(), 6, "whoever listened before still does");
    }
}
