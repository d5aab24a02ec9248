//! What every VMM must do that is not QEMU, asked of real Cloud Hypervisor and Firecracker, where they are, and of their
//! fakes.

use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_agent_proto::client::AgentClient;
use offshoot_fake_vmm::Behaviour;
use offshoot_model::{ByteSize, ErrorKind, Explain, Mac, VmId};
use offshoot_sys::memory_file;
use offshoot_sys::process::{Exit, PidFd, Signal};
use offshoot_sys::tap;
use offshoot_vmm::cloud_hypervisor::{CloudHypervisorConfig, CloudHypervisorDriver};
use offshoot_vmm::firecracker::{FirecrackerConfig, FirecrackerDriver};
use offshoot_vmm::plan::{
    Accel, AgentChannel, ConsoleDevice, DiskPlan, LaunchPlan, NetBackend, NetPlan, Origin, SavedGuest,
    TapSlot, VmmIdentity,
};
use offshoot_vmm::{
    AgentEndpoint, Driver, ExitCause, LaunchError, Machine, MachineError, MachineState, MachineStatus,
    ReopenError, VmmFeature,
};

use crate::guest::{KvmEnd, kvm_kernel};
use crate::rig::{DISK, DISK_SIZE, HELLO};

const NOBODY: u32 = 65534;

/// Which VMM stands behind the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vmm {
    CloudHypervisor,
    Firecracker,
    FakeCloudHypervisor,
    FakeFirecracker,
}

impl Vmm {
    pub(crate) fn is_fake(self) -> bool {
        matches!(self, Self::FakeCloudHypervisor | Self::FakeFirecracker)
    }

    pub(crate) fn is_firecracker(self) -> bool {
        matches!(self, Self::Firecracker | Self::FakeFirecracker)
    }

    /// Where its program is.
    fn program(self) -> Option<PathBuf> {
        let installed = |variable: &str, name: &str| {
            let named = std::env::var_os(variable).filter(|path| !path.is_empty());
            named
                .map(PathBuf::from)
                .or_else(|| offshoot_sys::programs::find(name))
        };
        match self {
            Self::CloudHypervisor => installed("OFFSHOOT_CLOUD_HYPERVISOR", "cloud-hypervisor"),
            Self::Firecracker => installed("OFFSHOOT_FIRECRACKER", "firecracker"),
            Self::FakeCloudHypervisor => Some(env!("CARGO_BIN_EXE_offshoot-fake-cloud-hypervisor").into()),
            Self::FakeFirecracker => Some(env!("CARGO_BIN_EXE_offshoot-fake-firecracker").into()),
        }
    }
}

/// How its guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Idle,
    PowerOff,
    Reset,
}

pub(crate) struct Rig {
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) plan: LaunchPlan,
    pub(crate) folder: PathBuf,
    launched: std::sync::Mutex<Vec<u32>>,
    _folder: tempfile::TempDir,
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// Who a VMM can become so that it may still open `/dev/kvm`; `None` as somebody who is not root, an error where it is
/// closed to everybody else.
fn identity(vmm: Vmm) -> Result<Option<VmmIdentity>, String> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let mut groups = Vec::new();
    if !vmm.is_fake() {
        let meta = std::fs::metadata("/dev/kvm").map_err(|error| format!("/dev/kvm: {error}"))?;
        if meta.mode() & 0o006 != 0o006 {
            if meta.mode() & 0o060 != 0o060 || meta.gid() == 0 {
                return Err("/dev/kvm is closed to unprivileged VMMs".into());
            }
            groups.push(meta.gid());
        }
    }
    Ok(Some(VmmIdentity {
        uid: NOBODY,
        gid: NOBODY,
        groups,
    }))
}

