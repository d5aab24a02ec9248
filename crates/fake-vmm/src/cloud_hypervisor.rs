//! A Cloud Hypervisor without a processor: the real one's arguments, events and API, with its phases.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::{Method, StatusCode};
use offshoot_sys::process::inherited_fd;
use offshoot_vmm::cloud_hypervisor::{CONFIG, MEMORY_COPY, STATE};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use crate::api::{self, Answer, Api};
use crate::guest::Guest;
use crate::machine::{End, Machine};
use crate::{Behaviour, after, vsock};

/// What it says to `--version`.
pub const VERSION: &str = "cloud-hypervisor v53.0\nMigration Protocol Versions: 0\n";

/// Flags and the values that follow each.
type Flags = HashMap<String, Vec<OsString>>;

fn flags(args: &[OsString]) -> io::Result<Flags> {
    let mut flags = Flags::new();
    let mut last = None;
    for arg in args {
        match (arg.to_str().and_then(|arg| arg.strip_prefix("--")), &last) {
            (Some(flag), _) => {
                if flags.insert(flag.to_owned(), Vec::new()).is_some() {
                    return Err(io::Error::other(format!(
                        "the argument '--{flag}' cannot be used multiple times"
                    )));
                }
                last = Some(flag.to_owned());
            }
            (None, Some(flag)) => {
                if let Some(values) = flags.get_mut(flag) {
                    values.push(arg.clone());
                }
            }
            (None, None) => return Err(io::Error::other(format!("unexpected argument {arg:?}"))),
        }
    }
    Ok(flags)
}

/// `key=value,key="va,lue"` as pairs; quotes keep commas.
fn pairs(value: &OsStr) -> HashMap<String, String> {
    let (mut pieces, mut piece, mut quoted) = (Vec::new(), String::new(), false);
    for c in value.to_string_lossy().chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => pieces.push(std::mem::take(&mut piece)),
            _ => piece.push(c),
        }
    }
    pieces.push(piece);
    pieces
        .into_iter()
        .map(|piece| match piece.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (piece, String::new()),
        })
        .collect()
}

/// What the guest's memory begins with in a memory file.
const MEMORY: &[u8] = b"the memory of a fake guest";

struct CloudHypervisor {
    machine: Arc<Machine>,
    /// What it saves of its configuration.
    config: Value,
    memory: Option<Memory>,
    guest: Arc<Guest>,
    behaviour: Arc<Behaviour>,
    quit: mpsc::UnboundedSender<()>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeDisk {
    id: String,
    desired_size: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    destination_url: String,
}

/// A guest's memory in a file.
struct Memory {
    file: File,
    shared: bool,
}

impl Memory {
    fn open(path: &Path, shared: bool) -> io::Result<Self> {
        let file = File::options().read(true).write(shared).open(path)?;
        if shared {
            file.write_all_at(MEMORY, 0)?;
        }
        let mut began = vec![0; MEMORY.len()];
        file.read_exact_at(&mut began, 0)?;
        if began != MEMORY {
            return Err(io::Error::other("this memory is not the guest's"));
        }
        Ok(Self { file, shared })
    }

    /// Whether it need not be saved: it is in a file that somebody else can name.
    fn lasts(&self) -> bool {
        self.shared && self.file.metadata().is_ok_and(|meta| meta.nlink() > 0)
    }
}

/// The folder of a URL.
fn folder(url: &str) -> io::Result<PathBuf> {
    let path = url.strip_prefix("file://").map(PathBuf::from);
    path.filter(|path| path.is_dir())
        .ok_or_else(|| io::Error::other(format!("Destination is not a directory: {url}")))
}

impl CloudHypervisor {
    fn save(&self, body: Option<Value>) -> Result<(), String> {
        let snapshot: Snapshot =
            serde_json::from_value(body.unwrap_or_default()).map_err(|error| error.to_string())?;
        let save = || -> io::Result<()> {
            let folder = folder(&snapshot.destination_url)?;
            File::create_new(folder.join(CONFIG))?.write_all(&serde_json::to_vec(&self.config)?)?;
            File::create_new(folder.join(STATE))?.write_all(b"{\"fake\": true}")?;
            if !self.memory.as_ref().is_some_and(Memory::lasts) {
                File::create_new(folder.join(MEMORY_COPY))?.write_all(MEMORY)?;
            }
            Ok(())
        };
        save().map_err(|error| error.to_string())
    }

