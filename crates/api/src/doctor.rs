//! What is wrong with the daemon's host, and what was mended.

use offshoot_model::{Finding, Fix, Severity};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ApiError;

/// Answer to `GET /v1/system/doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// Every check of every capability, and of the daemon itself.
    pub findings: Vec<Finding>,
}

/// The result of `POST /v1/system/doctor/fix`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DoctorFixReport {
    /// What was tried, in this order.
    pub fixes: Vec<FixOutcome>,
    /// What every check says afterwards.
    pub findings: Vec<Finding>,
}

/// What became of one fix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FixOutcome {
    /// Which.
    pub fix: Fix,
    /// What it did, a line for each thing.
    pub done: Vec<String>,
    /// Why it could not be done, or not all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<ApiError>,
}

/// Whether VMs cannot run, or data is in danger. Warnings do not count.
pub fn has_failure(findings: &[Finding]) -> bool {
    findings.iter().any(|found| found.severity == Severity::Failure)
}