impl Rig {
    /// `None`, and a word about it, where the VMM cannot be tried.
    pub(crate) fn new(vmm: Vmm, end: End) -> Option<Self> {
        let behaviour = match end {
            End::Idle => format!("console={HELLO}"),
            End::PowerOff | End::Reset => format!("console={HELLO} power-off-after-ms=100"),
        };
        Self::with_behaviour(vmm, end, &behaviour)
    }

    pub(crate) fn with_behaviour(vmm: Vmm, end: End, behaviour: &str) -> Option<Self> {
        let Some(program) = vmm.program() else {
            skipped(&format!("there is no {vmm:?}"));
            return None;
        };
        let identity = match identity(vmm) {
            Ok(identity) => identity,
            Err(why) => {
                skipped(&why);
                return None;
            }
        };
        let env = vec![(Behaviour::VARIABLE.to_owned(), behaviour.to_owned())];
        let patience = Duration::from_secs(if vmm.is_fake() { 2 } else { 10 });
        let driver: Box<dyn Driver> = if vmm.is_firecracker() {
            Box::new(FirecrackerDriver::new(FirecrackerConfig {
                program,
                env,
                files: Vec::new(),
                patience,
            }))
        } else {
            Box::new(CloudHypervisorDriver::new(CloudHypervisorConfig {
                program,
                env,
                files: Vec::new(),
                patience,
            }))
        };
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().to_owned();
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).unwrap();
        let run_dir = folder.join("run");
        std::fs::create_dir(&run_dir).unwrap();
        let kernel = folder.join("vmlinux,with=comma");
        // Both reset by the keyboard controller; Cloud Hypervisor switches off by ACPI's sleep port, Firecracker cannot.
        let kvm_end = match (end, vmm.is_firecracker()) {
            (End::Idle, _) => KvmEnd::Idle,
            (End::PowerOff, false) => KvmEnd::Port(0x600, 0x20 | (5 << 2)),
            (End::PowerOff | End::Reset, _) => KvmEnd::Port(0x64, 0xfe),
        };
        std::fs::write(&kernel, kvm_kernel(HELLO, kvm_end)).unwrap();
        let disk = folder.join("disk,with=comma");
        let file = std::fs::File::create(&disk).unwrap();
        file.set_len(DISK_SIZE.bytes()).unwrap();
        if identity.is_some() {
            std::os::unix::fs::chown(&disk, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let plan = LaunchPlan {
            origin: Origin::Kernel,
            vm: VmId::from_bytes(&RandomState::new().hash_one(&folder).to_le_bytes()),
            log: folder.join("vmm.log"),
            console: folder.join("console.log"),
            run_dir,
            cpus: 1,
            memory: ByteSize::from_mib(32),
            accel: Accel::Kvm,
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
            agent: AgentChannel::HybridVsock {
                cid: 3,
                port: AgentChannel::VSOCK_PORT,
            },
            identity,
            cgroups: Vec::new(),
        };
        Some(Self {
            driver,
            plan,
            folder,
            launched: std::sync::Mutex::default(),
            _folder: temp,
        })
    }

    /// Launches the VM; a failure shows the VMM's own words.
    pub(crate) async fn launch(&self) -> Box<dyn Machine> {
        self.launch_as(&self.plan).await
    }

    /// The same with another plan.
    async fn launch_as(&self, plan: &LaunchPlan) -> Box<dyn Machine> {
        let log = || std::fs::read_to_string(&plan.log).unwrap_or_default();
        let launched = self.driver.launch(plan).await;
        let machine = launched.unwrap_or_else(|error| panic!("{error}; {error:?}; {}", log()));
        self.remember(machine.state().process.pid);
        machine
    }

    fn remember(&self, pid: u32) {
        self.launched.lock().unwrap().push(pid);
    }

    /// Fails the test when a process, a zombie or a file of this VM is left.
    pub(crate) async fn assert_nothing_left(&self) {
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
        let entries = std::fs::read_dir(&self.plan.run_dir).unwrap();
        let files: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        assert!(files.is_empty(), "left in the run folder: {files:?}");
    }

    /// Processes that name this VM's folder or id in their arguments.
    fn processes(&self) -> Vec<PathBuf> {
        let names = [
            self.folder.display().to_string(),
            format!("offshoot-{}", self.plan.vm),
        ];
        let names_us = |path: &Path| {
            let args = std::fs::read(path.join("cmdline")).unwrap_or_default();
            let args = String::from_utf8_lossy(&args).into_owned();
            names.iter().any(|name| args.contains(name))
        };
        let all = std::fs::read_dir("/proc").unwrap();
        let all = all.filter_map(|entry| Some(entry.ok()?.path()));
        all.filter(|path| names_us(path)).collect()
    }
}

/// Makes one test per VMM from each function of the contract.
macro_rules! contract {
    ($($name:ident($end:ident);)*) => {
        contract!(@on on_cloud_hypervisor CloudHypervisor: $($name($end);)*);
        contract!(@on on_firecracker Firecracker: $($name($end);)*);
        contract!(@on on_the_fake_cloud_hypervisor FakeCloudHypervisor: $($name($end);)*);
        contract!(@on on_the_fake_firecracker FakeFirecracker: $($name($end);)*);
    };
    (@on $module:ident $vmm:ident: $($name:ident($end:ident);)*) => {
        mod $module {
            $(#[tokio::test]
            async fn $name() {
                let Some(rig) = super::Rig::new(super::Vmm::$vmm, super::End::$end) else { return };
                super::$name(&rig, super::Vmm::$vmm).await;
                rig.assert_nothing_left().await;
            })*
        }
    };
}

contract! {
    it_says_what_it_can_do(Idle);
    it_pauses_resumes_and_quits(Idle);
    it_is_killed(Idle);
    it_is_found_again_after_its_handle_was_dropped(Idle);
    a_crash_is_noticed(Idle);
    a_guest_that_switches_itself_off_is_noticed_and_its_last_words_kept(PowerOff);
    a_guest_that_resets_is_not_started_again(Reset);
    a_launch_that_fails_says_why_in_the_vmms_words(Idle);
    a_launch_that_is_given_up_leaves_nothing(Idle);
    a_disk_grows_and_never_shrinks(Idle);
    the_console_is_kept(Idle);
    the_agents_socket_is_the_vmms_own(Idle);
    a_saved_guest_goes_on_in_others(Idle);
    what_was_saved_by_nobody_is_refused(Idle);
    what_the_process_gets_is_no_more_than_it_needs(Idle);
    a_tap_ends_with_its_vmm(Idle);
}

async fn it_says_what_it_can_do(rig: &Rig, vmm: Vmm) {
    let facts = rig.driver.probe().await.unwrap();
    let kind = if vmm.is_firecracker() {
        "firecracker"
    } else {
        "cloud-hypervisor"
    };
    assert_eq!((facts.kind.as_str(), rig.driver.kind()), (kind, kind));
    assert!(
        facts.version.starts_with(|c: char| c.is_ascii_digit()),
        "{}",
        facts.version
    );
    let has = |feature| facts.features.contains(&feature);
    assert!(has(VmmFeature::Kvm) && has(VmmFeature::HybridVsock) && has(VmmFeature::ResizeDisk));
    assert!(!has(VmmFeature::Tcg) && !has(VmmFeature::VirtioSerial));
    assert_eq!(has(VmmFeature::Virtiofs), !vmm.is_firecracker());
}

async fn it_pauses_resumes_and_quits(rig: &Rig, vmm: Vmm) {
    let machine = rig.launch().await;
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
    for _ in 0..2 {
        machine.pause().await.unwrap();
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Paused);
    }
    for _ in 0..2 {
        machine.resume().await.unwrap();
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
    }
    machine.power_button().await.unwrap();
    machine.quit().await.unwrap();
    let exit = machine.wait_exit().await;
    assert_eq!(exit.cause, ExitCause::Quit);
    if !vmm.is_firecracker() {
        assert_eq!(exit.process, Some(Exit::Code(0)));
    }
    rig.assert_nothing_left().await;
    // Asked again, it is still gone.
    machine.quit().await.unwrap();
    machine.kill().await.unwrap();
    assert!(matches!(machine.pause().await, Err(MachineError::Gone)));
}

