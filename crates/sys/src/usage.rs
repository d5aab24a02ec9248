//! What one process took since it began: processor time, threads, bytes from and to storage.
//!
//! Sources: proc_pid_stat(5), proc_pid_io(5).

use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

/// What one process took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessUsage {
    /// Processor time of all its threads, in the program and in the kernel for it; microseconds, in steps of a clock tick
    /// (10 ms).
    pub cpu_us: u64,
    /// Its threads now.
    pub threads: u64,
    /// Bytes that were fetched from storage for it; 0 where we may not see that.
    pub read_bytes: u64,
    /// Bytes that it caused to be sent to storage; 0 where we may not see that.
    pub write_bytes: u64,
}

/// Both files are a few hundred bytes.
const MAX_FILE: u64 = 4096;

/// What the process `pid` took until now. A process that is gone is an error.
pub fn usage_of(pid: u32) -> io::Result<ProcessUsage> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let mut usage = parse_stat(&read(pid, "stat")?, ticks_per_second()).ok_or_else(invalid)?;
    match read(pid, "io") {
        Ok(text) => {
            usage.read_bytes = value(&text, "read_bytes").ok_or_else(invalid)?;
            usage.write_bytes = value(&text, "write_bytes").ok_or_else(invalid)?;
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        Err(error) => return Err(error),
    }
    Ok(usage)
}

/// Time since the host started, on a clock that nobody can set and that goes on while the host sleeps.
pub fn since_boot() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` has room for what is written. It cannot fail: every Linux has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or_default())
}

fn ticks_per_second() -> u64 {
    // SAFETY: it only answers.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    // 100 is what every architecture of Linux tells programs.
    u64::try_from(ticks).unwrap_or(100)
}

fn read(pid: u32, name: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{name}"))?
        .take(MAX_FILE)
        .read_to_end(&mut bytes)?;
    // The name of a program in `stat` may be anything; what follows it is ASCII.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Fields 14, 15 and 20 of a stat line: utime, stime, num_threads.
fn parse_stat(text: &str, ticks_per_second: u64) -> Option<ProcessUsage> {
    // Field 2, the name in parentheses, may itself hold spaces and parentheses.
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let threads = fields.nth(4)?.parse().ok()?;
    let ticks = user.checked_add(system)?;
    Some(ProcessUsage {
        cpu_us: ticks.checked_mul(1_000_000)? / ticks_per_second.max(1),
        threads,
        ..ProcessUsage::default()
    })
}

fn value(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read() {
        let before = (4..14).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let line = format!("17 (a) b) S {before} 150 50 0 0 20 0 7 0 999");
        let expected = ProcessUsage {
            cpu_us: 2_000_000,
            threads: 7,
            ..ProcessUsage::default()
        };
        assert_eq!(parse_stat(&line, 100), Some(expected));
        for bad in ["", "17 (sh", "17 (sh) S 1 2"] {
            assert_eq!(parse_stat(bad, 100), None, "{bad}");
        }
        let io = "rchar: 1\nwchar: 2\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 0\n";
        assert_eq!(
            (value(io, "read_bytes"), value(io, "write_bytes")),
            (Some(4096), Some(8192))
        );
        assert_eq!(value(io, "bytes"), None);
    }

    #[test]
    fn a_process_that_works_uses_time() {
        let pid = std::process::id();
        let before = usage_of(pid).unwrap();
        let began = since_boot();
        let mut sum = 0_u64;
        while usage_of(pid).unwrap().cpu_us == before.cpu_us {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(usage_of(pid).unwrap().threads >= 1);
        assert!(since_boot() > began);
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let gone = child.id();
        child.wait().unwrap();
        assert!(usage_of(gone).is_err());
    }
}
