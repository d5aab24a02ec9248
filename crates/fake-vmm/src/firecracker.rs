//! A Firecracker without a processor: the real one's arguments and API, with its order and its phases.
//!
//! ```text
//! not started ─┬─ PUT of each part, any order, again as often as one likes ──► InstanceStart ──► running ◄─► paused
//!              └─ PUT /snapshot/load ───────────────────────────────────────────────────────────────────────► paused
//! ```
//!
//! Bodies are read as strictly as the real one reads them: unknown fields are an error.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{Notify, mpsc};

use crate::api::{self, Answer, Api};
use crate::guest::Guest;
use crate::machine::{End, Machine};
use crate::{Behaviour, after, vsock};

/// What it says to `--version`.
pub const VERSION: &str = "Firecracker v1.16.1\n\n";

const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineConfig {
    vcpu_count: u8,
    mem_size_mib: usize,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct BootSource {
    kernel_image_path: PathBuf,
    initrd_path: Option<PathBuf>,
    boot_args: Option<String>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Drive {
    drive_id: String,
    path_on_host: PathBuf,
    is_root_device: bool,
    #[serde(default)]
    is_read_only: bool,
    cache_type: Option<CacheType>,
}

#[derive(Clone, Copy, Deserialize, Serialize)]
enum CacheType {
    Unsafe,
    Writeback,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DrivePath {
    drive_id: String,
    path_on_host: PathBuf,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Pmem {
    id: String,
    path_on_host: PathBuf,
    #[serde(default)]
    root_device: bool,
    #[serde(default)]
    read_only: bool,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct NetworkInterface {
    iface_id: String,
    host_dev_name: String,
    guest_mac: Option<String>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Vsock {
    guest_cid: u32,
    uds_path: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Balloon {
    amount_mib: u32,
    deflate_on_oom: bool,
    #[serde(default)]
    free_page_reporting: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entropy {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    InstanceStart,
    SendCtrlAltDel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    state: VmState,
}

#[derive(Deserialize)]
enum VmState {
    Paused,
    Resumed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotCreate {
    snapshot_type: SnapshotType,
    snapshot_path: PathBuf,
    mem_file_path: PathBuf,
}

#[derive(Deserialize)]
enum SnapshotType {
    Full,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotLoad {
    snapshot_path: PathBuf,
    mem_backend: MemoryBackend,
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    #[serde(default)]
    resume_vm: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryBackend {
    backend_type: MemoryBackendType,
    backend_path: PathBuf,
}

#[derive(Deserialize)]
enum MemoryBackendType {
    File,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkOverride {
    iface_id: String,
    host_dev_name: String,
}

/// What the guest's memory begins with in a memory file.
const MEMORY: &[u8] = b"the memory of a fake guest";

/// What is saved of a machine: everything that it was told.
#[derive(Clone, Default, Deserialize, Serialize)]
struct Told {
    memory_mib: usize,
    boot: Option<BootSource>,
    drives: Vec<Drive>,
    pmems: Vec<Pmem>,
    nets: Vec<NetworkInterface>,
    vsock: Option<Vsock>,
}

/// The machine as it was put together so far.
#[derive(Default)]
struct Parts {
    told: Told,
    vsock: Option<UnixListener>,
    /// There once the guest was started.
    running: Option<(Arc<Machine>, Arc<Guest>)>,
}

struct Firecracker {
    id: String,
    parts: Mutex<Parts>,
    started: Notify,
}

impl Firecracker {
    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, method: &Method, path: &str, body: Option<Value>) -> Result<Option<Value>, String> {
        let mut parts = self.parts();
        let mut segments = path.trim_matches('/').splitn(2, '/');
        let (kind, id) = (segments.next().unwrap_or_default(), segments.next());
        match (method.as_str(), kind) {
            ("GET", "") => {
                let state = match &parts.running {
                    None => "Not started",
                    Some((machine, _)) if machine.is_running() => "Running",
                    Some(_) => "Paused",
                };
                Ok(Some(json!({
                    "id": self.id, "state": state, "vmm_version": "1.16.1", "app_name": "Firecracker",
                })))
            }
            ("PUT", "actions") => self.act(&mut parts, read(body)?),
            ("PUT", "snapshot") if id == Some("create") => parts.save(&read(body)?).map(|()| None),
            ("PUT", "snapshot") if id == Some("load") => {
                parts.load(read(body)?)?;
                self.started.notify_one();
                Ok(None)
            }
            ("PUT", _) if parts.running.is_some() => Err(AFTER_START.into()),
            ("PATCH", _) if parts.running.is_none() => Err(BEFORE_START.into()),
            ("PUT", _) => parts.add(kind, id, body).map(|()| None),
            ("PATCH", "vm") => {
                let Vm { state } = read(body)?;
                let (machine, _) = parts.running.as_ref().ok_or(BEFORE_START)?;
                let command = match state {
                    VmState::Paused => "stop",
                    VmState::Resumed => "cont",
                };
                machine.carry_out(command, &Value::Null, false).map(|_| None)
            }
            ("PATCH", "drives") => {
                let drive: DrivePath = read(body)?;
                same(id, &drive.drive_id)?;
                let known = parts
                    .told
                    .drives
                    .iter_mut()
                    .find(|other| other.drive_id == drive.drive_id);
                let known = known.ok_or("The requested block device could not be found.")?;
                opens(&drive.path_on_host, known.is_read_only)?;
                known.path_on_host = drive.path_on_host;
                Ok(None)
            }
            _ => Err(format!("Invalid request method and/or path: {method} {path}.")),
        }
    }

    fn act(&self, parts: &mut Parts, action: Action) -> Result<Option<Value>, String> {
        match (action.action_type, &parts.running) {
            (ActionType::InstanceStart, Some(_)) => Err(AFTER_START.into()),
            (ActionType::SendCtrlAltDel, None) => Err(BEFORE_START.into()),
            (ActionType::SendCtrlAltDel, Some((_, guest))) => {
                guest.power_button();
                Ok(None)
            }
            (ActionType::InstanceStart, None) => {
                parts.make()?;
                self.started.notify_one();
                Ok(None)
            }
        }
    }
}

impl Parts {
    fn add(&mut self, kind: &str, id: Option<&str>, body: Option<Value>) -> Result<(), String> {
        match kind {
            "machine-config" => {
                let machine: MachineConfig = read(body)?;
                if machine.vcpu_count == 0 || machine.vcpu_count > 32 || machine.mem_size_mib == 0 {
                    return Err("The vCPU number is invalid!".into());
                }
                self.told.memory_mib = machine.mem_size_mib;
            }
            "boot-source" => {
                let boot: BootSource = read(body)?;
                for path in [Some(&boot.kernel_image_path), boot.initrd_path.as_ref()]
                    .into_iter()
                    .flatten()
                {
                    opens(path, true)
                        .map_err(|error| format!("The kernel file cannot be opened: {error}"))?;
                }
                self.told.boot = Some(boot);
            }
            "drives" => {
                let drive: Drive = read(body)?;
                same(id, &drive.drive_id)?;
                let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
                if !drive.drive_id.chars().all(word) {
                    return Err(
                        "API Resource IDs can only contain alphanumeric characters and underscores.".into(),
                    );
                }
                if drive.is_root_device || !matches!(drive.cache_type, Some(CacheType::Writeback)) {
                    return Err("this fake is for disks that the agent mounts and that are flushed".into());
                }
                opens(&drive.path_on_host, drive.is_read_only)?;
                self.told.drives.retain(|other| other.drive_id != drive.drive_id);
                self.told.drives.push(drive);
            }
            "pmem" => {
                let pmem: Pmem = read(body)?;
                same(id, &pmem.id)?;
                opens(&pmem.path_on_host, pmem.read_only && !pmem.root_device)?;
                self.told.pmems.push(pmem);
            }
            "network-interfaces" => {
                let net: NetworkInterface = read(body)?;
                same(id, &net.iface_id)?;
                if net.host_dev_name.is_empty() || net.guest_mac.is_none() {
                    return Err("Open tap device failed".into());
                }
                self.told.nets.push(net);
            }
            "vsock" => {
                let device: Vsock = read(body)?;
                if device.guest_cid < 3 {
                    return Err("Invalid guest CID".into());
                }
                self.vsock = Some(bind(&device)?);
                self.told.vsock = Some(device);
            }
            "entropy" => {
                let Entropy {} = read(body)?;
            }
            "balloon" => {
                let balloon: Balloon = read(body)?;
                if balloon.amount_mib != 0 || !balloon.deflate_on_oom || !balloon.free_page_reporting {
                    return Err("this fake is for balloons that take nothing".into());
                }
            }
            _ => return Err(format!("Invalid request method and/or path: PUT {kind}.")),
        }
        Ok(())
    }

    /// Makes the machine, with a guest that runs.
    fn make(&mut self) -> Result<&Arc<Machine>, String> {
        let boot = self.told.boot.as_ref();
        let boot = boot.ok_or("Cannot start microvm without kernel configuration.")?;
        let machine = Arc::new(Machine::new("", self.disks(boot)?));
        let guest = Arc::new(Guest::new(Arc::clone(&machine)));
        Ok(&self.running.insert((machine, guest)).0)
    }

    fn save(&self, create: &SnapshotCreate) -> Result<(), String> {
        let SnapshotType::Full = create.snapshot_type;
        match &self.running {
            None => return Err(BEFORE_START.into()),
            Some((machine, _)) if machine.is_running() => {
                return Err("Cannot save a microVM that is not paused".into());
            }
            Some(_) => {}
        }
        let save = || -> io::Result<()> {
            let mut state = std::fs::File::create(&create.snapshot_path)?;
            state.write_all(&serde_json::to_vec(&self.told)?)?;
            let memory = std::fs::File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&create.mem_file_path)?;
            // As long as it must be, for it is saved whole.
            memory.set_len((self.told.memory_mib as u64) << 20)?;
            memory.write_all_at(MEMORY, 0)
        };
        save().map_err(|error| format!("Create snapshot error: {error}"))
    }

    fn load(&mut self, load: SnapshotLoad) -> Result<(), String> {
        if self.running.is_some() || self.told.boot.is_some() {
            return Err(
                "Loading a microVM snapshot not allowed after configuring boot-specific resources.".into(),
            );
        }
        let MemoryBackendType::File = load.mem_backend.backend_type;
        let failed = |error: &dyn std::fmt::Display| format!("Load snapshot error: {error}");
        let state = std::fs::read(&load.snapshot_path).map_err(|error| failed(&error))?;
        let mut told: Told = serde_json::from_slice(&state).map_err(|error| failed(&error))?;
        let mut began = vec![0; MEMORY.len()];
        let memory = std::fs::File::open(&load.mem_backend.backend_path);
        let read = memory.and_then(|memory| memory.read_exact_at(&mut began, 0));
        read.map_err(|error| failed(&error))?;
        if began != MEMORY {
            return Err(failed(&"this memory is not the guest's"));
        }
        for other in load.network_overrides {
            let net = told.nets.iter_mut().find(|net| net.iface_id == other.iface_id);
            net.ok_or("Unknown Network Device.")?.host_dev_name = other.host_dev_name;
        }
        for drive in &told.drives {
            opens(&drive.path_on_host, drive.is_read_only)?;
        }
        for pmem in &told.pmems {
            opens(&pmem.path_on_host, pmem.read_only)?;
        }
        self.vsock = told.vsock.as_ref().map(bind).transpose()?;
        self.told = told;
        let machine = self.make()?;
        if !load.resume_vm {
            machine.carry_out("stop", &Value::Null, false)?;
        }
        Ok(())
    }

    /// The disks by what the guest is told of their order, with QEMU's node names, which the machine knows.
    fn disks(&self, boot: &BootSource) -> Result<HashMap<String, PathBuf>, String> {
        let args = boot.boot_args.as_deref().unwrap_or_default();
        let told = args
            .split(' ')
            .find_map(|word| word.strip_prefix(offshoot_vmm::firecracker::DISKS));
        let serials: Vec<_> = told.into_iter().flat_map(|told| told.split(',')).collect();
        if serials.len() != self.told.drives.len() {
            return Err(format!(
                "{} disks, and the guest is told of {serials:?}",
                self.told.drives.len()
            ));
        }
        let named = serials.iter().zip(&self.told.drives);
        Ok(named
            .map(|(serial, drive)| (format!("disk-{serial}"), drive.path_on_host.clone()))
            .collect())
    }
}

fn read<T: DeserializeOwned>(body: Option<Value>) -> Result<T, String> {
    let body = body.ok_or("Empty PUT request.")?;
    serde_json::from_value(body)
        .map_err(|error| format!("An error occurred when deserializing the json body of a request: {error}."))
}

fn bind(device: &Vsock) -> Result<UnixListener, String> {
    vsock::bind(&device.uds_path).map_err(|error| format!("Cannot create backend for vsock device: {error}"))
}

fn same(path: Option<&str>, body: &str) -> Result<(), String> {
    if path == Some(body) {
        Ok(())
    } else {
        Err("The id from the path does not match the id from the body!".into())
    }
}

fn opens(path: &Path, read_only: bool) -> Result<(), String> {
    let file = std::fs::File::options().read(true).write(!read_only).open(path);
    file.map(drop)
        .map_err(|error| format!("{error} {}", path.display()))
}

impl Api for Firecracker {
    fn answer(&self, method: &Method, path: &str, body: Option<Value>) -> Answer {
        match self.carry_out(method, path, body) {
            Ok(Some(said)) => Answer::of(said),
            Ok(None) => Answer::done(),
            Err(words) => self.refuse(words),
        }
    }

    fn refuse(&self, words: String) -> Answer {
        Answer {
            status: StatusCode::BAD_REQUEST,
            body: json!({"fault_message": words}),
        }
    }

    fn prefix(&self) -> &'static str {
        ""
    }
}

/// Runs until its guest ends; gives the status to exit with. Takes the real one's arguments.
///
/// # Errors
/// When an argument is missing, or the socket cannot be made.
pub fn run(args: &[OsString], behaviour: Behaviour) -> io::Result<i32> {
    let value = |flag: &str| {
        let at = args.iter().position(|arg| arg == flag);
        at.and_then(|at| args.get(at + 1))
            .ok_or_else(|| io::Error::other(format!("Missing required argument {flag}")))
    };
    let id = value("--id")?.to_string_lossy().into_owned();
    // The real one opens its log first.
    std::fs::File::options()
        .read(true)
        .write(true)
        .open(value("--log-path")?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let socket = PathBuf::from(value("--api-sock")?);
    runtime.block_on(async {
        let behaviour = Arc::new(behaviour);
        let listener = UnixListener::bind(socket)?;
        let firecracker = Arc::new(Firecracker {
            id,
            parts: Mutex::default(),
            started: Notify::new(),
        });
        tokio::spawn(api::serve(
            listener,
            Arc::clone(&firecracker),
            Arc::clone(&behaviour),
        ));
        firecracker.started.notified().await;
        live(&firecracker, &behaviour).await
    })
}

/// The guest's life.
async fn live(firecracker: &Firecracker, behaviour: &Behaviour) -> io::Result<i32> {
    let (machine, guest, vsock) = {
        let mut parts = firecracker.parts();
        let (machine, guest) = parts.running.clone().ok_or(io::ErrorKind::NotConnected)?;
        (machine, guest, parts.vsock.take())
    };
    let (sender, mut events) = mpsc::unbounded_channel();
    machine.set_client(Some(sender));
    after(behaviour.die_after, || std::process::abort());
    let ending = Arc::clone(&machine);
    after(behaviour.power_off_after, move || ending.end(End::PowerOff));
    if let Some(vsock) = vsock {
        tokio::spawn(vsock::serve(vsock, Arc::clone(&machine), guest));
    }
    let mut console = io::stdout();
    console.write_all(behaviour.console.as_bytes())?;
    console.flush()?;
    while let Some(line) = events.recv().await {
        let event: Value = serde_json::from_str(&line).unwrap_or_default();
        if event["event"] == "SHUTDOWN" {
            console.write_all(&machine.take_console())?;
            console.flush()?;
            return Ok(0);
        }
    }
    Ok(1)
}
