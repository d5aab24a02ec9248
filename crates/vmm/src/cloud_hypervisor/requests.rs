//! The bodies of its API's requests; its command line says everything else.
//!
//! Shapes are those of its `vmm/src/api/openapi/cloud-hypervisor.yaml`; `OFFSHOOT_CLOUD_HYPERVISOR_API` names that file for
//! the test that compares them.

use serde::Serialize;

/// `PUT /vm.resize-disk`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ResizeDisk {
    /// The disk's id on the command line.
    pub id: String,
    /// Its new size, bytes.
    pub desired_size: u64,
}

/// `PUT /vm.snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// `file://` and a folder, which must be there.
    pub destination_url: String,
}