async fn it_is_killed(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let (killed, exit) = tokio::join!(machine.kill(), machine.wait_exit());
    killed.unwrap();
    assert_eq!(
        (exit.cause, exit.process),
        (ExitCause::Killed, Some(Exit::Signal(9)))
    );
}

async fn it_is_found_again_after_its_handle_was_dropped(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let state = machine.state().clone();
    assert_eq!(
        MachineState::load(&rig.plan.run_dir).unwrap().as_ref(),
        Some(&state)
    );
    machine.pause().await.unwrap();
    drop(machine);
    let stored = serde_json::to_string(&state).unwrap();
    let stored: MachineState = serde_json::from_str(&stored).unwrap();
    for _ in 0..3 {
        let again = rig.driver.reopen(&stored).await.unwrap().expect("it runs");
        assert_eq!(again.state(), &state);
        assert_eq!(again.status().await.unwrap(), MachineStatus::Paused);
    }
    let again = rig.driver.reopen(&stored).await.unwrap().expect("it runs");
    again.resume().await.unwrap();
    assert_eq!(again.status().await.unwrap(), MachineStatus::Running);
    assert_eq!(again.console_tail(100).await.unwrap(), HELLO.as_bytes());
    again.kill().await.unwrap();
    assert_eq!(again.wait_exit().await.cause, ExitCause::Killed);
    rig.assert_nothing_left().await;
    assert!(rig.driver.reopen(&stored).await.unwrap().is_none());
    let foreign = MachineState {
        driver: "another".into(),
        ..stored
    };
    assert!(matches!(
        rig.driver.reopen(&foreign).await,
        Err(ReopenError::Driver { .. })
    ));
}

