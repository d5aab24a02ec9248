//! Timed steps of an operation.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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
    /// Microseconds from the start of the operation to the start of the stage.
    pub start_us: u64,
    /// Microseconds that the stage took.
    pub duration_us: u64,
    /// How it ended.
    pub outcome: StageOutcome,
}
