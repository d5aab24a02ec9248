//! The host's clock, from which every guest gets its time.

use std::io;
use std::time::{Duration, SystemTime};

use offshoot_model::{Finding, Severity};

const PART: &str = "clock";

/// The time now, and whether somebody keeps it right.
pub(super) fn check() -> Finding {
    // The program itself was written at some time, and it cannot be earlier than that.
    let written = std::fs::metadata("/proc/self/exe").and_then(|meta| meta.modified());
    judge(
        SystemTime::now(),
        written.unwrap_or(SystemTime::UNIX_EPOCH),
        offshoot_sys::clock::is_synchronised(),
    )
}

fn judge(now: SystemTime, written: SystemTime, synchronised: io::Result<bool>) -> Finding {
    let shown = humantime::format_rfc3339_seconds(now);
    if let Ok(behind) = written.duration_since(now)
        && behind > Duration::ZERO
    {
        return Finding::new(
            PART,
            Severity::Failure,
            format!("the host's clock says {shown}, which is before this offshootd was installed"),
            "set it with `timedatectl set-ntp true`, or `date -s`",
        )
        .id("clock-implausible")
        .cost("guests get their time from it: certificates look invalid to them, and builds go wrong");
    }
    match synchronised {
        Ok(true) => Finding::ok(PART, format!("the host's clock is kept right ({shown})")).id("clock"),
        Ok(false) => Finding::new(
            PART,
            Severity::Warning,
            format!("nothing keeps the host's clock right ({shown})"),
            "apt install systemd-timesyncd, or another time service",
        )
        .id("clock-unsynchronised")
        .cost("guests get their time from it when they start, and are as wrong as it is"),
        Err(error) => Finding::ok(
            PART,
            format!("the host's clock says {shown}; whether it is kept right cannot be asked: {error}"),
        )
        .id("clock-unknown"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_right_unwatched_or_impossible() {
        let written = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let (later, earlier) = (written + Duration::from_secs(1), written - Duration::from_secs(1));
        let check = |now, synchronised, severity, id: &str| {
            let found = judge(now, written, synchronised);
            assert_eq!((found.severity, found.id.as_str()), (severity, id));
            let explained = !found.cost.is_empty() && !found.hint.is_empty();
            assert_eq!(explained, severity != Severity::Ok, "{found:?}");
        };
        check(later, Ok(true), Severity::Ok, "clock");
        check(written, Ok(true), Severity::Ok, "clock");
        check(later, Ok(false), Severity::Warning, "clock-unsynchronised");
        check(
            later,
            Err(io::ErrorKind::PermissionDenied.into()),
            Severity::Ok,
            "clock-unknown",
        );
        check(earlier, Ok(true), Severity::Failure, "clock-implausible");
    }
}
