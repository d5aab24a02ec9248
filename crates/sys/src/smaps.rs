//! How much memory a process has, and how much of it others have, too.
//!
//! Source: `/proc/<pid>/smaps_rollup` (proc_pid_smaps(5)): the kernel walks the page tables, some ten microseconds per MiB.

use std::fs::File;
use std::io::{self, Read};

/// The memory of one process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// All pages that it has in RAM, `shared` and `private` together.
    pub rss: u64,
    /// The same with each page divided by the number of processes that have it: adds up over processes.
    pub pss: u64,
    /// Pages that other processes have mapped, too.
    pub shared: u64,
    /// Pages that it alone has mapped.
    pub private: u64,
    /// Swapped out.
    pub swap: u64,
}

/// The rollup is one header and some twenty short lines; a kernel to come may add a few.
const MAX_ROLLUP: u64 = 16 << 10;

/// The memory of the process `pid` now. A process that is gone, or a zombie, is an error (`ENOENT`, `ESRCH`); so is one
/// of another user, unless we are root.
pub fn memory_of(pid: u32) -> io::Result<ProcessMemory> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/smaps_rollup"))?
        .take(MAX_ROLLUP)
        .read_to_string(&mut text)?;
    parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// Reads `Name:   123 kB` lines; `None` when one that is wanted is missing or is no number.
fn parse(text: &str) -> Option<ProcessMemory> {
    const KIB: u64 = 1024;
    let bytes = |name: &str| -> Option<u64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
        kib.checked_mul(KIB)
    };
    Some(ProcessMemory {
        rss: bytes("Rss")?,
        pss: bytes("Pss")?,
        shared: bytes("Shared_Clean")?.checked_add(bytes("Shared_Dirty")?)?,
        private: bytes("Private_Clean")?.checked_add(bytes("Private_Dirty")?)?,
        swap: bytes("Swap")?,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, Write as _};

    use super::*;

    const ROLLUP: &str = "5589482fc000-7ffefed2e000 ---p 00000000 00:00 0                          [rollup]
Rss:                1696 kB
Pss:                 442 kB
Pss_Dirty:           116 kB
Shared_Clean:       1488 kB
Shared_Dirty:          4 kB
Private_Clean:        92 kB
Private_Dirty:       112 kB
Shared_Hugetlb:        9 kB
Swap:                  8 kB
SwapPss:               1 kB
";

    #[test]
    fn a_rollup_is_read() {
        let expected = ProcessMemory {
            rss: 1696 << 10,
            pss: 442 << 10,
            shared: 1492 << 10,
            private: 204 << 10,
            swap: 8 << 10,
        };
        assert_eq!(parse(ROLLUP), Some(expected));
        for missing in ["Rss", "Pss:", "Shared_Dirty", "Private_Clean", "Swap:"] {
            assert_eq!(parse(&ROLLUP.replace(missing, "X")), None, "{missing}");
        }
        assert_eq!(parse(""), None);
        assert_eq!(parse(&ROLLUP.replace("1696 kB", "many kB")), None);
        assert_eq!(parse(&ROLLUP.replace("1488", "18446744073709551615")), None);
    }

    #[test]
    fn what_a_process_writes_to_is_its_own() {
        // A process of its own: other tests of this one come and go.
        let mut child = std::process::Command::new("/bin/sh")
            .args([
                "-c",
                "read x; v=$(head -c 8000000 /dev/zero | tr '\\0' a); echo done; read x",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (mut input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let before = memory_of(child.id()).unwrap();
        input.write_all(b"\n").unwrap();
        std::io::BufReader::new(output)
            .read_line(&mut String::new())
            .unwrap();
        let after = memory_of(child.id()).unwrap();
        drop(input);
        child.wait().unwrap();
        assert!(
            after.private >= before.private + 8_000_000,
            "{before:?} {after:?}"
        );
        assert!(after.pss >= after.private && after.rss >= after.pss, "{after:?}");
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert!(memory_of(pid).is_err());
    }
}
