//! The guest's state: which VM it is, its processes, and its end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use offshoot_agent_proto::v1;
use tokio::sync::watch;
use tonic::Status;

use crate::machine::{End, Machine};
use crate::process::{Process, Transcript};
use crate::program::{self, NotFound, Step};

const SIGTERM: u32 = 15;
/// The most that `kill -l` knows.
const MAX_SIGNAL: u32 = 64;
/// A real guest powers itself off this long after it answered a shutdown; the VMM is mostly ended before.
const POWER_DELAY: Duration = Duration::from_millis(300);
/// As a shell counts a program that there is not.
const NOT_FOUND: i32 = 127;

/// What runs as the main process.
enum Main {
    Process(Arc<Process>),
    /// The image's own init, which ends only with the machine.
    Init,
    Refused(v1::StartFailure),
}

#[derive(Default)]
struct State {
    vm_id: Option<String>,
    main: Option<Main>,
    /// Every process that may still run.
    processes: Vec<Arc<Process>>,
    last_pid: u32,
}

/// One guest.
pub(crate) struct Guest {
    machine: Arc<Machine>,
    /// What the main process says; there before it is.
    main_transcript: Transcript,
    state: Mutex<State>,
    /// Processes beside the main one that run.
    exec_sessions: Arc<watch::Sender<u32>>,
}

