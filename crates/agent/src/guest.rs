//! This guest's state, and what changes it.
//!
//! ```text
//!   new ── configure ──► VM ── start_main ──► started (running, ended, init) ── shut_down ──► off
//!    │     fails ─────► failed
//!    └── warm ── configure ──► VM
//! ```
//!
//! Each change is made once; asking again gets the first answer. None of them may be given up half-way, so whoever
//! calls on behalf of a connection that can break does so in a task of its own.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use offshoot_agent_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;

use crate::configure::{self, Configured, Disk, Warmed};
use crate::count::{Count, Kind};
use crate::output_log::OutputLog;
use crate::pid1::Pid1;
use crate::session::{self, ExecReplies, QUEUE};
use crate::spawn::{Spawned, check_init, spawn};
use crate::supervisor::INIT_PROGRAM;
use crate::workload::Workload;
use crate::{log, process, shutdown, ssh};

/// How the guest was configured.
enum Setup {
    New,
    /// Its disks are mounted, and it is nobody yet.
    Warm(Warmed),
    Done {
        vm_id: String,
        reply: v1::ConfigureReply,
        disks: Vec<Disk>,
    },
    /// It failed, half-way perhaps; only a new boot helps.
    Failed(Status),
}

/// What runs as the main process.
#[derive(Clone)]
enum MainProcess {
    /// The image's init, which is PID 1.
    Init,
    /// A process of ours.
    Process {
        pidfd: Arc<OwnedFd>,
        input: mpsc::Sender<v1::ProcessInput>,
    },
    /// It could not be started.
    Refused,
}

#[derive(Clone)]
struct Main {
    what: MainProcess,
    reply: v1::StartMainReply,
}

/// What the agent knows.
pub(crate) struct Guest {
    pid1: Pid1,
    setup: tokio::sync::Mutex<Setup>,
    /// What the VM's processes see; taken away when the VM ends.
    workload: Mutex<Option<Arc<Workload>>>,
    main: tokio::sync::Mutex<Option<Main>>,
    /// What the main process writes.
    pub(crate) output: Arc<OutputLog>,
    exited: Arc<AtomicBool>,
    /// Open sessions.
    pub(crate) count: Arc<Count>,
    /// The SSH server, where one was asked for; there from the configuration on.
    ssh: Mutex<Option<Arc<ssh::Server>>>,
    ready_uptime_us: AtomicU64,
    ended: tokio::sync::Mutex<Option<bool>>,
}

impl Guest {
    pub(crate) fn new(pid1: Pid1) -> Self {
        Self {
            pid1,
            setup: tokio::sync::Mutex::new(Setup::New),
            workload: Mutex::default(),
            main: tokio::sync::Mutex::default(),
            output: OutputLog::new(),
            exited: Arc::default(),
            count: Count::new(),
            ssh: Mutex::default(),
            ready_uptime_us: AtomicU64::new(0),
            ended: tokio::sync::Mutex::default(),
        }
    }

    /// Notes that the host can reach the agent from now on.
    pub(crate) fn ready(&self) {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the value lives through the call.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
        let micros = u64::try_from(time.tv_sec * 1_000_000 + time.tv_nsec / 1000).unwrap_or(0);
        self.ready_uptime_us.store(micros, Ordering::Relaxed);
    }

    /// Microseconds of uptime when the host could reach the agent.
    pub(crate) fn ready_uptime_us(&self) -> u64 {
        self.ready_uptime_us.load(Ordering::Relaxed)
    }

    /// Which VM this is; empty until it is one.
    pub(crate) fn vm_id(&self) -> String {
        // Configure holds the lock while it works; whoever asks then learns that it is not done.
        match self.setup.try_lock().as_deref() {
            Ok(Setup::Done { vm_id, .. }) => vm_id.clone(),
            _ => String::new(),
        }
    }

    /// What the VM's processes see.
    pub(crate) fn workload(&self) -> Result<Arc<Workload>, Status> {
        let workload = self
            .workload
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        workload.ok_or_else(|| Status::failed_precondition("the guest is not a running VM"))
    }

