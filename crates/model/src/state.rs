//! The states of a VM and how its life can end.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a VM is in its life.
///
/// ```text
/// created ─start─► starting ─► running ◄─pause/resume─► paused
///                     │           │ stop / guest exit
///                     ▼           ▼
///                  failed      stopping ─► stopped ─rm─► (gone)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Its row and disks exist; it never ran.
    Created,
    /// Its VMM is being launched and its guest booted.
    Starting,
    /// Its agent answers and its main process was started.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It is being shut down.
    Stopping,
    /// It ran, and nothing of it runs any more.
    Stopped,
    /// A start failed; the reason is kept, and it can be started again.
    Failed,
}

impl VmState {
    /// Every state, for counts, tables and tests.
    pub const ALL: [Self; 7] = [
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
    ];

    /// Whether a VMM process belongs to this state.
    pub fn has_vmm(self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Running | Self::Paused | Self::Stopping
        )
    }

    /// The word that users see and the database stores.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a VM is not running any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ExitReason {
    /// Its main process ended.
    MainExited,
    /// `offshoot stop`.
    Stopped,
    /// `offshoot kill`, or a stop that ran out of time.
    Killed,
    /// The guest powered itself off or reset itself.
    GuestPoweredOff,
    /// The guest's kernel panicked.
    GuestPanicked,
    /// The VMM process ended without being asked.
    VmmDied,
    /// The host was restarted, or everything was killed while no daemon ran.
    Lost,
}

/// How the last run of a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExitStatus {
    /// The main process's status as a shell counts it (128 + signal number for a signal); 137 for a killed VM,
    /// 255 when the guest went away without telling.
    pub code: i32,
    /// What ended the run.
    pub reason: ExitReason,
}
