//! What belongs to no VM: what a crash left, and no row speaks of. The engine finds and removes it, by itself every minute.

use offshoot_model::{Finding, Fix, Severity};

use super::fix::Mended;
use crate::app::App;

const PART: &str = "leftovers";
/// How many are named before the rest is only counted.
const NAMED: usize = 3;

/// One line for everything that is left.
pub(super) async fn look(app: &App) -> Vec<String> {
    let left = app.engine.leftovers().await;
    left.iter()
        .map(|object| format!("{} {}", object.kind, object.name))
        .collect()
}

/// Removes it all, and mends what else is not as it should be.
pub(super) async fn sweep(app: &App) -> Mended {
    let mut mended = Mended::default();
    for line in app.engine.reconcile().await {
        mended.did(line);
    }
    mended
}

/// The finding out of the lines.
pub(super) fn judge(lines: &[String]) -> Finding {
    if lines.is_empty() {
        return Finding::ok(PART, "everything belongs to a VM").id("leftovers-none");
    }
    let mut shown = lines.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if lines.len() > NAMED {
        shown.push_str(&format!(" and {} more", lines.len() - NAMED));
    }
    Finding::new(
        PART,
        Severity::Warning,
        format!("these belong to no VM: {shown}"),
        "offshoot doctor --fix",
    )
    .id("leftovers")
    .cost("room on the disk and in memory that nobody uses")
    .fix(Fix::SweepLeftovers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_named_or_counted() {
        assert_eq!(judge(&[]).severity, Severity::Ok);
        let lines = |count: usize| (0..count).map(|n| format!("tap{n}")).collect::<Vec<_>>();
        let some = judge(&lines(2));
        assert_eq!(
            (some.severity, some.fix),
            (Severity::Warning, Some(Fix::SweepLeftovers))
        );
        assert_eq!(some.message, "these belong to no VM: tap0, tap1");
        assert!(judge(&lines(5)).message.ends_with("tap2 and 2 more"));
    }
}
