//! The control files: small texts, read whole and written with one call.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

/// `cgroup.procs` of a group with many processes is the longest: 4 MiB are half a million of them.
const MAX_FILE: u64 = 4 << 20;

/// Reads a control file.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a control file: the kernel takes each call as one command.
pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// The number in a file of one number; `None` for `max`, or what is no number.
pub(super) fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number behind a key in a file of `key number` lines.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
    number(line)
}

/// The process ids of a `cgroup.procs`. A process of another pid namespace shows as 0 and is left out.
pub(super) fn pids(text: &str) -> Vec<u32> {
    text.lines()
        .filter_map(|line| line.trim().parse().ok())
        .filter(|pid| *pid != 0)
        .collect()
}

/// The words of `cgroup.controllers` and `cgroup.subtree_control`.
pub(super) fn has_word(text: &str, word: &str) -> bool {
    text.split_ascii_whitespace().any(|one| one == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_files_are_read() {
        assert_eq!(number("4096\n"), Some(4096));
        for none in ["max\n", "", "-1\n", "99999999999999999999999"] {
            assert_eq!(number(none), None, "{none}");
        }
        let stat = "usage_usec 17\nuser_usec 9\nnr_periods 3\nnr_throttled 0\n";
        assert_eq!(keyed(stat, "usage_usec"), Some(17));
        assert_eq!(keyed(stat, "nr_periods"), Some(3));
        assert_eq!(keyed(stat, "usage"), None);
        assert_eq!(
            keyed("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", "oom_kill"),
            Some(2)
        );
        assert_eq!(
            keyed(
                "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\noom_group_kill 0\n",
                "oom_kill"
            ),
            Some(1)
        );
        assert_eq!(pids("12\n0\n7\nx\n"), [12, 7]);
        assert!(has_word("cpuset cpu io\n", "cpu") && !has_word("cpuset io\n", "cpu"));
    }

    #[test]
    fn a_file_is_not_made_by_writing_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = write(&dir.path().join("pids.max"), "1").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