    /// The SSH server.
    pub(crate) fn ssh(&self) -> Option<Arc<ssh::Server>> {
        self.ssh.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs a job that sees what the guest sees.
    pub(crate) async fn in_guest<T>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T, Status>
    where
        T: Send + 'static,
    {
        let result = self.workload()?.run(job).await;
        result.map_err(|error| Status::internal(format!("cannot enter the VM's namespace: {error}")))
    }

    /// Does what every VM of its kind does first.
    pub(crate) async fn rehearse(&self, request: v1::RehearseRequest) -> Result<v1::RehearseReply, Status> {
        let setup = self.setup.lock().await;
        if !matches!(*setup, Setup::New) {
            return Err(Status::failed_precondition("the guest is a VM already"));
        }
        let rehearsed = tokio::task::spawn_blocking(move || configure::rehearse(&request)).await;
        rehearsed
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(v1::RehearseReply {})
    }

    /// Mounts what the VM needs that this guest will be.
    pub(crate) async fn warm(&self, like: v1::ConfigureRequest) -> Result<v1::WarmReply, Status> {
        let mut setup = self.setup.lock().await;
        if !matches!(*setup, Setup::New) {
            return Err(Status::failed_precondition("the guest is warm or a VM already"));
        }
        let plan = configure::plan(like).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let warmed = tokio::task::spawn_blocking(move || configure::warm(plan)).await;
        let warmed = warmed
            .map_err(|error| error.to_string())
            .and_then(|result| result.map_err(|error| error.to_string()));
        match warmed {
            Ok(warmed) => {
                let workload = Some(Arc::clone(&warmed.workload));
                *self.workload.lock().unwrap_or_else(PoisonError::into_inner) = workload;
                *setup = Setup::Warm(warmed);
                Ok(v1::WarmReply {})
            }
            Err(message) => {
                log::warning(&message);
                let status = Status::failed_precondition(message);
                *setup = Setup::Failed(status.clone());
                Err(status)
            }
        }
    }

    /// Makes the guest a VM.
    pub(crate) async fn configure(
        &self,
        request: v1::ConfigureRequest,
    ) -> Result<v1::ConfigureReply, Status> {
        let mut setup = self.setup.lock().await;
        match &*setup {
            Setup::Done { vm_id, reply, .. } if *vm_id == request.vm_id => return Ok(reply.clone()),
            Setup::Done { vm_id, .. } => {
                return Err(Status::failed_precondition(format!(
                    "the guest is VM {vm_id} already"
                )));
            }
            Setup::Failed(status) => return Err(status.clone()),
            Setup::New | Setup::Warm(_) => {}
        }
        let vm_id = request.vm_id.clone();
        let began = Instant::now();
        let ssh_plan = request.ssh.as_ref().map(ssh::plan).transpose();
        let ssh_plan = ssh_plan.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let plan = configure::plan(request).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let planned = began.elapsed();
        let applied = match &*setup {
            Setup::Warm(warmed) => {
                let stages = configure::apply_to(warmed, plan).await;
                stages
                    .map(|stages| (Arc::clone(&warmed.workload), warmed.disks.clone(), stages))
                    .map_err(|error| error.to_string())
            }
            _ => {
                let applied = tokio::task::spawn_blocking(move || configure::apply(&plan)).await;
                let applied = applied
                    .map_err(|error| error.to_string())
                    .and_then(|result| result.map_err(|error| error.to_string()));
                applied.map(
                    |Configured {
                         workload,
                         disks,
                         stages,
                     }| (Arc::new(workload), disks, stages),
                )
            }
        };
        match applied {
            Ok((workload, disks, mut stages)) => {
                let configured = Instant::now();
                if let Some(plan) = ssh_plan {
                    let server = ssh::Server::new(plan, Arc::clone(&workload), Arc::clone(&self.count));
                    if !server.plan().yield_to_sshd {
                        listen_for_ssh(&server);
                    }
                    *self.ssh.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
                }
                *self.workload.lock().unwrap_or_else(PoisonError::into_inner) = Some(workload);
                stages.insert(0, configure::stage("plan", planned));
                stages.push(configure::stage("ssh", configured.elapsed()));
                let reply = v1::ConfigureReply { stages };
                *setup = Setup::Done {
                    vm_id,
                    reply: reply.clone(),
                    disks,
                };
                Ok(reply)
            }
            Err(message) => {
                log::warning(&message);
                let status = Status::failed_precondition(message);
                *setup = Setup::Failed(status.clone());
                Err(status)
            }
        }
    }

    /// Starts the main process.
    pub(crate) async fn start_main(
        &self,
        what: v1::start_main_request::What,
    ) -> Result<v1::StartMainReply, Status> {
        let mut main = self.main.lock().await;
        if let Some(main) = &*main {
            return Ok(main.reply.clone());
        }
        let (what, reply) = match self.try_start(what).await? {
            Ok((what, pid)) => (what, v1::start_main_reply::What::Pid(pid)),
            Err(failure) => (MainProcess::Refused, v1::start_main_reply::What::Failed(failure)),
        };
        if let Some(server) = self.ssh().filter(|server| server.plan().yield_to_sshd) {
            let has_init = matches!(what, MainProcess::Init);
            if !(has_init && self.in_guest(ssh::image_has_sshd).await?) {
                listen_for_ssh(&server);
            }
        }
        let reply = v1::StartMainReply { what: Some(reply) };
        *main = Some(Main {
            what,
            reply: reply.clone(),
        });
        Ok(reply)
    }

    async fn try_start(
        &self,
        what: v1::start_main_request::What,
    ) -> Result<Result<(MainProcess, u32), v1::StartFailure>, Status> {
        match what {
            v1::start_main_request::What::Init(_) => {
                if let Err(failure) = self.in_guest(|| check_init(INIT_PROGRAM)).await? {
                    return Ok(Err(failure));
                }
                let workload = self.workload()?;
                Ok(match self.pid1.become_init(workload.raw_fd()).await {
                    Ok(()) => Ok((MainProcess::Init, 1)),
                    Err(message) => Err(v1::StartFailure {
                        status: 126,
                        message: format!("exec {INIT_PROGRAM}: {message}"),
                    }),
                })
            }
            v1::start_main_request::What::Process(process) => {
                let spawned = match self.in_guest(move || spawn(&process)).await? {
                    Ok(spawned) => spawned,
                    Err(failure) => return Ok(Err(failure)),
                };
                let pid = pid(&spawned);
                let pidfd = spawned
                    .pidfd
                    .try_clone()
                    .map_err(|error| Status::internal(error.to_string()))?;
                let (input, receiver) = mpsc::channel(QUEUE);
                let (output, exited) = (Arc::clone(&self.output), Arc::clone(&self.exited));
                tokio::spawn(async move {
                    session::main_process(spawned, receiver, output, &exited).await;
                });
                Ok(Ok((
                    MainProcess::Process {
                        pidfd: Arc::new(pidfd),
                        input,
                    },
                    pid,
                )))
            }
        }
    }

    /// How the main process is.
    pub(crate) async fn main_state(&self) -> v1::MainState {
        let main = self.main.lock().await;
        match main.as_ref().map(|main| &main.what) {
            Some(MainProcess::Init) => v1::MainState::Init,
            Some(MainProcess::Process { .. }) if self.exited.load(Ordering::Acquire) => v1::MainState::Exited,
            Some(MainProcess::Process { .. }) => v1::MainState::Running,
            Some(MainProcess::Refused) | None => v1::MainState::NotStarted,
        }
    }

    /// The main process's input.
    pub(crate) async fn main_input(&self) -> Result<mpsc::Sender<v1::ProcessInput>, Status> {
        match self.main.lock().await.as_ref().map(|main| &main.what) {
            Some(MainProcess::Process { input, .. }) => Ok(input.clone()),
            _ => Err(Status::failed_precondition(
                "there is no main process to write to",
            )),
        }
    }

    /// Sends the main process a signal.
    pub(crate) async fn signal_main(&self, signal: u32) -> Result<(), Status> {
        let main = self.main.lock().await;
        let sent = match main.as_ref().map(|main| &main.what) {
            Some(MainProcess::Init) => process::kill(1, signal),
            Some(MainProcess::Process { pidfd, .. }) => process::kill_pidfd(pidfd, signal),
            Some(MainProcess::Refused) | None => Err(rustix::io::Errno::SRCH.into()),
        };
        sent.map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => Status::failed_precondition("the main process is not running"),
            Some(libc::EINVAL) => Status::invalid_argument(format!("there is no signal {signal}")),
            _ => Status::internal(format!("cannot signal the main process: {error}")),
        })
    }

    /// Starts one more process whose answers go to `replies`; returns where its input goes.
    pub(crate) async fn exec(
        &self,
        process: v1::Process,
        replies: ExecReplies,
    ) -> Result<Option<mpsc::Sender<v1::ProcessInput>>, Status> {
        match self.in_guest(move || spawn(&process)).await? {
            Ok(spawned) => {
                let (sender, input) = mpsc::channel(QUEUE);
                tokio::spawn(session::exec(
                    spawned,
                    input,
                    replies,
                    self.count.open(Kind::Exec),
                ));
                Ok(Some(sender))
            }
            Err(failure) => {
                let failed = session::reply(v1::exec_reply::What::Failed(failure));
                // A caller that is gone needs no answer.
                drop(replies.send(Ok(failed)).await);
                Ok(None)
            }
        }
    }

    /// Ends the VM and says whether its disks are clean; a second call waits for the first.
    pub(crate) async fn shut_down(&self, grace: Duration) -> bool {
        let mut ended = self.ended.lock().await;
        if let Some(clean) = *ended {
            return clean;
        }
        let init = matches!(
            self.main.lock().await.as_ref().map(|main| &main.what),
            Some(MainProcess::Init)
        );
        let way = if init {
            shutdown::Way::Init
        } else {
            shutdown::Way::Processes
        };
        // Nothing new starts from here on.
        let workload = self
            .workload
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let ssh = self.ssh();
        if let Some(server) = &ssh {
            server.refuse();
        }
        shutdown::end_processes(way, grace).await;
        // After the processes, so that their last words and statuses have been sent.
        if let Some(server) = ssh {
            server.close().await;
        }
        drop(workload);
        let disks = match &*self.setup.lock().await {
            Setup::Done { disks, .. } => disks.clone(),
            Setup::Warm(warmed) => warmed.disks.clone(),
            Setup::New | Setup::Failed(_) => Vec::new(),
        };
        let released = tokio::task::spawn_blocking(move || shutdown::release(way, &disks)).await;
        let clean = released.unwrap_or(false);
        *ended = Some(clean);
        clean
    }
}

/// Listens where the plan says. A guest whose port cannot be had is one without that port; the channel is still there.
fn listen_for_ssh(server: &Arc<ssh::Server>) {
    if let Some(port) = server.plan().port
        && let Err(error) = ssh::listen(server, port)
    {
        log::warning(format_args!("cannot listen for SSH on port {port}: {error}"));
    }
}

/// The process's id, as the contract has it.
pub(crate) fn pid(spawned: &Spawned) -> u32 {
    spawned.pid.as_raw_nonzero().get().unsigned_abs()
}