async fn a_crash_is_noticed(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let process = PidFd::open(&machine.state().process).unwrap().unwrap();
    process.send_signal(Signal::KILL).unwrap();
    let exit = machine.wait_exit().await;
    assert_eq!(
        (exit.cause, exit.process),
        (ExitCause::Died, Some(Exit::Signal(9)))
    );
    assert!(matches!(machine.status().await, Err(MachineError::Gone)));
    rig.assert_nothing_left().await;

    // And when nobody looked: its files are still there until somebody does.
    let machine = rig.launch().await;
    let state = machine.state().clone();
    drop(machine);
    let process = PidFd::open(&state.process).unwrap().unwrap();
    process.send_signal(Signal::KILL).unwrap();
    process.wait_exit().await;
    assert!(state.run_dir.join("own").exists());
    assert!(rig.driver.reopen(&state).await.unwrap().is_none());
}

async fn a_guest_that_switches_itself_off_is_noticed_and_its_last_words_kept(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    assert_eq!(machine.wait_exit().await.cause, ExitCause::GuestPowerOff);
    assert_eq!(machine.console_tail(100).await.unwrap(), HELLO.as_bytes());
    assert_eq!(std::fs::read(&rig.plan.console).unwrap(), HELLO.as_bytes());
}

async fn a_guest_that_resets_is_not_started_again(rig: &Rig, vmm: Vmm) {
    let machine = rig.launch().await;
    let expected = match vmm {
        Vmm::CloudHypervisor => ExitCause::GuestReset,
        // It knows no other end; and a fake's guest switches itself off.
        _ => ExitCause::GuestPowerOff,
    };
    assert_eq!(machine.wait_exit().await.cause, expected);
}

