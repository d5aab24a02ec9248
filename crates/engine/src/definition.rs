//! What is kept of a VM: the request and every decision made for it, and where its life stands.

use offshoot_agent_proto::client::SessionCount;
use offshoot_model::{
    Attachment, BaseId, Digest, ExitStatus, KernelId, ProcessConfig, TemplateId, VmConfig, VmId, VmName,
    VmState,
};
use offshoot_store::db::{DbError, VmRow, VmRunUpdate};
use offshoot_vmm::MachineState;
use serde::{Deserialize, Serialize};

/// A choice between back ends, with its reasons, best first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The chosen back end's name, by which it is reopened.
    pub chosen: String,
    /// Why it.
    pub reasons: Vec<String>,
    /// The others, best first.
    #[serde(default)]
    pub passed_over: Vec<PassedOver>,
}

/// A back end that was not chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    /// Its name.
    pub name: String,
    /// Why not.
    pub reason: String,
}

/// How a run began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootNote {
    /// [`BootNote::COLD`] or [`BootNote::TEMPLATE`], and why.
    pub choice: Choice,
    /// Which template it was restored from.
    #[serde(default)]
    pub template: Option<TemplateId>,
}

impl BootNote {
    /// It booted its kernel.
    pub const COLD: &str = "cold";
    /// It was restored from a template.
    pub const TEMPLATE: &str = "template";

    /// It was restored from this.
    pub fn template(id: &TemplateId) -> Self {
        Self {
            choice: Choice {
                chosen: Self::TEMPLATE.into(),
                reasons: vec![format!("restored from template {id}")],
                passed_over: Vec::new(),
            },
            template: Some(id.clone()),
        }
    }

    /// It took over a warm slot that was restored from this.
    pub fn slot(id: &TemplateId) -> Self {
        let mut note = Self::template(id);
        note.choice.reasons = vec![format!("took over a warm slot of template {id}")];
        note
    }

    /// It booted its kernel, because of this.
    pub fn cold(reason: &str) -> Self {
        Self {
            choice: Choice {
                chosen: Self::COLD.into(),
                reasons: vec![reason.into()],
                passed_over: vec![PassedOver {
                    name: Self::TEMPLATE.into(),
                    reason: reason.into(),
                }],
            },
            template: None,
        }
    }
}

/// What was asked for and decided, fixed at creation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDefinition {
    /// The request.
    pub config: VmConfig,
    /// The main process; absent when the image's init runs.
    pub process: Option<ProcessConfig>,
    /// The signal that asks the main process to end, a Linux number.
    pub stop_signal: u32,
    /// Which VMM.
    pub vmm: Choice,
    /// Which root back end.
    pub root: Choice,
    /// What it was given on its network; absent when it is on none.
    #[serde(default)]
    pub attachment: Option<Attachment>,
}

/// One VM as the engine knows it; the database holds the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// The user its VMM runs as.
    pub uid: u32,
    /// Its image's manifest.
    pub image_digest: Digest,
    /// Its base.
    pub base_id: BaseId,
    /// Its kernel bundle.
    pub kernel_id: KernelId,
    /// What was asked for and decided.
    pub definition: VmDefinition,
    /// When it was created, milliseconds since the epoch.
    pub created_ms: u64,
    /// Where its life stands.
    pub life: Life,
}

/// The part of a record that changes with every run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// Where it is.
    pub state: VmState,
    /// How to find its VMM, while one may run.
    pub machine: Option<MachineState>,
    /// When the current or last run began.
    pub started_ms: Option<u64>,
    /// When the last run ended.
    pub finished_ms: Option<u64>,
    /// How the last run ended.
    pub exit: Option<ExitStatus>,
    /// Why the last start failed, outermost first.
    pub failure: Vec<String>,
    /// Somebody stopped it, and nobody started it since.
    pub held: bool,
    /// Somebody removed it: whatever comes between, it is brought to that end.
    pub removing: bool,
    /// How the current or last run began, where that was decided.
    pub boot: Option<BootNote>,
    /// What of the running VM does not work any more. Not stored: whoever takes a VM over finds it out.
    pub degraded: Vec<String>,
    /// How many sessions the running guest has. Not stored: the agent tells whoever asks.
    pub sessions: SessionCount,
}

impl Life {
    /// A life that has not begun.
    pub fn new() -> Self {
        Self {
            state: VmState::Created,
            machine: None,
            started_ms: None,
            finished_ms: None,
            exit: None,
            failure: Vec::new(),
            held: false,
            removing: false,
            boot: None,
            degraded: Vec::new(),
            sessions: SessionCount::default(),
        }
    }

    /// The columns of the database that hold it.
    pub fn to_update(&self) -> VmRunUpdate {
        VmRunUpdate {
            state: self.state,
            machine: self.machine.as_ref().map(json),
            started_ms: self.started_ms,
            finished_ms: self.finished_ms,
            exit: self.exit,
            failure: self.failure.clone(),
            held: self.held,
            removing: self.removing,
            boot: self.boot.as_ref().map(json),
        }
    }
}

impl Default for Life {
    fn default() -> Self {
        Self::new()
    }
}

impl VmRecord {
    /// Whether it runs in memory that it has in common with this template.
    pub fn runs_from(&self, template: &TemplateId) -> bool {
        let boot = self.life.boot.as_ref();
        self.life.state.has_vmm() && boot.is_some_and(|boot| boot.template.as_ref() == Some(template))
    }

    /// The row that holds it.
    pub fn to_row(&self) -> VmRow {
        let VmRunUpdate {
            state,
            machine,
            started_ms,
            finished_ms,
            exit,
            failure,
            held,
            removing,
            boot,
        } = self.life.to_update();
        VmRow {
            id: self.id.clone(),
            name: self.name.clone(),
            state,
            uid: self.uid,
            image_digest: self.image_digest,
            base_id: self.base_id.clone(),
            kernel_id: self.kernel_id.clone(),
            definition: json(&self.definition),
            machine,
            created_ms: self.created_ms,
            started_ms,
            finished_ms,
            exit,
            failure,
            held,
            removing,
            boot,
        }
    }

    /// Reads a row back.
    pub fn from_row(row: VmRow) -> Result<Self, DbError> {
        fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, DbError> {
            serde_json::from_str(text).map_err(|source| DbError::Row {
                what: "VM",
                source: Box::new(source),
            })
        }
        Ok(Self {
            id: row.id,
            name: row.name,
            uid: row.uid,
            image_digest: row.image_digest,
            base_id: row.base_id,
            kernel_id: row.kernel_id,
            definition: parse(&row.definition)?,
            created_ms: row.created_ms,
            life: Life {
                state: row.state,
                machine: row.machine.as_deref().map(parse).transpose()?,
                started_ms: row.started_ms,
                finished_ms: row.finished_ms,
                exit: row.exit,
                failure: row.failure,
                held: row.held,
                removing: row.removing,
                boot: row.boot.as_deref().map(parse).transpose()?,
                degraded: Vec::new(),
                sessions: SessionCount::default(),
            },
        })
    }
}

/// JSON of one of our own types.
fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("our own types have string keys and no failing serializers")
}
