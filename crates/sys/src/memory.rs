//! How much memory the host has, and how much of it could be had now.
//!
//! Source: `/proc/meminfo` (proc_meminfo(5)).

use std::fs::File;
use std::io::{self, Read};

/// The host's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// `MemTotal`.
    pub total: u64,
    /// `MemAvailable`: an estimate of what new programs can get without swapping.
    pub available: u64,
}

/// Some sixty short lines.
const MAX_MEMINFO: u64 = 16 << 10;

/// The host's memory now.
pub fn host_memory() -> io::Result<HostMemory> {
    let mut text = String::new();
    File::open("/proc/meminfo")?
        .take(MAX_MEMINFO)
        .read_to_string(&mut text)?;
    parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse(text: &str) -> Option<HostMemory> {
    let bytes = |name: &str| -> Option<u64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(HostMemory {
        total: bytes("MemTotal")?,
        available: bytes("MemAvailable")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_memory_is_read() {
        let text = "MemTotal:       24684084 kB\nMemFree:         9836868 kB\nMemAvailable:   24031440 kB\n";
        let expected = HostMemory {
            total: 24_684_084 << 10,
            available: 24_031_440 << 10,
        };
        assert_eq!(parse(text), Some(expected));
        assert_eq!(parse(&text.replace("MemAvailable", "X")), None);
        assert_eq!(parse(&text.replace("24684084 kB", "much")), None);
        let now = host_memory().unwrap();
        assert!(now.total > 0 && now.available <= now.total, "{now:?}");
    }
}
