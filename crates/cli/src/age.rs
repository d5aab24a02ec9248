//! Times as people say them, in Docker's words.

use offshoot_api::vm::VmSummary;
use offshoot_model::VmState;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// A length of time in one word or two (docker/go-units, `HumanDuration`).
pub(crate) fn words(seconds: u64) -> String {
    let hours = (seconds + HOUR / 2) / HOUR;
    match seconds {
        0 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..MINUTE => format!("{seconds} seconds"),
        MINUTE..120 => "About a minute".to_owned(),
        120..HOUR => format!("{} minutes", seconds / MINUTE),
        _ if hours == 1 => "About an hour".to_owned(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        _ if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", seconds / DAY / 365),
    }
}

/// How long ago something was.
pub(crate) fn ago(then_ms: u64, now_ms: u64) -> String {
    format!("{} ago", words(now_ms.saturating_sub(then_ms) / 1000))
}

/// The STATUS column of `ps`.
pub(crate) fn status(vm: &VmSummary, now_ms: u64) -> String {
    let up = || {
        let since = vm.started_ms.unwrap_or(now_ms);
        let words = lower_first(&words(now_ms.saturating_sub(since) / 1000));
        let degraded = if vm.degraded.is_empty() { "" } else { " (degraded)" };
        format!("Up {words}{degraded}")
    };
    let when = || {
        vm.finished_ms
            .map(|then| format!(" {}", lower_first(&ago(then, now_ms))))
            .unwrap_or_default()
    };
    match vm.state {
        VmState::Created => "Created".to_owned(),
        VmState::Starting => "Starting".to_owned(),
        VmState::Running => up(),
        VmState::Paused => format!("{} (Paused)", up()),
        VmState::Stopping => "Stopping".to_owned(),
        VmState::Stopped => match vm.exit {
            Some(exit) => format!("Exited ({}){}", exit.code, when()),
            None => format!("Exited{}", when()),
        },
        VmState::Failed => format!("Failed{}", when()),
    }
}

/// The same words in the middle of a line.
pub(crate) fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_lowercase().chain(chars).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::{ExitReason, ExitStatus, VmId};

    #[test]
    fn lengths_of_time_have_dockers_words() {
        for (seconds, expected) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (119, "About a minute"),
            (120, "2 minutes"),
            (3599, "59 minutes"),
            (3600, "About an hour"),
            (2 * HOUR, "2 hours"),
            (47 * HOUR, "47 hours"),
            (48 * HOUR, "2 days"),
            (13 * DAY, "13 days"),
            (14 * DAY, "2 weeks"),
            (60 * DAY, "2 months"),
            (729 * DAY, "24 months"),
            (730 * DAY, "2 years"),
        ] {
            assert_eq!(words(seconds), expected, "{seconds} s");
        }
    }

    #[test]
    fn a_status_says_since_when() {
        let mut vm = VmSummary {
            id: VmId::from_bytes(&[1; 6]),
            name: "web".parse().unwrap(),
            image: "debian".into(),
            command: "sh".into(),
            state: VmState::Created,
            created_ms: 0,
            started_ms: None,
            finished_ms: None,
            exit: None,
            degraded: Vec::new(),
            network: None,
            ports: Vec::new(),
            sessions: offshoot_api::vm::Sessions::default(),
        };
        let now = 10_000_000;
        assert_eq!(status(&vm, now), "Created");
        vm.state = VmState::Running;
        vm.started_ms = Some(now - 180_000);
        assert_eq!(status(&vm, now), "Up 3 minutes");
        vm.degraded = vec!["the share on /data is gone: its virtiofsd died".into()];
        assert_eq!(status(&vm, now), "Up 3 minutes (degraded)");
        vm.degraded.clear();
        vm.started_ms = Some(now + 5000); // clocks can go back
        assert_eq!(status(&vm, now), "Up less than a second");
        vm.state = VmState::Paused;
        vm.started_ms = Some(now - 61_000);
        assert_eq!(status(&vm, now), "Up about a minute (Paused)");
        vm.state = VmState::Stopped;
        vm.finished_ms = Some(now - 7_200_000);
        vm.exit = Some(ExitStatus {
            code: 7,
            reason: ExitReason::MainExited,
        });
        assert_eq!(status(&vm, now), "Exited (7) 2 hours ago");
        vm.state = VmState::Failed;
        assert_eq!(status(&vm, now), "Failed 2 hours ago");
    }
}