async fn a_launch_that_fails_says_why_in_the_vmms_words(rig: &Rig, vmm: Vmm) {
    std::fs::write(&rig.plan.log, "words of an earlier run\n").unwrap();
    let mut plan = rig.plan.clone();
    plan.kernel = rig.folder.join("no-such-kernel");
    for _ in 0..2 {
        let error = rig.driver.launch(&plan).await.err().expect("there is no kernel");
        let said = match &error {
            LaunchError::Exited { said, .. } if !vmm.is_firecracker() => said,
            LaunchError::Refused { said, .. } if vmm.is_firecracker() => said,
            _ => panic!("{error:?}"),
        };
        assert!(said.contains("No such file"), "{said}");
        assert!(!said.contains("earlier run") && !said.contains('\n'), "{said}");
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(error.hints()[0].contains("vmm.log"));
        rig.assert_nothing_left().await;
    }
    plan.cpus = 0;
    assert!(matches!(
        rig.driver.launch(&plan).await,
        Err(LaunchError::Plan { .. })
    ));
    plan = rig.plan.clone();
    plan.accel = Accel::Tcg;
    assert!(matches!(
        rig.driver.launch(&plan).await,
        Err(LaunchError::Unsupported { .. })
    ));
    plan = rig.plan.clone();
    plan.run_dir = rig.folder.join("no-such-folder");
    assert!(matches!(
        rig.driver.launch(&plan).await,
        Err(LaunchError::Prepare { .. })
    ));
}

async fn a_launch_that_is_given_up_leaves_nothing(rig: &Rig, _: Vmm) {
    rig.driver.probe().await.unwrap();
    {
        let mut launch = rig.driver.launch(&rig.plan);
        // Up to its first wait: the process has been made.
        let first =
            std::future::poll_fn(|context| std::task::Poll::Ready(launch.as_mut().poll(context))).await;
        assert!(first.is_pending());
        let state = MachineState::load(&rig.plan.run_dir)
            .unwrap()
            .expect("it is recorded");
        rig.remember(state.process.pid);
    }
}

async fn a_disk_grows_and_never_shrinks(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let length = || std::fs::metadata(&rig.plan.disks[0].path).unwrap().len();
    let grown = ByteSize::from_mib(8);
    machine.resize_disk(DISK, grown).await.unwrap();
    assert_eq!(length(), grown.bytes());
    machine.resize_disk(DISK, grown).await.unwrap();
    let error = machine.resize_disk(DISK, DISK_SIZE).await.unwrap_err();
    assert!(matches!(error, MachineError::Shrink { .. }), "{error:?}");
    let error = machine.resize_disk("other", grown).await.unwrap_err();
    assert!(matches!(error, MachineError::NoDisk { .. }), "{error:?}");
    assert_eq!(length(), grown.bytes());
    machine.quit().await.unwrap();
}

async fn the_console_is_kept(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    // The guest needs a moment to speak; what is waited for is its words.
    while machine.console_tail(100).await.unwrap() != HELLO.as_bytes() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(machine.console_tail(7).await.unwrap(), b"console");
    assert_eq!(std::fs::read(&rig.plan.console).unwrap(), HELLO.as_bytes());
    machine.kill().await.unwrap();
    assert_eq!(
        machine.console_tail(7).await.unwrap(),
        b"console",
        "the log outlives the process"
    );
}

async fn the_agents_socket_is_the_vmms_own(rig: &Rig, vmm: Vmm) {
    let machine = rig.launch().await;
    let AgentEndpoint::HybridVsock { path, port } = machine.agent_endpoint() else {
        panic!("not over vsock")
    };
    let pid = machine.state().process.pid;
    let connect = AgentClient::connect_hybrid_vsock(path, *port, Some(pid));
    if vmm.is_fake() {
        let hello = connect.await.unwrap().hello().await.unwrap();
        assert_eq!(hello.vm_id, "");
    } else {
        // A guest of a few bytes has no agent: nobody answers, and nothing breaks.
        let waited = tokio::time::timeout(Duration::from_millis(300), connect).await;
        assert!(waited.is_err(), "{waited:?}");
    }
    let stranger = AgentClient::connect_hybrid_vsock(path, *port, Some(pid + 1)).await;
    assert!(stranger.is_err(), "whoever made the socket is looked at");
    machine.quit().await.unwrap();
}

