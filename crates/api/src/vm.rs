//! VMs over the wire. The request to create one is [`offshoot_model::VmConfig`] itself.

use offshoot_model::{
    ExitStatus, ProcessConfig, PublishedPort, StageTiming, VmConfig, VmId, VmName, VmState,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::network::VmNetwork;

/// One row of `ps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSummary {
    /// Its id.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: VmName,
    /// The image as the user wrote it.
    pub image: String,
    /// The main process, shell-quoted; empty when the image's init runs.
    pub command: String,
    /// Where it is in its life.
    pub state: VmState,
    /// When it was created, milliseconds since the epoch.
    pub created_ms: u64,
    /// When its current or last run began, milliseconds since the epoch.
    pub started_ms: Option<u64>,
    /// When its last run ended, milliseconds since the epoch.
    pub finished_ms: Option<u64>,
    /// How its last run ended; absent while it runs.
    pub exit: Option<ExitStatus>,
    /// Why it works only in part, one line each: `the share on /data is gone: its virtiofsd died`. Empty when it is well.
    #[serde(default)]
    pub degraded: Vec<String>,
    /// Its place on its network; absent when it is on none.
    #[serde(default)]
    pub network: Option<VmNetwork>,
    /// Ports of the host that lead to it while it runs, all with a number.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
    /// How many sessions are open in it.
    #[serde(default)]
    pub sessions: Sessions,
}

/// How many sessions are open in a VM that runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sessions {
    /// SSH connections, over the network and over the agent's channel.
    pub ssh: u32,
    /// `exec` sessions.
    pub exec: u32,
}

impl Sessions {
    /// All of them.
    pub fn total(self) -> u32 {
        self.ssh.saturating_add(self.exec)
    }
}

/// Everything about a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDetails {
    /// What `ps` shows.
    #[serde(flatten)]
    pub summary: VmSummary,
    /// The request it was made from.
    pub config: VmConfig,
    /// The manifest digest of its image.
    pub image_digest: String,
    /// The base its root comes from.
    pub base: String,
    /// The kernel bundle it boots.
    pub kernel: String,
    /// The main process; absent when the image's init runs.
    pub process: Option<ProcessConfig>,
    /// Which VMM runs it, how, and why that one.
    pub vmm: Decision,
    /// How its root is shown, and why so.
    pub root: Decision,
    /// Whether its current or last run booted its kernel or restored a template, and why so; absent before the first.
    #[serde(default)]
    pub boot: Option<Decision>,
    /// The VMM's process, while it runs.
    pub pid: Option<i32>,
    /// Why it failed, when it did: the message and what caused it.
    pub failure: Vec<String>,
    /// Where its own files lie on the host.
    pub directory: String,
    /// Blocks that its own files take on disk, bytes.
    pub disk_bytes: u64,
    /// The stages of its last operation of each kind; `GET /v1/operations` has more.
    pub timings: Vec<StageTiming>,
}

/// A choice that the daemon made, with its reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    /// What was chosen.
    pub chosen: String,
    /// Why this one.
    pub reasons: Vec<String>,
    /// What was passed over, in the order in which it was looked at.
    #[serde(default)]
    pub passed_over: Vec<PassedOver>,
}

/// What a decision did not take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PassedOver {
    /// The other possibility.
    pub name: String,
    /// Why not.
    pub reason: String,
}

/// What a path under `/v1/vms/{vm}` names.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct VmPath {
    /// A VM's name, its id, or the first digits of its id, at least three.
    #[param(
        min_length = 1,
        max_length = 63,
        pattern = "^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$"
    )]
    pub vm: String,
}

/// Query of `GET /v1/vms`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct ListQuery {
    /// Also those that do not run.
    pub all: bool,
}

/// Query of `DELETE /v1/vms/{vm}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct RemoveQuery {
    /// Kill it first when it runs.
    pub force: bool,
}

/// Query of `POST /v1/vms/{vm}/reset`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct ResetQuery {
    /// Kill it first when it runs.
    pub force: bool,
}

/// Query of `POST /v1/vms/{vm}/stop` and `/restart`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct StopQuery {
    /// Seconds to wait before it is killed; 10 when absent.
    pub time_s: Option<u32>,
}

/// Query of `POST /v1/vms/{vm}/kill`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct KillQuery {
    /// A signal's name or number for the main process; absent or `KILL` ends the VM itself.
    pub signal: Option<String>,
}

/// Query of `POST /v1/vms/{vm}/rename`.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
pub struct RenameQuery {
    /// The new name.
    #[param(
        min_length = 1,
        max_length = 63,
        pattern = "^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?$"
    )]
    pub name: String,
}

/// Query of `GET /v1/vms/{vm}/logs`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct LogsQuery {
    /// Go on until the VM stops.
    pub follow: bool,
    /// Only so many lines from the end.
    pub tail: Option<u64>,
    /// An RFC 3339 time before every line.
    pub timestamps: bool,
    /// The guest's console (kernel and agent) instead of the main process's output.
    pub console: bool,
}

/// Query of the WebSocket `GET /v1/vms/{vm}/attach`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct AttachQuery {
    /// Take this client's standard input.
    pub stdin: bool,
    /// Also what was written before.
    pub logs: bool,
}

/// Query of `GET` and `PUT /v1/vms/{vm}/archive`.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
pub struct ArchiveQuery {
    /// Absolute path in the guest: what to read, or the folder to unpack into.
    #[param(max_length = 4095, pattern = "^/")]
    pub path: String,
}

/// Answer to `PUT /v1/vms/{vm}/archive`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ArchiveUnpacked {
    /// Entries that were unpacked.
    pub files: u64,
}

/// Header of the answer to `GET /v1/vms/{vm}/archive`: a JSON [`PathStat`].
pub const PATH_STAT_HEADER: &str = "x-offshoot-path-stat";

/// What stands at a path of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PathStat {
    /// The last component of the path.
    pub name: String,
    /// `st_mode`, type bits included.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Where a symlink leads; empty for anything else.
    pub link_target: String,
}

/// Answer to `GET /v1/vms/{vm}/wait`, which comes when the VM does not run any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitAnswer {
    /// How it ended; absent when it never ran.
    pub exit: Option<ExitStatus>,
}
