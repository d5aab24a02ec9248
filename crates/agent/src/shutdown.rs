//! The end: processes first, then disks, then power.
//!
//! A disk is clean when nothing has its file system mounted any more. The VM's namespace goes with its last process,
//! in the kernel's own time, so its end is awaited by opening the device alone. With the image's own init as PID 1 the
//! namespace cannot go; there the file system is frozen, which writes everything and lets nothing more through.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::configure::Disk;
use crate::guest::Guest;
use crate::{log, power, process};

/// How the guest is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// PID 1 is ours: every process gets a signal.
    Processes,
    /// PID 1 is the image's init: it is asked to end the machine.
    Init,
}

/// Between looks at the process table.
const LOOK: Duration = Duration::from_millis(5);
/// How long processes may take to go after SIGKILL.
const AFTER_KILL: Duration = Duration::from_secs(5);
/// How long the kernel may take to let go of a disk that nobody uses.
const RELEASE: Duration = Duration::from_secs(3);
/// The reply has to get out before the power goes; well within the second that the host waits.
const POWER_DELAY: Duration = Duration::from_millis(300);
/// The grace when the guest's own tools ask PID 1 to end; nobody said another.
const OWN_GRACE: Duration = Duration::from_secs(10);

/// systemd's `SIGRTMIN+4`: start poweroff.target (systemd(1)).
const SYSTEMD_POWER_OFF: u32 = 34 + 4;
/// BusyBox init and its kin: power off.
const BUSYBOX_POWER_OFF: u32 = 12;

/// `PF_KTHREAD` of the kernel's linux/sched.h.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Ends every process but PID 1 and the agent.
pub(crate) async fn end_processes(way: Way, grace: Duration) {
    let start = Instant::now();
    if !grace.is_zero() {
        match way {
            Way::Processes => drop(process::kill(-1, libc::SIGTERM.unsigned_abs())),
            Way::Init => {
                let systemd =
                    fs::read_to_string("/proc/1/comm").is_ok_and(|name| name.starts_with("systemd"));
                let signal = if systemd {
                    SYSTEMD_POWER_OFF
                } else {
                    BUSYBOX_POWER_OFF
                };
                drop(process::kill(1, signal));
            }
        }
        while others() && start.elapsed() < grace {
            tokio::time::sleep(LOOK).await;
        }
    }
    let killed = Instant::now();
    while others() && killed.elapsed() < AFTER_KILL {
        // Again and again: some may have been forking.
        drop(process::kill(-1, libc::SIGKILL.unsigned_abs()));
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether there are processes that are not ours.
fn others() -> bool {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else {
        return false;
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != 1 && *pid != own)
        .any(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_live_process(&stat)))
}

/// Whether a line of `/proc/<pid>/stat` (proc_pid_stat(5)) is of a program that still runs.
fn is_live_process(stat: &str) -> bool {
    // The name may hold anything, closing brackets too.
    let Some((_, rest)) = stat.rsplit_once(')') else {
        return false;
    };
    let mut fields = rest.split_whitespace();
    let state = fields.next().unwrap_or("X");
    let flags: u64 = fields.nth(5).and_then(|flags| flags.parse().ok()).unwrap_or(0);
    !matches!(state, "Z" | "X" | "x") && flags & KERNEL_THREAD == 0
}

/// Lets go of the disks; says whether they are clean. Blocks.
#[expect(
    clippy::disallowed_methods,
    reason = "the kernel lets go of a disk without an event; the wait ends when it has"
)]
pub(crate) fn release(way: Way, disks: &[Disk]) -> bool {
    sync_for(RELEASE);
    for disk in disks {
        disk.unmount();
    }
    let start = Instant::now();
    let mut clean = true;
    for disk in disks {
        while way == Way::Processes && !disk.is_free() && start.elapsed() < RELEASE {
            std::thread::sleep(Duration::from_millis(1));
        }
        if disk.is_free() {
            continue;
        }
        if let Err(error) = disk.freeze() {
            log::warning(format_args!("cannot freeze {}: {error}", disk.device.display()));
            clean = false;
        } else if way == Way::Processes {
            log::warning(format_args!(
                "{} is still in use, and frozen",
                disk.device.display()
            ));
            clean = false;
        }
    }
    clean
}

/// Writes what is in memory, for so long at most: a shared folder whose host side is gone would hold us up for ever.
/// What is not written then, the unmounts and freezes write.
fn sync_for(limit: Duration) {
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        rustix::fs::sync();
        // Nobody may be waiting any more.
        let _ = done.send(());
    });
    if finished.recv_timeout(limit).is_err() {
        log::warning(format_args!("not everything could be written within {limit:?}"));
    }
}

/// Switches the machine off once the reply is out.
pub(crate) fn power_off_soon() {
    tokio::spawn(async {
        tokio::time::sleep(POWER_DELAY).await;
        power::off();
    });
}

/// Ends the VM when PID 1 was asked to, by the guest's own tools.
pub(crate) async fn when_pid_1_is_asked(guest: Arc<Guest>, asked: oneshot::Receiver<()>) {
    if asked.await.is_ok() {
        guest.shut_down(OWN_GRACE).await;
        // How the main process ended has to get out, too.
        tokio::time::sleep(POWER_DELAY).await;
        power::off();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_from_kernel_threads_and_the_dead() {
        let check = |stat: &str, live| assert_eq!(is_live_process(stat), live, "{stat}");
        check("812 (sleep) S 1 812 812 0 -1 4194304 95 0 0 0", true);
        check("812 (a) b) R 1 812 812 0 -1 4194304 95 0 0 0", true);
        check("812 (sleep) Z 1 812 812 0 -1 4194304 95 0 0 0", false);
        check("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0", false);
        check("", false);
    }
}
