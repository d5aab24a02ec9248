//! The main process: what the VM is for. When it ends, the VM ends.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use offshoot_agent_proto::client::{CallError, MainStart, OutputStream, ProcessEvent};
use offshoot_agent_proto::v1;
use offshoot_model::{ErrorKind, Explain};

use crate::capability::{Capability, CapabilityError};
use crate::output::{OutputLog, Record, RecordKind};
use crate::owner::now_ms;
use crate::run::{AgentSlot, MainExit, Run};

/// How long the agent may take to pass a signal on.
const ANSWER: Duration = Duration::from_secs(2);

/// Starts the main process and keeps what it writes.
pub struct MainProcessCapability;

/// The main process did not start.
#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error("{message}")]
    Refused { status: i32, message: String },
    #[error("cannot start the main process")]
    Call(#[source] CallError),
    #[error("the agent is not there")]
    NoAgent,
    #[error("cannot write {}", path.display())]
    Log {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Explain for MainError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { .. } => ErrorKind::InvalidRequest,
            Self::Call(source) => source.kind(),
            Self::NoAgent | Self::Log { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Refused { .. } => {
                vec!["see what the image has, for example `offshoot run --rm IMAGE ls /bin`".into()]
            }
            Self::Call(source) => source.hints(),
            Self::NoAgent | Self::Log { .. } => Vec::new(),
        }
    }

    fn exit_status(&self) -> Option<i32> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// Moves output from the agent to the log until the main process has ended, through every loss of the agent.
struct Pump {
    agent: AgentSlot,
    output: OutputLog,
    exit: MainExit,
}

/// Why a pump stopped for now.
enum Pumped {
    Exited(i32),
    AgentLost,
}

impl Pump {
    async fn run(self) {
        let mut watched = self.agent.watch();
        loop {
            let client = match watched.wait_for(Option::is_some).await {
                Ok(client) => client.clone(),
                Err(_) => return,
            };
            let Some(client) = client else { continue };
            match self.pump(&client).await {
                Pumped::Exited(status) => {
                    self.exit.set(status);
                    return;
                }
                Pumped::AgentLost => self.agent.set(None),
            }
        }
    }

    async fn pump(&self, client: &offshoot_agent_proto::client::AgentClient) -> Pumped {
        let mut events = match client.main_output(self.output.next_offset()).await {
            Ok(events) => events,
            Err(error) => {
                tracing::debug!(%error, "the main process's output cannot be read");
                return Pumped::AgentLost;
            }
        };
        while let Some(event) = events.next().await {
            let record = match event {
                Ok(ProcessEvent::Output { stream, offset, data }) => {
                    let kind = match stream {
                        OutputStream::Stdout => RecordKind::Stdout,
                        OutputStream::Stderr => RecordKind::Stderr,
                    };
                    Record {
                        kind,
                        time_ms: now_ms(),
                        offset,
                        data,
                    }
                }
                Ok(ProcessEvent::Lost { bytes }) => Record {
                    kind: RecordKind::Lost,
                    time_ms: now_ms(),
                    offset: self.output.next_offset() + bytes,
                    data: Bytes::from(bytes.to_string()),
                },
                Ok(ProcessEvent::Exited { status }) => return Pumped::Exited(status),
                Ok(ProcessEvent::Started { .. } | ProcessEvent::Refused(_)) => continue,
                Err(error) => {
                    tracing::debug!(%error, "the main process's output broke off");
                    return Pumped::AgentLost;
                }
            };
            if let Err(error) = self.output.append(&record) {
                // The host's disk is full: what the guest says is lost, what it does is not.
                tracing::warn!(%error, "cannot keep the main process's output");
            }
        }
        Pumped::AgentLost
    }
}

fn spawn_pump(run: &Run) {
    if run.vm.definition.process.is_none() {
        // The image's own init has no output of ours: what it says is on the console.
        return;
    }
    let pump = Pump {
        agent: run.agent_slot(),
        output: run.output.clone(),
        exit: run.main_exit_slot(),
    };
    let over = run.over.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = over.cancelled() => {}
            () = pump.run() => {}
        }
    });
}

fn boxed(error: MainError) -> CapabilityError {
    Box::new(error)
}

#[async_trait]
impl Capability for MainProcessCapability {
    fn name(&self) -> &'static str {
        "main"
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        run.output.begin_run(now_ms()).map_err(|source| {
            boxed(MainError::Log {
                path: run.paths.output(),
                source,
            })
        })
    }

    async fn after_boot(&self, run: &Run) -> Result<(), CapabilityError> {
        let agent = run.agent().ok_or_else(|| boxed(MainError::NoAgent))?;
        let what = match &run.vm.definition.process {
            Some(process) => v1::start_main_request::What::Process(v1::Process::from(process)),
            None => v1::start_main_request::What::Init(true),
        };
        match agent
            .start_main(what)
            .await
            .map_err(|source| boxed(MainError::Call(source)))?
        {
            MainStart::Started { .. } => {
                spawn_pump(run);
                Ok(())
            }
            MainStart::Refused(refusal) => Err(boxed(MainError::Refused {
                status: refusal.status,
                message: refusal.message,
            })),
        }
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        spawn_pump(run);
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let Some(grace) = run.grace() else { return Ok(()) };
        let Some(agent) = run.agent() else { return Ok(()) };
        if run.main_exit().is_some() || run.vm.definition.process.is_none() {
            return Ok(());
        }
        match tokio::time::timeout(ANSWER, agent.signal_main(run.vm.definition.stop_signal)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, "the main process cannot be asked to end");
                return Ok(());
            }
            Err(_) => {
                tracing::warn!(vm = %run.vm.name, "the agent does not answer");
                // Nobody shall wait for it once more.
                run.agent_slot().set(None);
                return Ok(());
            }
        }
        let ended = tokio::time::timeout(grace, run.wait_main_exit()).await;
        if ended.is_err() {
            let killed = async {
                let _ = agent.signal_main(offshoot_sys::signal::KILL).await;
                run.wait_main_exit().await
            };
            let _ = tokio::time::timeout(Duration::from_secs(1), killed).await;
        }
        Ok(())
    }
}
