//! Real virtiofsds: alone, with this test as their VMM, and under a real QEMU.
//!
//! Every program of `DEFAULT_PROGRAMS` that is installed is tried, and the one that `OFFSHOOT_TEST_VIRTIOFSD` names.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot_sys::process::{Exit, PidFd, ProcessIdentity, Signal, session_members};
use offshoot_vmm::MachineStatus;
use offshoot_vmm::plan::SharePlan;
use offshoot_vmm::virtiofsd::{
    DEFAULT_PROGRAMS, ShareCache, ShareConfig, ShareError, ShareServer, ShareState, Virtiofsd,
    VirtiofsdConfig, VirtiofsdFlavour,
};

use crate::guest::End;
use crate::rig::{Rig, Vmm};

/// What a path may hold; the test's own tries each program with it.
const ODD_NAME: &str = "a,b=c \\101 d\n-o,\u{e9}";
const NOBODY: u32 = 65534;

/// The programs to try; a word about it when there are none.
fn programs() -> Vec<Virtiofsd> {
    let named = std::env::var_os("OFFSHOOT_TEST_VIRTIOFSD").map(PathBuf::from);
    let all = DEFAULT_PROGRAMS.iter().map(PathBuf::from).chain(named);
    let found: Vec<_> = all
        .filter(|program| program.exists())
        .map(|program| {
            Virtiofsd::new(VirtiofsdConfig {
                program: Some(program),
            })
        })
        .collect();
    let root = rustix::process::geteuid().is_root();
    if found.is_empty() || !root {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: virtiofsd is not installed, or we are not root");
        }
        return Vec::new();
    }
    found
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = Self { folder };
        std::fs::create_dir(place.source()).unwrap();
        std::fs::write(place.source().join("marker"), "hello").unwrap();
        place
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join(ODD_NAME)
    }

    fn share(&self, read_only: bool) -> ShareConfig {
        ShareConfig {
            tag: "data".into(),
            source: self.source(),
            read_only,
            cache: ShareCache::Auto,
            socket: self.folder.path().join("share.sock"),
            socket_owner: (NOBODY, NOBODY),
            log: self.folder.path().join("share.log"),
            cgroups: Vec::new(),
        }
    }
}

/// Asks again and again until there is an answer.
async fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    for _ in 0..4000 {
        if let Some(answer) = ask() {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 20 s: {what}");
}

/// The process in the namespaces, when it has dropped what it does not need.
async fn sandboxed(server: &ShareServer) -> ProcessIdentity {
    let leader = &server.state().process;
    until("a process in the sandbox", || {
        let exit = server.ended();
        assert!(exit.is_none(), "it ended: {exit:?}");
        let members = session_members(leader).unwrap();
        members
            .into_iter()
            .find(|member| {
                field(member.pid, "NoNewPrivs:").is_some()
                    && field(member.pid, "Seccomp:").as_deref() == Some("2")
            })
            .filter(|member| root_of(member).join("marker").exists())
    })
    .await
}

fn root_of(process: &ProcessIdentity) -> PathBuf {
    format!("/proc/{}/root", process.pid).into()
}

fn field(pid: u32, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().to_owned())
}

async fn gone(process: &ProcessIdentity) {
    if let Some(held) = PidFd::open(process).unwrap() {
        let waited = tokio::time::timeout(Duration::from_secs(20), held.wait_exit()).await;
        assert!(waited.is_ok(), "process {} is left", process.pid);
    }
}

/// As `/proc/<pid>/status` shows them: chown, dac_override, fowner, fsetid, setgid, setuid, setfcap.
const CAPABILITIES: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;
/// The same without chown, fsetid and setfcap.
const CAPABILITIES_READ_ONLY: u64 = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 7;

