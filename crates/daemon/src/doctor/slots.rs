//! Warm slots: whether there are as many as are wanted, and why not.

use offshoot_model::{Finding, Severity};

use crate::app::App;

const PART: &str = "slots";

/// Nothing where nobody wants any.
pub(super) fn check(app: &App) -> Option<Finding> {
    let wanted = app.warm.all().values().sum();
    judge(wanted, app.engine.slots().list().len(), app.warm.problem())
}

fn judge(wanted: usize, ready: usize, problem: Option<String>) -> Option<Finding> {
    if wanted == 0 {
        return None;
    }
    let message = format!("{ready} of {wanted} warm slots are ready");
    Some(match problem {
        // One that was just taken is made again.
        None => Finding::ok(PART, message).id("slots"),
        Some(problem) => Finding::new(
            PART,
            Severity::Warning,
            format!("{message}: {problem}"),
            "look at the daemon's log; `offshoot image warm IMAGE 0` asks for none",
        )
        .id("slots-lacking")
        .cost("VMs that would have taken one are restored from the template or boot their kernel"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_why_there_are_fewer_than_wanted() {
        assert_eq!(judge(0, 0, None), None);
        assert_eq!(judge(2, 1, None).unwrap().severity, Severity::Ok);
        let found = judge(2, 1, Some("no user id is free".into())).unwrap();
        assert_eq!(found.severity, Severity::Warning);
        assert!(found.message.contains("1 of 2") && found.message.contains("no user id"));
        assert!(!found.cost.is_empty() && !found.hint.is_empty());
    }
}
