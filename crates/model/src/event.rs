//! What happened to which VM, when and why.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{OperationId, VmId, VmName};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventAction {
    /// Its row was written; nothing runs yet.
    Create,
    /// Its agent answers and its main process was started.
    Start,
    /// A start failed and was undone; the reason says why.
    StartFailed,
    /// Somebody asked it to stop; `exit` follows.
    Stop,
    /// A run ended; the reason says how.
    Exit,
    /// Its vCPUs stand still.
    Pause,
    /// They run again.
    Resume,
    /// What it wrote was dropped, but for its work.
    Reset,
    /// It has another name; the reason holds the old one.
    Rename,
    /// It is gone.
    Remove,
    /// A part of it does not work any more.
    Degrade,
    /// A daemon that was started again found it running.
    Adopt,
    /// The daemon mended a difference between what should be and what is.
    Repair,
}

impl EventAction {
    /// Every action, for filters and tests.
    pub const ALL: [Self; 13] = [
        Self::Create,
        Self::Start,
        Self::StartFailed,
        Self::Stop,
        Self::Exit,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::Rename,
        Self::Remove,
        Self::Degrade,
        Self::Adopt,
        Self::Repair,
    ];

    /// The word that users see and the database stores.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::StartFailed => "start-failed",
            Self::Stop => "stop",
            Self::Exit => "exit",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reset => "reset",
            Self::Rename => "rename",
            Self::Remove => "remove",
            Self::Degrade => "degrade",
            Self::Adopt => "adopt",
            Self::Repair => "repair",
        }
    }
}

impl fmt::Display for EventAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its place in the history: later events have higher numbers, and none is used twice.
    pub seq: u64,
    /// When, milliseconds since the epoch.
    pub time_ms: u64,
    /// What happened.
    pub action: EventAction,
    /// The VM; absent for what concerns none, or none that is left.
    #[schema(value_type = Option<String>)]
    pub vm_id: Option<VmId>,
    /// The VM's name at that time.
    #[schema(value_type = Option<String>)]
    pub vm_name: Option<VmName>,
    /// The operation it belongs to, as in the log; absent for what happened by itself.
    #[schema(value_type = Option<String>)]
    pub operation: Option<OperationId>,
    /// Why, or with what result, in one line; empty when there is nothing to say.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_is_the_same_everywhere() {
        for action in EventAction::ALL {
            assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
        }
    }
}
