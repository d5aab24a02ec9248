//! Templates over the wire.

use offshoot_model::{BaseId, KernelId, TemplateId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// One row of `template ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateSummary {
    /// Its id.
    #[schema(value_type = String)]
    pub id: TemplateId,
    /// What it is of; absent when it cannot be used.
    pub of: Option<TemplateOf>,
    /// Why it cannot be used.
    pub problem: Option<String>,
    /// How many VMs were restored from it and run.
    pub vms: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
    /// Bytes of memory that the daemon holds for VMs to come; VMs that run share them.
    pub memory_bytes: u64,
}

/// What a VM has that is restored from a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateOf {
    /// The images of its base, as users write them; none when it is there only for its VMs.
    pub images: Vec<String>,
    /// Its base.
    #[schema(value_type = String)]
    pub base: BaseId,
    /// Its kernel bundle.
    #[schema(value_type = String)]
    pub kernel: KernelId,
    /// Its VMM with the version.
    pub vmm: String,
    /// vCPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory: u64,
    /// How its root is shown.
    pub root: String,
    /// Whether it has a network device.
    pub network: bool,
    /// When it was made, milliseconds since the epoch.
    pub created_ms: u64,
    /// When a VM was last restored from it, or it was made, milliseconds since the epoch.
    pub used_ms: u64,
}

/// What a path under `/v1/templates/{id}` names.
#[derive(Clone, Debug, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct TemplatePath {
    /// The template's id.
    #[param(min_length = 32, max_length = 32, pattern = "^[0-9a-f]{32}$")]
    pub id: String,
}
