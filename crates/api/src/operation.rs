//! Operations that are over, and where their time went: [`offshoot_model::OperationTiming`]s.

use offshoot_model::{OperationId, VmName};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

/// Query of `GET /v1/operations`: which operations to give. The newest come last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct OperationsQuery {
    /// Only those on this VM: its name or the first digits of its id; of a VM that is gone, its whole id.
    #[param(value_type = Option<String>)]
    pub vm: Option<VmName>,
    /// Only those of this kind, such as `start`.
    #[param(max_length = 64)]
    pub kind: Option<String>,
    /// Only those with this id, which errors, events, the log and the header `x-offshoot-operation` name.
    #[param(value_type = Option<String>)]
    pub operation: Option<OperationId>,
    /// Only so many, the newest; 100 when absent, 1000 at most.
    pub limit: Option<u32>,
}
