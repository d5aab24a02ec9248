//! What happens, as numbers: operations, stages, events and ends of runs.
//!
//! The engine says what happened through the `metrics` facade and keeps nothing; the daemon installs what counts. Labels
//! are words of this program (operations, capabilities and their hooks, actions, reasons), never the name or id of a VM:
//! there are as many series as there are words.

use std::time::Duration;

use metrics::{counter, histogram};
use offshoot_model::{EventAction, ExitReason, OperationOutcome};

/// Counter: operations by kind and outcome.
pub const OPERATIONS: &str = "offshoot_operations_total";
/// Histogram: how long whole operations take, by kind.
pub const OPERATION_SECONDS: &str = "offshoot_operation_duration_seconds";
/// Histogram: how long stages take, by operation and stage.
pub const STAGE_SECONDS: &str = "offshoot_stage_duration_seconds";
/// Counter: events by action.
pub const EVENTS: &str = "offshoot_events_total";
/// Counter: ends of runs by reason.
pub const EXITS: &str = "offshoot_exits_total";
/// Counter: TAPs that starts asked a pool for, by outcome.
pub const TAP_CLAIMS: &str = "offshoot_tap_pool_claims_total";
/// Counter: VMs that were created while warm slots were ready, by outcome.
pub const SLOT_CLAIMS: &str = "offshoot_warm_slot_claims_total";

/// A stage ended.
pub(crate) fn stage(operation: &'static str, stage: &str, duration: Duration) {
    histogram!(STAGE_SECONDS, "operation" => operation, "stage" => stage.to_owned()).record(duration);
}

/// An operation ended so.
pub(crate) fn operation(kind: &'static str, outcome: OperationOutcome, duration: Duration) {
    counter!(OPERATIONS, "operation" => kind, "outcome" => outcome.as_str()).increment(1);
    histogram!(OPERATION_SECONDS, "operation" => kind).record(duration);
}

/// Something was written into the history.
pub(crate) fn event(action: EventAction) {
    counter!(EVENTS, "action" => action.as_str()).increment(1);
}

/// A run ended.
pub(crate) fn exit(reason: ExitReason) {
    counter!(EXITS, "reason" => reason_word(reason)).increment(1);
}

/// A start asked a pool for a TAP, and got one that was ready, or not.
pub(crate) fn tap_claim(ready: bool) {
    counter!(TAP_CLAIMS, "outcome" => if ready { "hit" } else { "miss" }).increment(1);
}

/// A VM was created while warm slots were ready, and one of them fitted, or none.
pub(crate) fn slot_claim(fits: bool) {
    counter!(SLOT_CLAIMS, "outcome" => if fits { "hit" } else { "miss" }).increment(1);
}

/// The word that the API has for it.
fn reason_word(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::MainExited => "main-exited",
        ExitReason::Stopped => "stopped",
        ExitReason::Killed => "killed",
        ExitReason::GuestPoweredOff => "guest-powered-off",
        ExitReason::GuestPanicked => "guest-panicked",
        ExitReason::VmmDied => "vmm-died",
        ExitReason::Lost => "lost",
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::operation::Stages;

    #[test]
    fn a_reason_has_the_word_of_the_api() {
        use ExitReason as R;
        for reason in [
            R::MainExited,
            R::Stopped,
            R::Killed,
            R::GuestPoweredOff,
            R::GuestPanicked,
            R::VmmDied,
            R::Lost,
        ] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason_word(reason));
        }
    }

    #[test]
    fn operations_and_their_stages_are_counted() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        metrics::with_local_recorder(&recorder, || {
            runtime.block_on(async {
                let mut done = Stages::begin("start");
                done.stage("root.prepare", async { Ok::<_, ()>(()) })
                    .await
                    .unwrap();
                drop(done);
                let mut failed = Stages::begin("start");
                failed
                    .stage("root.prepare", async { Err::<(), _>(()) })
                    .await
                    .unwrap_err();
            });
            event(EventAction::StartFailed);
            exit(ExitReason::VmmDied);
        });
        let text = handle.render();
        for line in [
            r#"offshoot_operations_total{operation="start",outcome="done"} 1"#,
            r#"offshoot_operations_total{operation="start",outcome="failed"} 1"#,
            r#"offshoot_operation_duration_seconds_count{operation="start"} 2"#,
            r#"offshoot_stage_duration_seconds_count{operation="start",stage="root.prepare"} 2"#,
            r#"offshoot_events_total{action="start-failed"} 1"#,
            r#"offshoot_exits_total{reason="vmm-died"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