#[tokio::test]
async fn a_share_serves_its_folder_and_nothing_else_and_ends_with_its_client() {
    for virtiofsd in programs() {
        for read_only in [false, true] {
            let place = Place::new();
            let share = place.share(read_only);
            let server = virtiofsd.serve(&share).await.unwrap();
            let meta = std::fs::metadata(&share.socket).unwrap();
            assert_eq!(
                (meta.mode() & 0o777, meta.uid(), meta.gid()),
                (0o600, NOBODY, NOBODY)
            );
            let client = UnixStream::connect(&share.socket).unwrap();
            let inner = sandboxed(&server).await;

            let root = root_of(&inner);
            let names: Vec<_> = std::fs::read_dir(&root)
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            assert_eq!(names, ["marker"]);
            let wrote = std::fs::write(root.join("new"), "x").map_err(|error| error.raw_os_error());
            let expected = if read_only {
                Err(Some(rustix::io::Errno::ROFS.raw_os_error()))
            } else {
                Ok(())
            };
            assert_eq!(wrote, expected);
            assert_eq!(place.source().join("new").exists(), !read_only);
            std::fs::write(place.source().join("ours"), "x").unwrap();

            let capabilities = u64::from_str_radix(&field(inner.pid, "CapEff:").unwrap(), 16).unwrap();
            let expected = if read_only {
                CAPABILITIES_READ_ONLY
            } else {
                CAPABILITIES
            };
            assert_eq!(capabilities, expected, "{capabilities:x}");
            let net = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
            assert_ne!(net(&inner.pid.to_string()), net("self"));

            drop(client);
            let exit = server.wait_exit().await;
            assert_eq!(exit.process, Some(Exit::Code(0)), "{exit:?}");
            gone(&inner).await;
            assert!(!share.socket.exists());
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains("a,b=c"), "a mount is left on the host");
        }
    }
}