    fn carry_out(&self, method: &Method, path: &str, body: Option<Value>) -> Result<Option<Value>, String> {
        let running = self.machine.is_running();
        let tell = |command: &str, arguments: Value| {
            self.machine.carry_out(command, &arguments, false).map(|_| None)
        };
        match (method.as_str(), path) {
            ("GET", "/vmm.ping") => Ok(Some(
                json!({"build_version": "v53.0", "version": "53.0", "pid": std::process::id()}),
            )),
            ("GET", "/vm.info") => {
                let state = if running { "Running" } else { "Paused" };
                Ok(Some(
                    json!({"config": {}, "state": state, "memory_actual_size": 0}),
                ))
            }
            // The real one refuses what is so already.
            ("PUT", "/vm.pause") if running => tell("stop", Value::Null),
            ("PUT", "/vm.resume") if !running => tell("cont", Value::Null),
            ("PUT", "/vm.pause" | "/vm.resume") => Err("VM is in an invalid state for that".into()),
            ("PUT", "/vm.snapshot") if running => Err("Trying to snapshot while VM is running".into()),
            ("PUT", "/vm.snapshot") => self.save(body).map(|()| None),
            ("PUT", "/vm.power-button") => {
                self.guest.power_button();
                Ok(None)
            }
            ("PUT", "/vm.resize-disk") => {
                let resize: ResizeDisk =
                    serde_json::from_value(body.unwrap_or_default()).map_err(|e| e.to_string())?;
                tell(
                    "block_resize",
                    json!({"node-name": resize.id, "size": resize.desired_size}),
                )
            }
            ("PUT", "/vmm.shutdown") if self.behaviour.deaf => Ok(None),
            ("PUT", "/vmm.shutdown") => {
                // Whoever takes it ends the process.
                let _ = self.quit.send(());
                Ok(None)
            }
            _ => Err(format!("no such path: {path}")),
        }
    }
}

impl Api for CloudHypervisor {
    fn answer(&self, method: &Method, path: &str, body: Option<Value>) -> Answer {
        match self.carry_out(method, path, body) {
            Ok(Some(said)) => Answer::of(said),
            Ok(None) => Answer::done(),
            Err(words) => self.refuse(words),
        }
    }

    fn refuse(&self, words: String) -> Answer {
        Answer {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            body: json!(["Error from API", words]),
        }
    }

    fn prefix(&self) -> &'static str {
        "/api/v1"
    }
}

/// What the arguments describe.
struct Described {
    api: StdListener,
    events: File,
    vsock: Option<PathBuf>,
    disks: HashMap<String, PathBuf>,
    config: Value,
    memory: Option<Memory>,
    restored: bool,
}

/// A machine that goes on from what was saved.
fn saved(restore: &OsStr, api: StdListener, events: File) -> io::Result<Described> {
    let source = pairs(restore).remove("source_url").unwrap_or_default();
    let folder = folder(&source)?;
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join(CONFIG))?)?;
    let state: Value = serde_json::from_slice(&std::fs::read(folder.join(STATE))?)?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let each = |list: &Value| list.as_array().cloned().unwrap_or_default();
    if state["fake"] != true {
        return Err(io::Error::other("this state is another VMM's"));
    }
    let mut disks = HashMap::new();
    for disk in each(&config["disks"]) {
        let path = PathBuf::from(text(&disk["path"]));
        File::options()
            .read(true)
            .write(disk["readonly"] != true)
            .open(&path)?;
        disks.insert(text(&disk["id"]), path);
    }
    for pmem in each(&config["pmem"]) {
        File::open(text(&pmem["file"]))?;
    }
    let told = restore.to_string_lossy().into_owned();
    for net in each(&config["net"]) {
        if !net["fds"].is_null() && !told.contains(&format!("{}@[", text(&net["id"]))) {
            return Err(io::Error::other(format!("no descriptor for {}", net["id"])));
        }
    }
    let zone = &config["memory"]["zones"][0];
    let memory = Memory::open(Path::new(&text(&zone["file"])), zone["shared"] == true)?;
    Ok(Described {
        api,
        events,
        vsock: config["vsock"]["socket"].as_str().map(PathBuf::from),
        disks,
        config,
        memory: Some(memory),
        restored: true,
    })
}

