//! One VM's surroundings for a test: folder, kernel, disk, plan, driver; and the search for what a test leaves behind.

use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use offshoot_fake_vmm::Behaviour;
use offshoot_model::{ByteSize, VmId};
use offshoot_sys::process::Exit;
use offshoot_vmm::plan::{Accel, AgentChannel, ConsoleDevice, DiskPlan, LaunchPlan, Origin, VmmIdentity};
use offshoot_vmm::qemu::{QemuConfig, QemuDriver};
use offshoot_vmm::{Driver, Machine};

use crate::guest::{self, End};

/// Which VMM stands behind the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vmm {
    Qemu,
    Fake,
}

pub(crate) const HELLO: &str = "hello,console";
pub(crate) const DISK: &str = "data";
pub(crate) const DISK_SIZE: ByteSize = ByteSize::from_mib(1);
const NOBODY: u32 = 65534;

/// Whether a process ended by `abort(3)`. The first process of a namespace ignores its own SIGABRT, and the C library then has it
/// run into what no program may do.
pub(crate) fn aborted(exit: Option<Exit>) -> bool {
    matches!(exit, Some(Exit::Signal(6 | 11)))
}

pub(crate) struct Rig {
    pub(crate) driver: QemuDriver,
    pub(crate) plan: LaunchPlan,
    pub(crate) folder: PathBuf,
    launched: Mutex<Vec<u32>>,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// `None`, and a word about it, when the VMM is not installed.
    pub(crate) fn new(vmm: Vmm, end: End) -> Option<Self> {
        let behaviour = match end {
            End::Idle => format!("console={HELLO}"),
            // A fake guest has no processor that could reset.
            End::PowerOff | End::Reset => format!("console={HELLO} power-off-after-ms=100"),
        };
        Self::with_behaviour(vmm, end, &behaviour)
    }

    pub(crate) fn with_behaviour(vmm: Vmm, end: End, behaviour: &str) -> Option<Self> {
        let config = match vmm {
            Vmm::Qemu => QemuConfig::default(),
            Vmm::Fake => QemuConfig {
                program: env!("CARGO_BIN_EXE_offshoot-fake-vmm").into(),
                env: vec![(Behaviour::VARIABLE.into(), behaviour.into())],
                files: Vec::new(),
                patience: Duration::from_secs(2),
            },
        };
        if !config.program.exists() {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED: {} is not installed", config.program.display());
            }
            return None;
        }
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().to_owned();
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).unwrap();
        let run_dir = folder.join("run");
        std::fs::create_dir(&run_dir).unwrap();
        let kernel = folder.join("vmlinux,with=comma");
        std::fs::write(&kernel, guest::kernel(HELLO, end)).unwrap();
        let disk = folder.join("disk,with=comma");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(DISK_SIZE.bytes())
            .unwrap();
        // Only root can become somebody else.
        let am_root = rustix::process::geteuid().is_root();
        let identity = am_root.then(|| VmmIdentity {
            uid: NOBODY,
            gid: NOBODY,
            groups: Vec::new(),
        });
        if am_root {
            std::os::unix::fs::chown(&disk, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let plan = LaunchPlan {
            vm: VmId::from_bytes(&RandomState::new().hash_one(&folder).to_le_bytes()),
            log: folder.join("vmm.log"),
            console: folder.join("console.log"),
            run_dir,
            cpus: 2,
            memory: ByteSize::from_mib(32),
            accel: Accel::Tcg,
            kernel,
            initramfs: None,
            cmdline: vec!["console=ttyS0".into(), "x=a,b".into()],
            console_device: ConsoleDevice::Serial,
            disks: vec![DiskPlan {
                serial: DISK.into(),
                path: disk,
                read_only: false,
            }],
            pmems: Vec::new(),
            shares: Vec::new(),
            nets: Vec::new(),
            agent: AgentChannel::VirtioSerial,
            identity,
            origin: Origin::Kernel,
            cgroups: Vec::new(),
        };
        Some(Self {
            driver: QemuDriver::new(config),
            plan,
            folder,
            launched: Mutex::default(),
            _folder: temp,
        })
    }

    /// Launches the VM; a failure shows QEMU's own words.
    pub(crate) async fn launch(&self) -> Box<dyn Machine> {
        let log = || std::fs::read_to_string(&self.plan.log).unwrap_or_default();
        let machine = self
            .driver
            .launch(&self.plan)
            .await
            .unwrap_or_else(|e| panic!("{e}; {}", log()));
        self.remember(machine.state().process.pid);
        machine
    }

    /// Adds a process to those that must be gone in the end.
    pub(crate) fn remember(&self, pid: u32) {
        self.launched.lock().unwrap().push(pid);
    }

    /// Fails the test when a process, a zombie or a socket of this VM is left.
    pub(crate) async fn assert_nothing_left(&self) {
        // A process that is gone for its handle may have to be reaped yet.
        let start = Instant::now();
        let launched = std::mem::take(&mut *self.launched.lock().unwrap());
        for process in launched.iter().map(|pid| PathBuf::from(format!("/proc/{pid}"))) {
            while process.exists() {
                assert!(
                    start.elapsed() < Duration::from_secs(20),
                    "{} is left",
                    process.display()
                );
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        assert_eq!(self.processes(), Vec::<PathBuf>::new(), "processes are left");
        let files: Vec<_> = std::fs::read_dir(&self.plan.run_dir)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(files.is_empty(), "left in the run folder: {files:?}");
    }

    /// Processes, zombies excepted, that name this VM in their arguments.
    fn processes(&self) -> Vec<PathBuf> {
        let name = format!("offshoot-{}", self.plan.vm);
        let names_us = |path: &Path| {
            let args = std::fs::read(path.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&args).contains(&name)
        };
        let all = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| Some(entry.ok()?.path()));
        all.filter(|path| names_us(path)).collect()
    }
}
