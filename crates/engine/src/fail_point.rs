//! Dying at a chosen point, for tests of what a crash leaves.
//!
//! Every stage of every operation passes two points, before and after its work. The environment of the daemon may name
//! one of them, and the daemon then ends itself by SIGKILL there, as a crash or a power cut would:
//!
//! ```text
//! OFFSHOOT_FAIL_POINT=start/vmm.prepare/after
//!                     operation/stage/when
//! ```
//!
//! A stage needs nothing for it: tests take the names from the log of a life that went well.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// The variable that names a point.
pub const VARIABLE: &str = "OFFSHOOT_FAIL_POINT";

/// On which side of a stage's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Before,
    After,
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Before => "before",
            Self::After => "after",
        })
    }
}

/// One point.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FailPoint {
    operation: String,
    stage: String,
    when: When,
}

/// A text that names no point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not OPERATION/STAGE/before or OPERATION/STAGE/after")]
pub struct FailPointError {
    /// The text.
    pub text: String,
}

impl FromStr for FailPoint {
    type Err = FailPointError;

    fn from_str(text: &str) -> Result<Self, FailPointError> {
        let refuse = || FailPointError {
            text: text.to_owned(),
        };
        let (operation, rest) = text.split_once('/').ok_or_else(refuse)?;
        let (stage, when) = rest.rsplit_once('/').ok_or_else(refuse)?;
        let when = match when {
            "before" => When::Before,
            "after" => When::After,
            _ => return Err(refuse()),
        };
        if operation.is_empty() || stage.is_empty() {
            return Err(refuse());
        }
        Ok(Self {
            operation: operation.to_owned(),
            stage: stage.to_owned(),
            when,
        })
    }
}

static CHOSEN: OnceLock<FailPoint> = OnceLock::new();

/// Reads the environment, once, before any operation. Whether a point was named.
pub fn arm() -> Result<bool, FailPointError> {
    let Ok(text) = std::env::var(VARIABLE) else {
        return Ok(false);
    };
    let point = text.parse()?;
    let _ = CHOSEN.set(point);
    Ok(true)
}

/// Ends the process if this is the chosen point.
pub(crate) fn pass(operation: &str, stage: &str, when: When) {
    let Some(point) = CHOSEN.get() else { return };
    if point.operation == operation && point.stage == stage && point.when == when {
        tracing::warn!(operation, stage, %when, "reached the chosen fail point");
        offshoot_sys::process::kill_self();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_named_by_operation_stage_and_side() {
        let point: FailPoint = "start/vmm.prepare/after".parse().unwrap();
        assert_eq!(
            point,
            FailPoint {
                operation: "start".into(),
                stage: "vmm.prepare".into(),
                when: When::After
            }
        );
        for bad in [
            "",
            "start",
            "start/vmm.prepare",
            "start/x/during",
            "/x/after",
            "start//after",
        ] {
            assert!(bad.parse::<FailPoint>().is_err(), "{bad}");
        }
    }
}
