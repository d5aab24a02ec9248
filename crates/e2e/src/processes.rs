//! Processes as `/proc` shows them: which of them belong to a daemon, and ending them by their ids.

use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use crate::{Daemon, wait_until};

/// How long a killed process may take to be gone: it may sit in a system call that writes to a disk.
const DYING: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// One process, as it was when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    /// The letter of proc_pid_stat(5).
    pub state: char,
    /// Its command line, words separated by spaces; empty for a zombie.
    pub line: String,
    /// Where its first three descriptors lead.
    outputs: Vec<String>,
}

impl Process {
    /// Every process of this machine.
    pub fn all() -> Vec<Self> {
        let names = crate::names(Path::new("/proc"));
        names
            .iter()
            .filter_map(|name| name.parse().ok())
            .filter_map(Self::read)
            .collect()
    }

    fn read(pid: i32) -> Option<Self> {
        let folder = Path::new("/proc").join(pid.to_string());
        let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
        // The name before the last parenthesis may hold anything.
        let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let line = std::fs::read(folder.join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let outputs = (0..3)
            .filter_map(|fd| std::fs::read_link(folder.join("fd").join(fd.to_string())).ok())
            .map(|path| path.to_string_lossy().into_owned())
            .collect();
        Some(Self {
            pid,
            parent,
            state,
            line: line.trim_end().to_owned(),
            outputs,
        })
    }

    /// Whether its command line names `folder`, or it writes there: a virtiofsd names its source only.
    pub fn concerns(&self, folder: &Path) -> bool {
        let folder = folder.to_string_lossy();
        self.line.contains(&*folder) || self.outputs.iter().any(|path| path.contains(&*folder))
    }

    /// Whether it runs this program.
    pub fn runs(&self, program: &str) -> bool {
        let word = self.line.split(' ').next().unwrap_or_default();
        Path::new(word).file_name().is_some_and(|name| name == program)
    }
}

/// Sends a signal to a process that must be there.
pub fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a pid"), signal).expect("kill");
}

impl Daemon {
    /// The daemon's own process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// Bytes of it that are in memory (`VmRSS` of proc_pid_status(5)).
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok())
            .expect("VmRSS");
        kib << 10
    }

    /// Every virtiofsd of this daemon's VMs.
    pub fn virtiofsds(&self) -> Vec<Process> {
        let mut found = Process::all();
        found.retain(|process| process.runs("virtiofsd") && process.concerns(self.root()));
        found
    }

    /// The virtiofsd processes that serve a folder of the host, the outermost first: with a sandbox there are two.
    pub fn virtiofsds_of(&self, source: &Path) -> Vec<Process> {
        let source = source.to_string_lossy();
        let mut found = self.virtiofsds();
        found.retain(|process| process.line.contains(&*source));
        let pids: Vec<_> = found.iter().map(|process| process.pid).collect();
        found.sort_by_key(|process| pids.contains(&process.parent));
        found
    }

    /// kill -9 of the daemon and of every process that it is the parent of (VMMs are, too), all at one moment.
    pub fn kill_with_children(&mut self) {
        let daemon = self.pid();
        // Nothing can be started behind our back by one that stands still.
        signal(daemon, Signal::STOP);
        wait_until("the daemon to stand still", || {
            Process::read(daemon).is_some_and(|process| matches!(process.state, 'T' | 'Z'))
        });
        let children: Vec<_> = Process::all()
            .into_iter()
            .filter(|process| process.parent == daemon)
            .filter_map(|process| pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok())
            .collect();
        self.kill();
        for child in &children {
            // One that ended meanwhile is as dead as it should be.
            let _ = pidfd_send_signal(child, Signal::KILL);
        }
        for child in &children {
            // It is readable when the process is gone, whether somebody waited for it or not.
            let gone = poll(&mut [PollFd::new(child, PollFlags::IN)], Some(&DYING));
            assert_eq!(gone, Ok(1), "a child of the daemon does not die");
        }
    }
}
