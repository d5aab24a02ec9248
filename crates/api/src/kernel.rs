//! Kernel bundles over the wire.

use offshoot_model::KernelId;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// One row of `kernel ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KernelSummary {
    /// Its id.
    #[schema(value_type = String)]
    pub id: KernelId,
    /// `uname -r`.
    pub release: String,
    /// Where it came from.
    pub source: String,
    /// What guests can use with it: `block`, `pmem`, `virtiofs`, `net`, `vsock`.
    pub features: Vec<String>,
    /// When it was added, milliseconds since the epoch.
    pub created_ms: u64,
    /// Bytes on disk.
    pub size: u64,
    /// Whether new VMs boot it.
    pub default: bool,
}

/// Body of `POST /v1/kernels/distro`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DistroRequest {
    /// The package; the newest cloud kernel that apt knows when absent.
    pub package: Option<String>,
}

/// Query of `POST /v1/kernels/build`. The body is a tar that may hold `fragment`, lines of Kconfig that win over the
/// daemon's own, and `source`, a tarball of Linux to take instead of the distribution's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct BuildQuery {
    /// Compilers at once; as many as the host has processors when absent.
    #[param(minimum = 1, maximum = 1024)]
    pub jobs: Option<u32>,
}

/// What a path under `/v1/kernels/{id}` names.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct KernelPath {
    /// The kernel bundle's id.
    #[param(min_length = 16, max_length = 16, pattern = "^[0-9a-f]{16}$")]
    pub id: String,
}
