//! What a check of the host found.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing to mend.
    Ok,
    /// VMs run, but slower or with less.
    Warning,
    /// VMs that need this cannot run.
    Failure,
}

/// One answer of one check: what was found, what it costs the user, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// The capability that asked.
    pub capability: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was found, in one line.
    pub message: String,
    /// What mends it: a command or a path. Empty when there is nothing to mend.
    pub hint: String,
}
