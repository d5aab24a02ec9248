//! What a VMM can do that its guest has taken over: a program that tries, started by each driver as a VMM is.

use std::collections::BTreeSet;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot_fake_vmm::prying;
use offshoot_model::Mac;
use offshoot_sys::tap;
use offshoot_vmm::cloud_hypervisor::{CloudHypervisorConfig, CloudHypervisorDriver};
use offshoot_vmm::firecracker::{FirecrackerConfig, FirecrackerDriver};
use offshoot_vmm::plan::{DiskPlan, LaunchPlan, NetBackend, NetPlan, TapSlot, VmmIdentity};
use offshoot_vmm::qemu::{QemuConfig, QemuDriver};
use offshoot_vmm::{Driver, LaunchError};

use crate::guest;
use crate::machines;
use crate::rig;

const NOBODY: u32 = 65534;
/// Who the VMM of another VM is.
const OTHER: u32 = 65533;

/// A VM, and what lies around it on the host.
struct Place {
    plan: LaunchPlan,
    folder: PathBuf,
    /// Another VM's disk and socket, a database, a socket of the API, and secrets of the host.
    foreign: Vec<PathBuf>,
    /// A socket without a path, which belongs to the host's network namespace.
    abstract_socket: String,
    _listening: [UnixListener; 3],
    /// Owns the folder.
    _rig: Box<dyn std::any::Any>,
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// What a driver needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Qemu,
    CloudHypervisor,
    Firecracker,
}

const ALL: [Behind; 3] = [Behind::Qemu, Behind::CloudHypervisor, Behind::Firecracker];

impl Behind {
    fn driver(self, place: &Place) -> Box<dyn Driver> {
        let program: PathBuf = env!("CARGO_BIN_EXE_offshoot-prying-vmm").into();
        let plan = &place.plan;
        let own = [&plan.kernel, &plan.run_dir]
            .into_iter()
            .chain(plan.disks.iter().map(|disk| &disk.path));
        let joined = |paths: Vec<String>| paths.join(":");
        let paths = own
            .chain(&place.foreign)
            .map(|path| path.display().to_string())
            .collect();
        let processes = vec![std::process::id().to_string(), "2".to_owned()];
        let env = vec![
            (prying::AS.to_owned(), format!("{self:?}").to_lowercase()),
            (prying::PATHS.to_owned(), joined(paths)),
            (prying::PROCESSES.to_owned(), joined(processes)),
            (prying::SOCKET.to_owned(), place.abstract_socket.clone()),
        ];
        let (files, patience) = (Vec::new(), Duration::from_secs(20));
        match self {
            Self::Qemu => Box::new(QemuDriver::new(QemuConfig {
                program,
                env,
                files,
                patience,
            })),
            Self::CloudHypervisor => Box::new(CloudHypervisorDriver::new(CloudHypervisorConfig {
                program,
                env,
                files,
                patience,
            })),
            Self::Firecracker => Box::new(FirecrackerDriver::new(FirecrackerConfig {
                program,
                env,
                files,
                patience,
            })),
        }
    }

    /// What it says that it could do, what it could not, and what it saw.
    async fn said(self, place: &Place) -> Vec<String> {
        let error = self.driver(place).launch(&place.plan).await.err();
        let Some(LaunchError::Exited { .. }) = error else {
            panic!("{self:?}: {error:?}")
        };
        let log = std::fs::read_to_string(&place.plan.log).unwrap();
        std::fs::remove_file(&place.plan.log).unwrap();
        log.lines().map(str::to_owned).collect()
    }
}