impl Guest {
    /// A guest that is no VM yet.
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            main_transcript: Transcript::new(),
            state: Mutex::default(),
            exec_sessions: Arc::default(),
        }
    }

    /// How many processes run beside the main one, and news of it.
    pub(crate) fn exec_sessions(&self) -> watch::Receiver<u32> {
        self.exec_sessions.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the main process says.
    pub(crate) fn main_transcript(&self) -> &Transcript {
        &self.main_transcript
    }

    /// Who it is, for `Hello`.
    pub(crate) fn describe(&self) -> v1::HelloReply {
        let state = self.state();
        let main = match &state.main {
            None | Some(Main::Refused(_)) => v1::MainState::NotStarted,
            Some(Main::Init) => v1::MainState::Init,
            Some(Main::Process(process)) if process.transcript.is_over() => v1::MainState::Exited,
            Some(Main::Process(_)) => v1::MainState::Running,
        };
        v1::HelloReply {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: "0.0.0-fake".to_owned(),
            vm_id: state.vm_id.clone().unwrap_or_default(),
            ready_uptime_us: 0,
            main: main.into(),
            sessions: *self.exec_sessions.borrow(),
        }
    }

    /// Becomes a VM. Every disk that the request names must be there, as for a real guest.
    pub(crate) fn configure(&self, request: &v1::ConfigureRequest) -> Result<(), Status> {
        use v1::configure_request::Root;
        let mut state = self.state();
        if let Some(vm_id) = &state.vm_id {
            if *vm_id == request.vm_id {
                return Ok(());
            }
            return Err(Status::failed_precondition(format!(
                "the guest is VM {vm_id} already"
            )));
        }
        let root = match &request.root {
            Some(Root::RootBlockSerial(serial) | Root::RootCopySerial(serial)) => serial,
            Some(Root::RootPmemIndex(_) | Root::RootVirtiofsTag(_)) => "",
            None => return Err(Status::invalid_argument("the guest is told no root")),
        };
        let serials = [root, &request.overlay_serial, &request.work_serial];
        let missing = serials
            .into_iter()
            .find(|serial| !serial.is_empty() && !self.machine.has_disk(serial));
        if let Some(serial) = missing {
            return Err(Status::failed_precondition(format!(
                "there is no disk with serial {serial}"
            )));
        }
        state.vm_id = Some(request.vm_id.clone());
        Ok(())
    }

    /// Starts the main process, once.
    pub(crate) fn start_main(
        &self,
        what: &v1::start_main_request::What,
    ) -> Result<v1::StartMainReply, Status> {
        use v1::start_main_reply::What;
        let mut state = self.state();
        if state.main.is_none() {
            let main = match what {
                v1::start_main_request::What::Init(_) => {
                    state.need_vm()?;
                    Main::Init
                }
                v1::start_main_request::What::Process(process) => {
                    let steps = state.steps(process)?;
                    match steps {
                        Ok(steps) => {
                            let transcript = self.main_transcript.clone();
                            Main::Process(state.start(steps, transcript, &self.machine))
                        }
                        Err(failure) => Main::Refused(failure),
                    }
                }
            };
            state.main = Some(main);
        }
        let what = match &state.main {
            Some(Main::Process(process)) => What::Pid(process.pid),
            Some(Main::Refused(failure)) => What::Failed(failure.clone()),
            Some(Main::Init) | None => What::Pid(1),
        };
        Ok(v1::StartMainReply { what: Some(what) })
    }

    /// Starts one more process.
    pub(crate) fn exec(
        &self,
        process: &v1::Process,
    ) -> Result<Result<Arc<Process>, v1::StartFailure>, Status> {
        let mut state = self.state();
        let steps = match state.steps(process)? {
            Ok(steps) => steps,
            Err(failure) => return Ok(Err(failure)),
        };
        let process = state.start(steps, Transcript::new(), &self.machine);
        let (open, transcript) = (Arc::clone(&self.exec_sessions), process.transcript.clone());
        open.send_modify(|open| *open += 1);
        tokio::spawn(async move {
            transcript.over().await;
            open.send_modify(|open| *open -= 1);
        });
        Ok(Ok(process))
    }

    /// Sends the main process a signal.
    pub(crate) fn signal_main(&self, signal: u32) -> Result<(), Status> {
        if signal > MAX_SIGNAL {
            return Err(Status::invalid_argument(format!("there is no signal {signal}")));
        }
        match &self.state().main {
            Some(Main::Process(process)) if process.signal(signal) => Ok(()),
            // The image's init does with it what it likes.
            Some(Main::Init) => Ok(()),
            _ => Err(Status::failed_precondition("the main process is not running")),
        }
    }

    /// Ends every process; the machine is off soon.
    pub(crate) async fn shut_down(&self) {
        let processes = self.terminate();
        for process in processes {
            process.transcript.over().await;
        }
        let machine = Arc::clone(&self.machine);
        tokio::spawn(async move {
            tokio::time::sleep(POWER_DELAY).await;
            machine.end(End::PowerOff);
        });
    }

    /// The power button: a guest that has booted ends its processes and switches itself off. One that stands still, or
    /// is no VM yet, does not hear it.
    pub(crate) fn power_button(self: &Arc<Self>) {
        if !self.machine.is_running() || self.state().vm_id.is_none() {
            return;
        }
        let guest = Arc::clone(self);
        tokio::spawn(async move {
            for process in guest.terminate() {
                process.transcript.over().await;
            }
            guest.machine.end(End::PowerOff);
        });
    }

    fn terminate(&self) -> Vec<Arc<Process>> {
        let processes = std::mem::take(&mut self.state().processes);
        for process in &processes {
            // One that has ended needs none.
            let _ = process.signal(SIGTERM);
        }
        processes
    }
}

impl State {
    fn need_vm(&self) -> Result<(), Status> {
        match self.vm_id {
            Some(_) => Ok(()),
            None => Err(Status::failed_precondition("the guest is not a running VM")),
        }
    }

    /// What a process would do, or why there is none.
    fn steps(&self, process: &v1::Process) -> Result<Result<Vec<Step>, v1::StartFailure>, Status> {
        self.need_vm()?;
        if process.argv.first().is_none_or(String::is_empty) {
            return Err(Status::invalid_argument("nothing to start"));
        }
        let failure = |error: NotFound| v1::StartFailure {
            status: NOT_FOUND,
            message: error.to_string(),
        };
        Ok(program::steps(&process.argv).map_err(failure))
    }