/// What the real one saves of its configuration, as far as this one reads it again.
fn config(flags: &Flags) -> Value {
    let values = |flag: &str| -> Vec<_> {
        let values = flags.get(flag).into_iter().flatten();
        values.map(|value| pairs(value)).collect()
    };
    let list = |flag: &str, device: &dyn Fn(&HashMap<String, String>) -> Value| {
        let devices: Vec<_> = values(flag).iter().map(device).collect();
        if devices.is_empty() {
            Value::Null
        } else {
            json!(devices)
        }
    };
    let is_on = |of: &HashMap<String, String>, key: &str| of.get(key).is_some_and(|value| value == "on");
    json!({
        "disks": list("disk", &|of| json!({"id": of["id"], "path": of["path"], "readonly": is_on(of, "readonly")})),
        "pmem": list("pmem", &|of| json!({"id": of["id"], "file": of["file"]})),
        "net": list("net", &|of| json!({"id": of["id"], "tap": of.get("tap"), "fds": of.get("fd").map(|_| [-1])})),
        "memory": {"zones": list("memory-zone", &|of| json!({"file": of["file"], "shared": is_on(of, "shared")}))},
        "vsock": values("vsock").first().map(|of| json!({"socket": of["socket"]})),
        "payload": {"kernel": flags["kernel"].first().map(|path| path.to_string_lossy())},
    })
}

fn described(args: &[OsString]) -> io::Result<Described> {
    let flags = flags(args)?;
    let first = |flag: &str| flags.get(flag).and_then(|values| values.first());
    let needed = |flag: &str| first(flag).ok_or_else(|| io::Error::other(format!("there is no --{flag}")));
    let number = |flag: &str| -> io::Result<i32> {
        let fd = pairs(needed(flag)?).get("fd").and_then(|fd| fd.parse().ok());
        fd.ok_or_else(|| io::Error::other(format!("--{flag} has no descriptor")))
    };
    let opens = |path: &Path, write: bool| -> io::Result<()> {
        let file = File::options().read(true).write(write).open(path);
        file.map(drop)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot open {}: {error}", path.display())))
    };
    let api = StdListener::from(inherited_fd(number("api-socket")?)?);
    api.set_nonblocking(true)?;
    let events = File::from(inherited_fd(number("event-monitor")?)?);
    if let Some(restore) = first("restore") {
        return saved(restore, api, events);
    }
    opens(Path::new(needed("kernel")?), false)?;
    if let Some(initramfs) = first("initramfs") {
        opens(Path::new(initramfs), false)?;
    }
    let mut disks = HashMap::new();
    for disk in flags.get("disk").into_iter().flatten() {
        let disk = pairs(disk);
        let path = PathBuf::from(disk.get("path").cloned().unwrap_or_default());
        opens(&path, disk.get("readonly").is_some_and(|value| value == "off"))?;
        if disk.get("image_type").is_none_or(|kind| kind != "raw") {
            return Err(io::Error::other(
                "a disk whose first bytes would decide what it is",
            ));
        }
        disks.insert(disk.get("id").cloned().unwrap_or_default(), path);
    }
    for (flag, key) in [("pmem", "file"), ("fs", "socket")] {
        for value in flags.get(flag).into_iter().flatten() {
            let path = PathBuf::from(pairs(value).get(key).cloned().unwrap_or_default());
            std::fs::metadata(&path)?;
        }
    }
    let shared =
        first("memory").is_some_and(|memory| pairs(memory).get("shared").is_some_and(|on| on == "on"));
    if flags.contains_key("fs") && !shared {
        return Err(io::Error::other(
            "Using vhost-user requires using shared memory or huge pages",
        ));
    }
    let memory = first("memory-zone").map(|zone| {
        let zone = pairs(zone);
        let path = zone.get("file").map(PathBuf::from).unwrap_or_default();
        Memory::open(&path, zone.get("shared").is_some_and(|on| on == "on"))
    });
    let ids: HashSet<_> = disks.keys().collect();
    if ids.len() != flags.get("disk").map_or(0, Vec::len) {
        return Err(io::Error::other("two disks with one id"));
    }
    Ok(Described {
        api,
        events,
        vsock: first("vsock").and_then(|vsock| pairs(vsock).get("socket").map(PathBuf::from)),
        disks,
        config: config(&flags),
        memory: memory.transpose()?,
        restored: false,
    })
}