impl Place {
    /// `None`, and a word about it, where nobody can become somebody else.
    fn new(behind: Behind) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("needs root");
            return None;
        }
        let (plan, folder, rig): (_, _, Box<dyn std::any::Any>) = match behind {
            Behind::Qemu => {
                let rig = rig::Rig::new(rig::Vmm::Fake, guest::End::Idle)?;
                (rig.plan.clone(), rig.folder.clone(), Box::new(rig))
            }
            Behind::CloudHypervisor | Behind::Firecracker => {
                let vmm = match behind {
                    Behind::Firecracker => machines::Vmm::FakeFirecracker,
                    _ => machines::Vmm::FakeCloudHypervisor,
                };
                let rig = machines::Rig::new(vmm, machines::End::Idle)?;
                (rig.plan.clone(), rig.folder.clone(), Box::new(rig))
            }
        };
        let open_to_all = |path: &Path, content: &str| {
            std::fs::write(path, content).unwrap();
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o666)).unwrap();
        };
        let other = folder.join("other");
        std::fs::create_dir(&other).unwrap();
        let [disk, database, base] =
            ["overlay.ext4", "offshoot.db", "root.erofs"].map(|name| other.join(name));
        // Worse than they are: nothing but what it sees keeps it from them.
        for path in [&disk, &database, &base] {
            open_to_all(path, "secret");
        }
        chown(&disk, Some(OTHER), Some(OTHER)).unwrap();
        let [qmp, api] = ["qmp.sock", "api.sock"].map(|name| other.join(name));
        let abstract_socket = format!("offshoot-test-{}", plan.vm);
        let listening = [
            UnixListener::bind(&qmp).unwrap(),
            UnixListener::bind(&api).unwrap(),
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(&abstract_socket).unwrap()).unwrap(),
        ];
        for socket in [&qmp, &api] {
            std::fs::set_permissions(socket, PermissionsExt::from_mode(0o666)).unwrap();
        }
        let mut foreign = vec![disk, database, base, qmp, api];
        for path in [
            "/etc/passwd",
            "/etc/hostname",
            "/root",
            "/home",
            "/sys/kernel",
            "/proc/version",
        ] {
            foreign.push(path.into());
        }
        foreign.push(std::env::current_exe().unwrap());
        Some(Self {
            plan,
            folder,
            foreign,
            abstract_socket,
            _listening: listening,
            _rig: rig,
        })
    }
}

#[tokio::test]
async fn it_reaches_its_own_files_and_no_others() {
    for behind in ALL {
        let Some(mut place) = Place::new(behind) else {
            return;
        };
        let base = place.folder.join("base");
        std::fs::write(&base, "base").unwrap();
        std::fs::set_permissions(&base, PermissionsExt::from_mode(0o666)).unwrap();
        place.plan.disks.push(DiskPlan {
            serial: "base".into(),
            path: base.clone(),
            read_only: true,
        });
        let said = place_said(behind, &place).await;
        let could = |what: &str, path: &Path| said.contains(&format!("yes {what} {}", path.display()));
        let could_not = |what: &str, path: &Path| {
            let start = format!("no {what} {}: ", path.display());
            said.iter().any(|line| line.starts_with(&start))
        };
        for path in &place.foreign {
            assert!(
                could_not("read", path),
                "{behind:?} {}: {said:#?}",
                path.display()
            );
            assert!(
                could_not("write", path),
                "{behind:?} {}: {said:#?}",
                path.display()
            );
        }
        let disk = &place.plan.disks[0].path;
        assert!(
            could("read", disk) && could("write", disk),
            "{behind:?}: {said:#?}"
        );
        for path in [&place.plan.kernel, &base] {
            assert!(
                could("read", path) && could_not("write", path),
                "{behind:?}: {said:#?}"
            );
        }
        assert!(
            could_not("create in", &place.plan.run_dir),
            "{behind:?}: {said:#?}"
        );
        for start in [
            "no create in the root: ",
            "no create in /usr: ",
            "no create in /dev: ",
        ] {
            assert!(
                said.iter().any(|line| line.starts_with(start)),
                "{start} {said:#?}"
            );
        }
        // A folder for sockets is where they make their own.
        let listens = said.iter().any(|line| line == "yes listen in its folder");
        assert_eq!(listens, behind == Behind::Firecracker, "{behind:?}: {said:#?}");
        let root = fact(&said, "/:");
        let allowed: BTreeSet<_> = [
            "bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "usr",
        ]
        .into_iter()
        .chain(place.folder.iter().nth(1).and_then(|part| part.to_str()))
        .chain(
            Path::new(env!("CARGO_BIN_EXE_offshoot-prying-vmm"))
                .iter()
                .nth(1)
                .and_then(|part| part.to_str()),
        )
        .collect();
        for name in root.split(' ') {
            assert!(allowed.contains(name), "{behind:?}: {name} in {root}");
        }
        for name in fact(&said, "/dev:").split(' ') {
            let known = ["null", "zero", "random", "urandom", "kvm"];
            assert!(known.contains(&name), "{behind:?}: /dev/{name}");
        }
        // Nothing of ours is open in it but what it was given, none of it with a path but `/dev/null`.
        for line in said.iter().filter(|line| line.starts_with("is descriptor")) {
            let (_, target) = line.split_once(": ").unwrap();
            let known = ["/memfd:", "pipe:", "socket:"];
            let fine = known.iter().any(|start| target.starts_with(start));
            assert!(
                fine || ["/dev/null", "gone"].contains(&target),
                "{behind:?}: {line}"
            );
        }
    }
}

