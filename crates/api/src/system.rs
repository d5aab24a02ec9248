//! The daemon itself over the wire.

use offshoot_model::Finding;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer to `GET /v1/system/info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SystemInfo {
    /// The daemon's version.
    pub version: String,
    /// Where everything lies.
    pub data_dir: String,
    /// Where sockets lie.
    pub run_dir: String,
    /// Its process.
    pub pid: u32,
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

/// Answer to `GET /v1/system/doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// Every check of every capability.
    pub findings: Vec<Finding>,
}
