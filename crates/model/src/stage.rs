//! Operations as lists of timed steps.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{OperationId, VmId};

/// How a stage ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StageOutcome {
    /// It did what it was for.
    Done,
    /// It failed, and the stages before it were undone.
    Failed,
    /// It was undone because a later stage failed.
    Undone,
}

/// One timed step of one operation, in the order they ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StageTiming {
    /// The operation the stage belongs to: `create`, `start`, `stop`, `remove`.
    pub operation: String,
    /// `<capability>.<hook>`, for example `root.prepare` or `vmm.launch`.
    pub stage: String,
    /// The stage of the same operation that this one is a part of. Stages without one follow one another; parts may run
    /// side by side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<String>,
    /// Microseconds from the start of the operation to the start of the stage.
    pub start_us: u64,
    /// Microseconds that the stage took.
    pub duration_us: u64,
    /// How it ended.
    pub outcome: StageOutcome,
}

impl StageTiming {
    /// Microseconds from the start of the operation to the end of the stage.
    pub fn end_us(&self) -> u64 {
        self.start_us.saturating_add(self.duration_us)
    }
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationOutcome {
    /// It did what it was for. Where one way failed and another one was taken, the stages of the first say so.
    Done,
    /// A stage failed, or was undone.
    Failed,
}

impl OperationOutcome {
    /// The word that the API and the metrics have for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }

    /// Out of the stages: one that failed, or that was undone, failed the whole.
    pub fn of(stages: &[StageTiming]) -> Self {
        if stages.iter().all(|stage| stage.outcome == StageOutcome::Done) {
            Self::Done
        } else {
            Self::Failed
        }
    }
}

/// One operation that is over, and where its time went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationTiming {
    /// The id that its request, its events and its log lines share. A restart is one id with a stop and a start.
    #[schema(value_type = String)]
    pub operation: OperationId,
    /// What was done: `create`, `start`, `stop`, `pull`, `prepare`, `kernel-add`.
    pub kind: String,
    /// The VM, where it was done to one; it may be gone.
    #[schema(value_type = Option<String>)]
    pub vm_id: Option<VmId>,
    /// The VM's name at that time, the image's reference, or the kernel.
    pub subject: String,
    /// When it began, microseconds since the epoch.
    pub began_us: u64,
    /// Microseconds that it took.
    pub duration_us: u64,
    /// How it ended.
    pub outcome: OperationOutcome,
    /// Its stages, in the order they began, each part behind what it is a part of. Those that are no part of another
    /// take no longer together than the operation.
    pub stages: Vec<StageTiming>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_fails_with_any_of_its_stages() {
        let stages = |outcomes: &[StageOutcome]| -> Vec<StageTiming> {
            let timing = |outcome: &StageOutcome| StageTiming {
                operation: "start".into(),
                stage: "root.prepare".into(),
                within: None,
                start_us: 0,
                duration_us: 1,
                outcome: *outcome,
            };
            outcomes.iter().map(timing).collect()
        };
        use StageOutcome as O;
        for (outcomes, expected) in [
            (&[][..], OperationOutcome::Done),
            (&[O::Done, O::Done], OperationOutcome::Done),
            (&[O::Done, O::Failed], OperationOutcome::Failed),
            // What was undone is followed by the stages that undid it.
            (&[O::Undone, O::Done], OperationOutcome::Failed),
        ] {
            assert_eq!(OperationOutcome::of(&stages(outcomes)), expected, "{outcomes:?}");
        }
    }
}