#[tokio::test]
async fn it_cannot_gain_privileges_or_see_other_processes() {
    for behind in ALL {
        let Some(mut place) = Place::new(behind) else {
            return;
        };
        place.plan.identity = Some(VmmIdentity {
            uid: NOBODY,
            gid: NOBODY,
            groups: vec![OTHER],
        });
        let said = place_said(behind, &place).await;
        for (name, expected) in [
            ("Uid:", "65534 65534 65534 65534"),
            ("Gid:", "65534 65534 65534 65534"),
            ("Groups:", "65533"),
            ("CapInh:", "0000000000000000"),
            ("CapPrm:", "0000000000000000"),
            ("CapEff:", "0000000000000000"),
            ("CapBnd:", "0000000000000000"),
            ("CapAmb:", "0000000000000000"),
            ("NoNewPrivs:", "1"),
            ("Seccomp:", "2"),
            ("NSpid:", "1"),
        ] {
            assert_eq!(fact(&said, name), expected, "{behind:?} {name}");
        }
        for what in [
            "become root",
            "make a user namespace",
            "mount",
            "change the root",
            "have new privileges",
        ] {
            let start = format!("no {what}: ");
            assert!(
                said.iter().any(|line| line.starts_with(&start)),
                "{what}: {said:#?}"
            );
        }
        let found = said.iter().filter(|line| line.contains("process ")).count();
        assert_eq!(found, 4, "two of each of two processes: {said:#?}");
        assert!(!said.iter().any(|line| line.starts_with("yes find process")));
        assert!(!said.iter().any(|line| line.starts_with("yes look at process")));
        // Its own process is all that its /proc has.
        assert_eq!(fact(&said, "/proc:"), "1 self thread-self", "{behind:?}");
    }
}

#[tokio::test]
async fn it_has_no_network_but_its_tap() {
    for behind in ALL {
        for with_tap in [false, true] {
            let Some(mut place) = Place::new(behind) else {
                return;
            };
            let name = format!("ost-{:.11}", place.plan.vm);
            let tap = with_tap.then(|| tap::create(&name));
            let tap = match tap.transpose() {
                Ok(tap) => tap,
                Err(error) => {
                    skipped(&format!("no TAP can be made: {error}"));
                    continue;
                }
            };
            if let Some(tap) = tap {
                let slot = TapSlot::default();
                slot.fill(tap);
                place.plan.nets.push(NetPlan {
                    backend: NetBackend::TapFd(slot),
                    mac: Mac([2, 0, 0, 0, 0, 1]),
                });
            }
            let said = place_said(behind, &place).await;
            if with_tap && behind == Behind::Firecracker {
                // It was made to stay for the VMM, which did not take it.
                let left = tap::open(&name).unwrap();
                tap::set_persistent(std::os::fd::AsFd::as_fd(&left), false).unwrap();
            }
            for family in ["IPv4", "IPv6", "netlink", "packet", "vsock"] {
                let start = format!("no make a socket of {family}: ");
                assert!(
                    said.iter().any(|line| line.starts_with(&start)),
                    "{behind:?} {start}"
                );
            }
            assert!(
                !said.iter().any(|line| line.starts_with("yes make a socket of")),
                "{said:#?}"
            );
            let connect = "no connect to a socket of the host: ";
            assert!(
                said.iter().any(|line| line.starts_with(connect)),
                "{behind:?}: {said:#?}"
            );
            let interfaces = fact(&said, "interfaces:");
            match behind {
                // It opens the TAP itself, where it is.
                Behind::Firecracker if with_tap => assert!(interfaces.contains(&name), "{interfaces}"),
                Behind::CloudHypervisor if with_tap => assert_eq!(interfaces, format!("lo {name}")),
                _ => assert_eq!(interfaces, "lo", "{behind:?}"),
            }
        }
    }
}

/// What was said, without an earlier run's folder in the way.
async fn place_said(behind: Behind, place: &Place) -> Vec<String> {
    let said = behind.said(place).await;
    let left: Vec<_> = std::fs::read_dir(&place.plan.run_dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "left in the run folder: {left:?}");
    // Its mounts were its own.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&place.folder.display().to_string()), "{mounts}");
    said
}

fn fact(said: &[String], name: &str) -> String {
    let start = format!("is {name} ");
    let line = said.iter().find(|line| line.starts_with(&start));
    line.unwrap_or_else(|| panic!("no {name} in {said:#?}"))[start.len()..].to_owned()
}