/// Opened by us in a namespace that the VMM does not see, or by the VMM where it is.
async fn a_tap_ends_with_its_vmm(rig: &Rig, vmm: Vmm) {
    if vmm.is_fake() || rig.plan.identity.is_none() {
        skipped("needs root, and a VMM that opens its TAP");
        return;
    }
    let name = format!("ost-{:.11}", rig.plan.vm);
    let open = match tap::create(&name) {
        Ok(open) => open,
        Err(error) => {
            skipped(&format!("no TAP can be made: {error}"));
            return;
        }
    };
    let interface = PathBuf::from("/sys/class/net").join(&name);
    let mut plan = rig.plan.clone();
    let slot = TapSlot::default();
    slot.fill(open);
    plan.nets.push(NetPlan {
        backend: NetBackend::TapFd(slot),
        mac: Mac([2, 0, 0, 0, 0, 1]),
    });
    let machine = rig.driver.launch(&plan).await.unwrap();
    assert!(interface.exists());
    machine.kill().await.unwrap();
    let start = Instant::now();
    while interface.exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "{name} is left");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Another VM of the same shape.
fn another(rig: &Rig, name: &str, origin: Origin) -> LaunchPlan {
    let folder = rig.folder.join(name);
    std::fs::create_dir_all(folder.join("run")).unwrap();
    let disk = folder.join("disk");
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(DISK_SIZE.bytes()).unwrap();
    if let Some(who) = &rig.plan.identity {
        std::os::unix::fs::chown(&disk, Some(who.uid), Some(who.gid)).unwrap();
    }
    let mut plan = rig.plan.clone();
    plan.vm = VmId::from_bytes(&RandomState::new().hash_one(&folder).to_le_bytes());
    (plan.run_dir, plan.log) = (folder.join("run"), folder.join("vmm.log"));
    plan.console = folder.join("console.log");
    plan.disks[0].path = disk;
    plan.origin = origin;
    plan
}

/// A file as its content, sealed.
fn sealed(content: &[u8]) -> Arc<std::fs::File> {
    let file = memory_file::create("test", content.len() as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, content, 0).unwrap();
    memory_file::seal(&file).unwrap();
    Arc::new(file)
}

