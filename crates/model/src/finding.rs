//! What a check of the host found.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing to mend.
    Ok,
    /// VMs run, but slower or with less, or some VMs do not run.
    Warning,
    /// No VM can run, or the daemon's data is in danger.
    Failure,
}

/// What `doctor --fix` does about a finding. Each is safe: it deletes nothing that anybody needs and changes nothing
/// outside of the daemon's own directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fix {
    /// Takes rights away that nobody should have on the daemon's files.
    TightenModes,
    /// Puts this version's agent into the default kernel bundle.
    RefreshKernel,
    /// Makes damaged bases again from their images.
    PrepareBases,
    /// Removes what belongs to no VM.
    SweepLeftovers,
    /// Writes SQLite's log into the database and cuts it off.
    CheckpointDatabase,
    /// Removes templates that no VM of this host can be restored from.
    RemoveTemplates,
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::TightenModes => "tighten-modes",
            Self::RefreshKernel => "refresh-kernel",
            Self::PrepareBases => "prepare-bases",
            Self::SweepLeftovers => "sweep-leftovers",
            Self::CheckpointDatabase => "checkpoint-database",
            Self::RemoveTemplates => "remove-templates",
        })
    }
}

/// One answer of one check: what was found, what it costs the user, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// The capability that asked, or the part of the daemon.
    pub capability: String,
    /// What was found, as a name that stays the same: `kvm-emulated`. Several findings may have the same, such as one for
    /// each damaged base.
    #[serde(default)]
    pub id: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was found, in one line.
    pub message: String,
    /// What the user goes without because of it. Empty when it costs nothing.
    #[serde(default)]
    pub cost: String,
    /// What mends it: a command or a path. Empty when there is nothing to mend.
    pub hint: String,
    /// What `doctor --fix` does about it, where that is safe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<Fix>,
}

impl Finding {
    /// A finding of `capability`, whose name is the id until [`id`](Self::id) gives a better one.
    pub fn new(
        capability: impl Into<String>,
        severity: Severity,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        let capability = capability.into();
        Self {
            id: capability.clone(),
            capability,
            severity,
            message: message.into(),
            cost: String::new(),
            hint: hint.into(),
            fix: None,
        }
    }

    /// All is well.
    pub fn ok(capability: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(capability, Severity::Ok, message, "")
    }

    /// The same with this id, in kebab-case.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// The same with what it costs the user.
    #[must_use]
    pub fn cost(mut self, cost: impl Into<String>) -> Self {
        self.cost = cost.into();
        self
    }

    /// The same, to be mended by `doctor --fix`.
    #[must_use]
    pub fn fix(mut self, fix: Fix) -> Self {
        self.fix = Some(fix);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_says_everything_or_leaves_it_out() {
        let plain = Finding::ok("vmm", "qemu 7.2");
        assert_eq!(
            (plain.id.as_str(), plain.cost.as_str(), plain.fix),
            ("vmm", "", None)
        );
        let full = Finding::new("kernel", Severity::Warning, "old agent", "offshoot doctor --fix")
            .id("kernel-agent-old")
            .cost("guests lack what is new")
            .fix(Fix::RefreshKernel);
        assert!(full.severity > plain.severity);
        assert_eq!(full.fix, Some(Fix::RefreshKernel));
        assert_eq!(
            full.fix.map(|fix| fix.to_string()).as_deref(),
            Some("refresh-kernel")
        );
    }
}
