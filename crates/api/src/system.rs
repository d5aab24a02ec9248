//! The daemon itself over the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer to `GET /v1/system/info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SystemInfo {
    /// The daemon's version.
    pub version: String,
    /// The version of the API that it speaks, which is the first part of every path.
    #[serde(default)]
    pub api_version: String,
    /// Where everything lies.
    pub data_dir: String,
    /// Where sockets lie.
    pub run_dir: String,
    /// Where it listens.
    #[serde(default)]
    pub socket: String,
    /// The file with its settings; absent when it runs with the defaults.
    #[serde(default)]
    pub config_file: Option<String>,
    /// Its process.
    pub pid: u32,
    /// When it started, milliseconds since the epoch.
    #[serde(default)]
    pub started_ms: u64,
    /// Seconds since then, by a clock that nobody sets.
    #[serde(default)]
    pub uptime_s: u64,
    /// `native`, `emulated`, `absent` or `denied`.
    pub kvm: String,
    /// What the probe saw.
    pub kvm_explanation: String,
    /// The VMMs it found, with versions.
    pub vmms: Vec<VmmSummary>,
    /// VMs in all.
    pub vms: u64,
    /// VMs that run.
    pub running: u64,
    /// Images.
    pub images: u64,
    /// Idle TAPs that wait for VMs.
    #[serde(default)]
    pub tap_pool: TapPool,
}

/// Idle TAP devices on the bridges of networks, ready for VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TapPool {
    /// How many each bridge shall have; 0 where none are kept.
    pub size: u64,
    /// How many are ready, on all bridges together.
    pub ready: u64,
    /// How many there will be when nobody takes any.
    pub wanted: u64,
}

/// Body of `POST /v1/system/shutdown`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// The daemon's process, as `GET /v1/system/info` tells it: a daemon that has come in its place is not ended.
    pub pid: u32,
    /// Also gives back what is only kept ready for VMs to come.
    #[serde(default)]
    pub drain: bool,
}

/// One VMM that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmmSummary {
    /// `qemu`, `cloud-hypervisor`, `firecracker`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its program.
    pub path: String,
    /// What it can do.
    pub features: Vec<String>,
}