async fn a_saved_guest_goes_on_in_others(rig: &Rig, vmm: Vmm) {
    let facts = rig.driver.probe().await.unwrap();
    assert!(facts.features.contains(&VmmFeature::Snapshots));
    let machine = rig.launch().await;
    assert!(machine.snapshots().is_none(), "it was not launched for that");
    machine.kill().await.unwrap();

    let memory = Arc::new(memory_file::create("test", rig.plan.memory.bytes()).unwrap());
    let plan = another(rig, "saved", Origin::KernelInto(Arc::clone(&memory)));
    let machine = rig.launch_as(&plan).await;
    let (state, limit) = (rig.folder.join("state"), ByteSize::from_mib(16));
    let snapshots = machine.snapshots().expect("it was launched for that");
    assert!(snapshots.save(&state, limit).await.is_err(), "it runs");
    let _ = std::fs::remove_file(&state);
    machine.pause().await.unwrap();
    match snapshots.save(&state, limit).await {
        Ok(()) => {}
        // A KVM without nested guests says that it has them and fails (seen of kvm_pvm).
        Err(error) if !vmm.is_fake() && format!("{error:?}").contains("GetNestedState") => {
            skipped("this KVM cannot tell the state of nested guests");
            return machine.kill().await.unwrap();
        }
        Err(error) => panic!("{error:?}"),
    }
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Paused);
    machine.kill().await.unwrap();
    let mut pages = 0;
    memory_file::for_each_page(&memory, |_, _| {
        pages += 1;
        Ok(())
    })
    .unwrap();
    assert!(pages > 0, "there is nothing in its memory");
    memory_file::seal(&*memory).unwrap();

    let state = sealed(&std::fs::read(state).unwrap());
    let saved = || {
        Origin::Template(SavedGuest {
            memory: Arc::clone(&memory),
            state: Arc::clone(&state),
            disks: vec![(DISK.into(), DISK_SIZE)],
        })
    };
    let shape = rig.driver.shape(&rig.plan).await.unwrap();
    assert!(shape.is_some());
    let mut machines = Vec::new();
    for name in ["a", "b"] {
        let plan = another(rig, name, saved());
        assert_eq!(rig.driver.shape(&plan).await.unwrap(), shape);
        let machine = rig.launch_as(&plan).await;
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Paused);
        // As long as it stands, it may learn of a larger disk.
        machine.resize_disk(DISK, ByteSize::from_mib(2)).await.unwrap();
        machine.resume().await.unwrap();
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
        machines.push((plan, machine));
    }
    for (plan, machine) in machines {
        let (pid, own) = (machine.state().process.pid, plan.run_dir.join("own"));
        let AgentEndpoint::HybridVsock { path, port } = machine.agent_endpoint() else {
            panic!("not over vsock")
        };
        assert!(path.starts_with(&own) && path.exists(), "{}", path.display());
        if vmm.is_fake() {
            let agent = AgentClient::connect_hybrid_vsock(path, *port, Some(pid)).await;
            agent.unwrap().hello().await.unwrap();
        } else {
            // The memory is nobody's copy: what is mapped is the one file, privately.
            let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
            let mut mapped = maps.lines().filter(|line| line.contains("/memfd:test"));
            assert!(mapped.any(|line| line.contains(" rw-p ")), "{maps}");
        }
        machine.quit().await.unwrap();
        let left: Vec<_> = std::fs::read_dir(&plan.run_dir).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

async fn what_was_saved_by_nobody_is_refused(rig: &Rig, _: Vmm) {
    let rubbish = Origin::Template(SavedGuest {
        memory: sealed(&vec![1; 32 << 20]),
        state: sealed(b"rubbish"),
        disks: Vec::new(),
    });
    let plan = another(rig, "a", rubbish);
    let error = rig.driver.launch(&plan).await.err().expect("it is none");
    assert!(
        matches!(error, LaunchError::Restore { .. } | LaunchError::Prepare { .. }),
        "{error:?}"
    );
    let left: Vec<_> = std::fs::read_dir(&plan.run_dir).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

async fn what_the_process_gets_is_no_more_than_it_needs(rig: &Rig, vmm: Vmm) {
    let Some(identity) = &rig.plan.identity else {
        skipped("needs root");
        return;
    };
    let machine = rig.launch().await;
    let pid = machine.state().process.pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name}"));
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    assert_eq!(field("Uid"), "65534\t65534\t65534\t65534");
    let groups: Vec<_> = identity.groups.iter().map(u32::to_string).collect();
    assert_eq!(field("Groups"), groups.join(" "));
    assert_eq!(field("CapEff"), "0000000000000000");
    assert_eq!(field("NoNewPrivs"), "1");
    if vmm == Vmm::CloudHypervisor {
        // Its filters are its threads', one kind each; the first thread only waits for them.
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let statuses =
            tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
        let filtered = statuses.filter(|status| status.contains("Seccomp:\t2")).count();
        assert!(filtered >= 3, "{filtered} threads with a filter");
    }
    // Nothing of ours is open in it but what it was given.
    let mut open = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap_or_default();
        let target = target.display().to_string();
        open += 1;
        let ours = std::env::temp_dir().display().to_string();
        if target.starts_with(&ours) {
            assert!(target.starts_with(&rig.folder.display().to_string()), "{target}");
        }
    }
    assert!(open > 3, "{open}");
    machine.quit().await.unwrap();
}