    fn start(&mut self, steps: Vec<Step>, transcript: Transcript, machine: &Arc<Machine>) -> Arc<Process> {
        // Above those of a kernel's threads.
        self.last_pid = self.last_pid.max(100) + 1;
        let process = Process::start(self.last_pid, steps, transcript, Arc::clone(machine));
        let process = Arc::new(process);
        self.processes.retain(|other| !other.transcript.is_over());
        self.processes.push(Arc::clone(&process));
        process
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn guest() -> Arc<Guest> {
        let disks = HashMap::from([("disk-overlay".to_owned(), "/dev/null".into())]);
        Arc::new(Guest::new(Arc::new(Machine::new("", disks))))
    }

    fn configure(guest: &Guest, vm_id: &str, overlay: &str) -> Result<(), tonic::Code> {
        let request = v1::ConfigureRequest {
            vm_id: vm_id.into(),
            root: Some(v1::configure_request::Root::RootPmemIndex(0)),
            overlay_serial: overlay.into(),
            ..v1::ConfigureRequest::default()
        };
        guest.configure(&request).map_err(|status| status.code())
    }

    fn process(argv: &[&str]) -> v1::Process {
        v1::Process {
            argv: argv.iter().map(ToString::to_string).collect(),
            ..v1::Process::default()
        }
    }

    fn main(argv: &[&str]) -> v1::start_main_request::What {
        v1::start_main_request::What::Process(process(argv))
    }

    #[tokio::test]
    async fn it_becomes_one_vm_and_starts_one_main_process() {
        let guest = guest();
        let early = guest.start_main(&main(&["true"])).unwrap_err();
        assert_eq!(early.code(), tonic::Code::FailedPrecondition);
        assert_eq!(
            configure(&guest, "a", "none-such"),
            Err(tonic::Code::FailedPrecondition)
        );
        assert_eq!(configure(&guest, "a", "overlay"), Ok(()));
        assert_eq!(configure(&guest, "a", "overlay"), Ok(()));
        assert_eq!(
            configure(&guest, "b", "overlay"),
            Err(tonic::Code::FailedPrecondition)
        );
        let first = guest.start_main(&main(&["sleep", "infinity"])).unwrap();
        assert_eq!(guest.start_main(&main(&["true"])).unwrap(), first);
        assert_eq!(guest.describe().main, i32::from(v1::MainState::Running));
        assert!(guest.exec(&process(&["sleep", "infinity"])).unwrap().is_ok());
        assert_eq!(guest.describe().sessions, 1);
        let mut open = guest.exec_sessions();
        assert_eq!(*open.borrow_and_update(), 1);
        guest.shut_down().await;
        open.wait_for(|open| *open == 0).await.unwrap();
        assert_eq!(guest.describe().main, i32::from(v1::MainState::Exited));
        assert_eq!(
            guest.signal_main(15).unwrap_err().code(),
            tonic::Code::FailedPrecondition
        );
    }

    #[tokio::test]
    async fn what_is_not_there_is_not_started() {
        let guest = guest();
        configure(&guest, "a", "").unwrap();
        let failure = guest.exec(&process(&["/nonexistent/x"])).unwrap().err().unwrap();
        assert_eq!(failure.status, 127);
        assert_eq!(
            guest.exec(&process(&[])).err().unwrap().code(),
            tonic::Code::InvalidArgument
        );
    }

    #[tokio::test]
    async fn the_power_button_is_heard_by_a_guest_that_booted() {
        let guest = guest();
        guest.power_button();
        configure(&guest, "a", "").unwrap();
        guest.start_main(&main(&["nginx"])).unwrap();
        tokio::task::yield_now().await;
        assert!(guest.machine.is_running());
        guest.power_button();
        guest.main_transcript().over().await;
        while guest.machine.is_running() {
            tokio::task::yield_now().await;
        }
    }
}