/// Says that something happened, in the real one's way.
fn tell(mut events: &File, source: &str, event: &str) -> io::Result<()> {
    let value = json!({
        "timestamp": {"secs": 0, "nanos": 0}, "source": source, "event": event, "properties": null,
    });
    events.write_all(format!("{value:#}\n\n").as_bytes())
}

/// Runs until its guest or somebody else ends it; gives the status to exit with. Takes the real one's arguments.
///
/// # Errors
/// When an argument is missing or names what is not there.
pub fn run(args: &[OsString], behaviour: Behaviour) -> io::Result<i32> {
    let Described {
        api: listener,
        events,
        vsock,
        disks,
        config,
        memory,
        restored,
    } = described(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let behaviour = Arc::new(behaviour);
        let machine = Arc::new(Machine::new("", disks));
        let guest = Arc::new(Guest::new(Arc::clone(&machine)));
        let (sender, mut said) = mpsc::unbounded_channel();
        machine.set_client(Some(sender));
        let (quit, mut asked_to_quit) = mpsc::unbounded_channel();
        if restored {
            machine
                .carry_out("stop", &Value::Null, false)
                .map_err(io::Error::other)?;
        }
        let fake = CloudHypervisor {
            machine: Arc::clone(&machine),
            config,
            memory,
            guest: Arc::clone(&guest),
            behaviour: Arc::clone(&behaviour),
            quit,
        };
        let listener = UnixListener::from_std(listener)?;
        tokio::spawn(api::serve(listener, Arc::new(fake), Arc::clone(&behaviour)));
        tell(&events, "vmm", "starting")?;
        tell(&events, "vm", if restored { "restoring" } else { "booting" })?;
        if let Some(path) = vsock {
            let socket = vsock::bind(&path)?;
            tokio::spawn(vsock::serve(socket, Arc::clone(&machine), Arc::clone(&guest)));
        }
        let mut console = io::stdout();
        console.write_all(behaviour.console.as_bytes())?;
        console.flush()?;
        if behaviour.silent.iter().any(|silent| silent == "booted") {
            return std::future::pending().await;
        }
        tell(&events, "vm", if restored { "restored" } else { "booted" })?;
        after(behaviour.die_after, || std::process::abort());
        let ending = Arc::clone(&machine);
        after(behaviour.power_off_after, move || ending.end(End::PowerOff));
        loop {
            tokio::select! {
                Some(()) = asked_to_quit.recv() => {
                    // The answer has to get out.
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    tell(&events, "vmm", "shutdown")?;
                    return Ok(0);
                }
                Some(line) = said.recv() => {
                    let event: Value = serde_json::from_str(&line).unwrap_or_default();
                    if event["event"] != "SHUTDOWN" {
                        continue;
                    }
                    console.write_all(&machine.take_console())?;
                    console.flush()?;
                    if event["data"]["reason"] == "guest-shutdown" {
                        tell(&events, "vm", "shutdown")?;
                        return Ok(0);
                    }
                    // A reset is granted: the guest would come up again.
                    tell(&events, "vm", "rebooting")?;
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_stands_once_with_all_its_values() {
        let args = |words: &[&str]| -> Vec<OsString> { words.iter().map(OsString::from).collect() };
        let read = flags(&args(&["--fs", "tag=a", "tag=b", "--seccomp", "true"])).unwrap();
        assert_eq!(read["fs"], args(&["tag=a", "tag=b"]));
        assert!(flags(&args(&["--fs", "a", "--fs", "b"])).is_err());
        assert!(flags(&args(&["a"])).is_err());
        let pairs = pairs(OsStr::new("path=\"/a,b\",readonly=on,off"));
        assert_eq!(
            (pairs["path"].as_str(), pairs["readonly"].as_str()),
            ("/a,b", "on")
        );
        assert!(pairs.contains_key("off"));
    }
}
