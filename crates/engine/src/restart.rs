//! Whether a VM that does not run is started again by itself. Pure.

use std::time::Duration;

use offshoot_model::{RestartPolicy, VmState};

use crate::definition::Life;

/// The first pause before a VM is started again; doubled each time, as Docker does it.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A run this long was no crash loop: the next pause is the first one again.
const LONG_RUN: Duration = Duration::from_secs(10);

/// Whether a VM that ended by itself, or whose start failed, is started again.
pub(crate) fn after_end(policy: RestartPolicy, life: &Life) -> bool {
    let failed = life.state == VmState::Failed || life.exit.is_some_and(|exit| exit.code != 0);
    match policy {
        RestartPolicy::No => false,
        RestartPolicy::OnFailure => failed,
        RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
    }
}

/// Whether a VM that does not run is started because the daemon was. As with Docker, `always` means also one that
/// somebody had stopped; a VM that never ran waits for its first start.
pub(crate) fn with_the_daemon(policy: RestartPolicy, life: &Life) -> bool {
    if life.state == VmState::Created || life.state.has_vmm() {
        return false;
    }
    match policy {
        RestartPolicy::No | RestartPolicy::OnFailure => false,
        RestartPolicy::Always => true,
        RestartPolicy::UnlessStopped => !life.held,
    }
}

/// How often in a row a VM was started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restarts(u32);

impl Restarts {
    /// How long to wait before the next one, after a run that took so long (`None`: it did not come that far).
    pub(crate) fn next_pause(&mut self, run: Option<Duration>) -> Duration {
        if run.is_some_and(|run| run >= LONG_RUN) {
            self.0 = 0;
        }
        let pause = (PAUSE * 2u32.saturating_pow(self.0.min(16))).min(PAUSE_MAX);
        self.0 += 1;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::{ExitReason, ExitStatus};

    fn life(state: VmState, code: Option<i32>, held: bool) -> Life {
        let reason = ExitReason::MainExited;
        Life {
            state,
            exit: code.map(|code| ExitStatus { code, reason }),
            held,
            ..Life::new()
        }
    }

    #[test]
    fn a_policy_means_what_it_means_in_docker() {
        use RestartPolicy as P;
        use VmState as S;
        for (policy, state, code, held, after, daemon) in [
            (P::No, S::Stopped, Some(1), false, false, false),
            (P::OnFailure, S::Stopped, Some(0), false, false, false),
            (P::OnFailure, S::Stopped, Some(1), false, true, false),
            (P::OnFailure, S::Failed, None, false, true, false),
            (P::Always, S::Stopped, Some(0), false, true, true),
            (P::Always, S::Stopped, Some(137), true, true, true),
            (P::UnlessStopped, S::Stopped, Some(0), false, true, true),
            (P::UnlessStopped, S::Stopped, Some(137), true, true, false),
            (P::Always, S::Created, None, false, true, false),
            (P::Always, S::Running, None, false, true, false),
        ] {
            let life = life(state, code, held);
            assert_eq!(after_end(policy, &life), after, "{policy:?} {life:?}");
            assert_eq!(with_the_daemon(policy, &life), daemon, "{policy:?} {life:?}");
        }
    }

    #[test]
    fn pauses_grow_and_a_long_run_ends_the_row() {
        let mut restarts = Restarts::default();
        let pauses: Vec<_> = (0..12).map(|_| restarts.next_pause(None).as_millis()).collect();
        assert_eq!(pauses[..4], [100, 200, 400, 800]);
        assert_eq!(pauses[11], 60_000);
        let short = Some(Duration::from_secs(1));
        assert_eq!(restarts.next_pause(short).as_millis(), 60_000);
        assert_eq!(restarts.next_pause(Some(LONG_RUN)).as_millis(), 100);
        assert_eq!(restarts.next_pause(short).as_millis(), 200);
    }
}