#[tokio::test]
async fn a_share_can_be_ended_before_and_after_its_client_came() {
    for virtiofsd in programs() {
        for connect in [false, true] {
            let place = Place::new();
            let share = place.share(true);
            let server = virtiofsd.serve(&share).await.unwrap();
            let client = connect.then(|| UnixStream::connect(&share.socket).unwrap());
            let inner = match client {
                Some(_) => Some(sandboxed(&server).await),
                None => None,
            };
            let start = std::time::Instant::now();
            server.kill().await.unwrap();
            assert!(start.elapsed() < Duration::from_secs(20));
            for process in inner.iter().chain([&server.state().process]) {
                assert!(!process.is_alive(), "process {} is left", process.pid);
            }
            assert!(!share.socket.exists());
            server.kill().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_share_that_is_killed_by_somebody_else_is_noticed() {
    for virtiofsd in programs() {
        let place = Place::new();
        let share = place.share(false);
        // The one that we know, and the one in the namespaces.
        for kill_inner in [false, true] {
            let server = virtiofsd.serve(&share).await.unwrap();
            let client = UnixStream::connect(&share.socket).unwrap();
            let inner = sandboxed(&server).await;
            let victim = if kill_inner {
                &inner
            } else {
                &server.state().process
            };
            let held = PidFd::open(victim).unwrap().unwrap();
            held.send_signal(Signal::KILL).unwrap();
            let exit = server.wait_exit().await;
            assert_ne!(exit.process, Some(Exit::Code(0)));
            assert!(!share.socket.exists());
            gone(&inner).await;
            drop(client);
        }
    }
}

#[tokio::test]
async fn a_share_is_found_again_by_another_daemon() {
    for virtiofsd in programs() {
        let place = Place::new();
        let share = place.share(false);
        let server = virtiofsd.serve(&share).await.unwrap();
        let state = server.state().clone();
        drop(server);
        // Also by a daemon that nobody told of it.
        let stored = ShareState::load(&share.socket).unwrap().expect("it is recorded");
        assert_eq!(stored, state);
        let again = Virtiofsd::reopen(&stored).unwrap().expect("it runs");
        assert!(share.socket.exists());
        let client = UnixStream::connect(&share.socket).unwrap();
        let inner = sandboxed(&again).await;
        drop(client);
        again.wait_exit().await;
        gone(&inner).await;
        assert!(Virtiofsd::reopen(&stored).unwrap().is_none());
        assert_eq!(ShareState::load(&share.socket).unwrap(), None);
        let names: Vec<_> = std::fs::read_dir(place.folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(
            names.iter().all(|name| name == ODD_NAME || name == "share.log"),
            "{names:?}"
        );

        // And one that died while no daemon ran leaves its socket until somebody looks.
        std::fs::write(&share.socket, "").unwrap();
        assert!(Virtiofsd::reopen(&stored).unwrap().is_none());
        assert!(!share.socket.exists());
    }
}

#[tokio::test]
async fn what_cannot_be_shared_is_refused_and_leaves_nothing() {
    for virtiofsd in programs() {
        let place = Place::new();
        let mut share = place.share(false);
        share.source = place.folder.path().join("none");
        assert!(matches!(
            virtiofsd.serve(&share).await,
            Err(ShareError::Source { .. })
        ));
        share.source = place.source().join("marker");
        assert!(matches!(
            virtiofsd.serve(&share).await,
            Err(ShareError::NotFolder { .. })
        ));
        share.source = "/usr/..".into();
        assert!(matches!(virtiofsd.serve(&share).await, Err(ShareError::Root)));
        assert!(!share.socket.exists());
        share = place.share(false);
        share.socket = place.folder.path().join("x".repeat(200));
        assert!(matches!(
            virtiofsd.serve(&share).await,
            Err(ShareError::Prepare { .. })
        ));
    }
}

#[tokio::test]
async fn a_program_that_complains_is_quoted() {
    if programs().is_empty() {
        return;
    }
    let place = Place::new();
    let program = place.folder.path().join("virtiofsd");
    let script =
        "#!/bin/sh\n[ \"$1\" = --version ] && exec echo virtiofsd 1.13.2\necho no such option >&2\nexit 2\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let virtiofsd = Virtiofsd::new(VirtiofsdConfig {
        program: Some(program),
    });
    assert_eq!(virtiofsd.probe().await.unwrap().flavour, VirtiofsdFlavour::Rust);
    let share = place.share(false);
    let server = virtiofsd.serve(&share).await.unwrap();
    let exit = server.wait_exit().await;
    assert_eq!(
        (exit.process, exit.said.as_str()),
        (Some(Exit::Code(2)), "no such option")
    );
    assert_eq!(server.ended(), Some(exit));
    assert_eq!(std::fs::read_to_string(&share.log).unwrap(), "no such option\n");
    assert!(!share.socket.exists());
}

/// QEMU as nobody connects to several shares at once; they end with it.
#[tokio::test]
async fn a_vm_has_several_shares_and_they_end_with_it() {
    for virtiofsd in programs() {
        let Some(mut rig) = Rig::new(Vmm::Qemu, End::Idle) else {
            return;
        };
        let mut servers = Vec::new();
        for (n, read_only) in [true, false, true].into_iter().enumerate() {
            let place = Place::new();
            let mut share = place.share(read_only);
            share.socket = rig.folder.join(format!("share,{n}.sock"));
            let server = virtiofsd.serve(&share).await.unwrap();
            rig.plan.shares.push(SharePlan {
                tag: format!("share.{n}"),
                socket: share.socket.clone(),
            });
            servers.push((place, server));
        }
        let machine = rig.launch().await;
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
        let mut inner = Vec::new();
        for (_, server) in &servers {
            inner.push(sandboxed(server).await);
        }
        machine.kill().await.unwrap();
        for (_, server) in &servers {
            let exit = tokio::time::timeout(Duration::from_secs(20), server.wait_exit()).await;
            assert!(exit.is_ok(), "a share outlives its VM");
            assert!(!Path::new(&server.state().socket).exists());
        }
        for process in &inner {
            gone(process).await;
        }
        rig.assert_nothing_left().await;
    }
}
