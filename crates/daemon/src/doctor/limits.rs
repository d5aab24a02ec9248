//! What the kernel lets this daemon and its VMs have: open files, processes, namespaces.

use std::path::Path;

use offshoot_model::{Finding, Severity};

const PART: &str = "host";

/// Files that the daemon holds open for a running VM: the connections to its VMM and its agent, a pidfd for each of its
/// processes, its output log, and what clients follow.
const FILES_PER_VM: u64 = 16;
/// Files that the daemon has open without any VM: the database, locks, sockets, clients.
const OWN_FILES: u64 = 128;
/// Processes and threads of a running VM: the VMM's main loop, its vCPUs and its workers, and a virtiofsd or two.
const TASKS_PER_VM: u64 = 24;
/// A host that has room for fewer VMs than this is limited by it, and not by its memory.
const MANY_VMS: u64 = 100;

/// What the kernel was asked.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// `RLIMIT_NOFILE` of this process; `None` is no limit.
    open_files: Option<u64>,
    /// `kernel.pid_max`.
    pid_max: Option<u64>,
    /// The least of `user.max_mnt_namespaces`, `…pid…` and `…net…`.
    namespaces: Option<u64>,
}

/// Asks the kernel.
pub(super) fn check() -> Vec<Finding> {
    let sysctl = |name: &str| read(&Path::new("/proc/sys").join(name));
    judge(Limits {
        open_files: rustix::process::getrlimit(rustix::process::Resource::Nofile).current,
        pid_max: sysctl("kernel/pid_max"),
        namespaces: ["mnt", "pid", "net"]
            .iter()
            .filter_map(|kind| sysctl(&format!("user/max_{kind}_namespaces")))
            .min(),
    })
}

fn read(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn judge(limits: Limits) -> Vec<Finding> {
    let mut findings = Vec::new();
    let files = limits.open_files.unwrap_or(u64::MAX);
    let vms = files.saturating_sub(OWN_FILES) / FILES_PER_VM;
    findings.push(if vms < MANY_VMS {
        Finding::new(
            PART,
            Severity::Warning,
            format!("offshootd may have {files} files open"),
            "set `LimitNOFILE=65536` in its systemd unit, or `ulimit -n 65536` before it is started",
        )
        .id("open-files-low")
        .cost(format!("more than about {vms} running VMs are not possible"))
    } else {
        let words = limits
            .open_files
            .map_or("any number of".to_owned(), |files| files.to_string());
        Finding::ok(PART, format!("offshootd may have {words} files open")).id("open-files")
    });
    if let Some(most) = limits.pid_max
        && most / TASKS_PER_VM < MANY_VMS
    {
        findings.push(
            Finding::new(
                PART,
                Severity::Warning,
                format!("the host may have {most} processes and threads"),
                "sysctl -w kernel.pid_max=4194304",
            )
            .id("processes-low")
            .cost(format!(
                "more than about {} running VMs are not possible",
                most / TASKS_PER_VM
            )),
        );
    }
    if limits.namespaces == Some(0) {
        findings.push(
            Finding::new(
                PART,
                Severity::Failure,
                "the host allows no mount, process or network namespaces",
                "sysctl -w user.max_mnt_namespaces=10000 user.max_pid_namespaces=10000 user.max_net_namespaces=10000",
            )
            .id("namespaces-none")
            .cost("no VM can be started: VMMs are confined with them"),
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_room_for_vms_is_told() {
        let well = Limits {
            open_files: Some(65_536),
            pid_max: Some(32_768),
            namespaces: Some(1_000),
        };
        let check = |limits, expected: &[&str]| {
            let findings = judge(limits);
            let ids: Vec<_> = findings.iter().map(|found| found.id.as_str()).collect();
            assert_eq!(ids, expected);
            for found in &findings {
                let explained = !found.cost.is_empty() && !found.hint.is_empty();
                assert_eq!(explained, found.severity != Severity::Ok, "{found:?}");
            }
        };
        check(well, &["open-files"]);
        check(
            Limits {
                open_files: None,
                ..well
            },
            &["open-files"],
        );
        check(
            Limits {
                open_files: Some(1024),
                ..well
            },
            &["open-files-low"],
        );
        check(
            Limits {
                open_files: Some(64),
                ..well
            },
            &["open-files-low"],
        );
        check(
            Limits {
                pid_max: Some(1000),
                ..well
            },
            &["open-files", "processes-low"],
        );
        check(
            Limits {
                namespaces: Some(0),
                ..well
            },
            &["open-files", "namespaces-none"],
        );
        let unknown = Limits {
            pid_max: None,
            namespaces: None,
            ..well
        };
        check(unknown, &["open-files"]);
    }
}
