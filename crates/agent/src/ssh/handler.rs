//! What a client asks for on its connection, one method for each request of RFC 4252 and RFC 4254.
//!
//! The library calls these on the connection's own task, so none of them waits for anything but a thread of the guest's.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use offshoot_agent_proto::v1;
use russh::keys::{Algorithm, PublicKey};
use russh::server::{Auth, ChannelOpenHandle, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, ChannelWriteHalf, Pty, Sig};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Server;
use super::agent_socket;
use super::connection::Peer;
use super::forward::{Forwards, Guest};
use super::inbox::{Inbox, Inboxes, TRICKLE};
use super::login::Request;
use super::shell::{Control, Shell};
use crate::count::{Kind, Open};
use crate::spawn::user_files;
use crate::users::{self, Login};

/// Shells, commands and file servers at once on one connection.
const MAX_SESSIONS: usize = 64;

/// Environment variables that a client may set, and how long one may be.
const MAX_VARIABLES: usize = 64;
const MAX_VARIABLE: usize = 4096;

/// The longest command line, as Linux takes one argument.
const MAX_COMMAND: usize = 128 << 10;

/// Window sizes and signals that wait for their process.
const CONTROLS: usize = 16;

/// A terminal that was asked for.
pub(super) struct Terminal {
    /// `TERM`.
    pub(super) term: String,
    /// Its size.
    pub(super) window: v1::WindowSize,
    /// Its modes.
    pub(super) modes: Vec<(Pty, u32)>,
}

/// A session channel on which nothing runs yet.
struct Waiting {
    out: ChannelWriteHalf<Msg>,
    inbox: Inbox,
    environment: Vec<String>,
    terminal: Option<Terminal>,
    permit: OwnedSemaphorePermit,
}

enum SessionState {
    Waiting(Box<Waiting>),
    Running(mpsc::Sender<Control>),
}

/// One client.
pub(super) struct Handler {
    server: Arc<Server>,
    peer: Peer,
    more_keys: Vec<PublicKey>,
    logged_in: CancellationToken,
    login: Option<Login>,
    /// Counts the connection once it is known.
    counted: Option<Open>,
    inboxes: Arc<Inboxes>,
    sessions: HashMap<ChannelId, SessionState>,
    permits: Arc<Semaphore>,
    forwards: Forwards,
    agent: Option<PathBuf>,
    over: CancellationToken,
    _ends_with_us: DropGuard,
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.inboxes.close_all();
    }
}

/// What a client may set: its language and how it shows text.
fn may_be_set(name: &str) -> bool {
    name == "LANG" || name.starts_with("LC_") || matches!(name, "COLORTERM" | "NO_COLOR")
}

fn window(cols: u32, rows: u32) -> v1::WindowSize {
    v1::WindowSize { rows, cols }
}

impl Handler {
    pub(super) fn new(
        server: Arc<Server>,
        peer: Peer,
        more_keys: Vec<PublicKey>,
        logged_in: CancellationToken,
    ) -> Self {
        let over = CancellationToken::new();
        Self {
            server,
            peer,
            more_keys,
            logged_in,
            login: None,
            counted: None,
            inboxes: Arc::default(),
            sessions: HashMap::new(),
            permits: Arc::new(Semaphore::new(MAX_SESSIONS)),
            forwards: Forwards::new(over.clone()),
            agent: None,
            _ends_with_us: over.clone().drop_guard(),
            over,
        }
    }

    /// Whether a key lets somebody in, and as whom. Who is not there takes as long as who is.
    async fn admit(&mut self, user: &str, key: &PublicKey, algorithm: &Algorithm) -> Auth {
        self.login = None;
        let Some(workload) = self.server.workload() else {
            return Auth::reject();
        };
        let name = user.to_owned();
        let login = workload.run(move || {
            let (passwd, group) = user_files();
            users::login(&name, &passwd, &group)
        });
        let login = login.await.ok().flatten();
        let mut keys = self.server.plan.keys.iter().chain(&self.more_keys);
        let known = keys.any(|known| known.key_data() == key.key_data());
        // RSA with SHA-1 is not what the client was told to use, but it may try.
        let modern = !matches!(algorithm, Algorithm::Rsa { hash: None } | Algorithm::Dsa);
        if !known || !modern || login.is_none() {
            return Auth::reject();
        }
        self.login = login;
        Auth::Accept
    }

    /// What forwards need to know; nothing before the log-in.
    fn guest(&self) -> Option<Guest> {
        Some(Guest {
            server: Arc::clone(&self.server),
            workload: self.server.workload()?,
            identity: self.login.as_ref()?.identity.clone(),
            inboxes: Arc::clone(&self.inboxes),
        })
    }

    fn waiting(&mut self, channel: ChannelId) -> Option<&mut Waiting> {
        match self.sessions.get_mut(&channel) {
            Some(SessionState::Waiting(waiting)) => Some(waiting),
            _ => None,
        }
    }

    /// Starts what a session is for, once.
    fn start(
        &mut self,
        channel: ChannelId,
        request: Request,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let (Some(login), Some(workload)) = (self.login.clone(), self.server.workload()) else {
            return session.channel_failure(channel);
        };
        let waiting = match self.sessions.remove(&channel) {
            Some(SessionState::Waiting(waiting)) => *waiting,
            Some(running) => {
                self.sessions.insert(channel, running);
                return session.channel_failure(channel);
            }
            None => return session.channel_failure(channel),
        };
        let (control, controls) = mpsc::channel(CONTROLS);
        self.sessions.insert(channel, SessionState::Running(control));
        let mut environment = self.server.plan.environment.clone();
        environment.extend(waiting.environment);
        let variables = self.peer.variables();
        environment.extend(variables.iter().map(|(name, value)| format!("{name}={value}")));
        environment.extend(
            self.agent
                .iter()
                .map(|path| format!("SSH_AUTH_SOCK={}", path.display())),
        );
        let shell = Shell {
            request,
            login,
            environment,
            terminal: waiting.terminal,
            sftp_program: self.server.sftp_program.clone(),
            workload,
            inbox: waiting.inbox,
            out: waiting.out,
            handle: session.handle(),
            controls,
        };
        session.channel_success(channel)?;
        let (inboxes, permit) = (Arc::clone(&self.inboxes), waiting.permit);
        self.server.tasks.spawn(async move {
            shell.run().await;
            inboxes.close(channel);
            drop(permit);
        });
        Ok(())
    }

    fn control(&self, channel: ChannelId, control: Control) {
        if let Some(SessionState::Running(controls)) = self.sessions.get(&channel) {
            // Who sends more than a process can take is not heard.
            let _ = controls.try_send(control);
        }
    }
}

impl russh::server::Handler for Handler {
    type Error = russh::Error;

    async fn auth_publickey_offered(
        &mut self,
        user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(self.admit(user, offer.public_key, offer.algorithm).await)
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(self.admit(user, key.public_key, key.algorithm).await)
    }

    async fn auth_succeeded(&mut self, _: &mut Session) -> Result<(), Self::Error> {
        self.counted = Some(self.server.count.open(Kind::Ssh));
        self.logged_in.cancel();
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        self.sessions.retain(|_, state| match state {
            SessionState::Waiting(_) => true,
            SessionState::Running(controls) => !controls.is_closed(),
        });
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        // What comes in comes to `data`; nobody reads the library's own copy.
        let (_, out) = channel.split();
        let id = out.id();
        self.inboxes.insert(id);
        let Some(inbox) = self.inboxes.inbox(id) else {
            return Ok(());
        };
        let waiting = Waiting {
            out,
            inbox,
            environment: Vec::new(),
            terminal: None,
            permit,
        };
        self.sessions.insert(id, SessionState::Waiting(Box::new(waiting)));
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        if let Some(guest) = self.guest() {
            self.forwards.direct_tcp(guest, channel, host, port, reply).await;
        }
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        channel: Channel<Msg>,
        path: &str,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        if let Some(guest) = self.guest() {
            self.forwards.direct_local(guest, channel, path, reply).await;
        }
        Ok(())
    }

    async fn channel_open_confirmation(
        &mut self,
        id: ChannelId,
        _: u32,
        _: u32,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        // One that we opened; whoever did finds its inbox when it hears of the confirmation.
        self.inboxes.insert(id);
        Ok(())
    }

    async fn channel_close(&mut self, channel: ChannelId, _: &mut Session) -> Result<(), Self::Error> {
        self.sessions.remove(&channel);
        self.inboxes.close(channel);
        Ok(())
    }

    async fn channel_eof(&mut self, channel: ChannelId, _: &mut Session) -> Result<(), Self::Error> {
        self.inboxes.end(channel);
        Ok(())
    }

    async fn data(&mut self, channel: ChannelId, data: &[u8], _: &mut Session) -> Result<(), Self::Error> {
        if !self.inboxes.put(channel, data) {
            return Err(russh::Error::Inconsistent);
        }
        if data.len() <= TRICKLE as usize && self.inboxes.room(channel) == TRICKLE {
            tokio::time::sleep(self.inboxes.pause(channel)).await;
        }
        Ok(())
    }

    fn adjust_window(&mut self, channel: ChannelId, _: u32) -> u32 {
        self.inboxes.room(channel)
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        cols: u32,
        rows: u32,
        _: u32,
        _: u32,
        modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match self.waiting(channel) {
            Some(waiting) if term.len() <= MAX_VARIABLE && !term.contains('\0') => {
                waiting.terminal = Some(Terminal {
                    term: term.to_owned(),
                    window: window(cols, rows),
                    modes: modes.to_vec(),
                });
                session.channel_success(channel)
            }
            _ => session.channel_failure(channel),
        }
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _: bool,
        _: &str,
        _: &str,
        _: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(channel)
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let fits =
            name.len() + value.len() <= MAX_VARIABLE && !name.contains(['\0', '=']) && !value.contains('\0');
        match self.waiting(channel) {
            Some(waiting) if fits && may_be_set(name) && waiting.environment.len() < MAX_VARIABLES => {
                waiting.environment.push(format!("{name}={value}"));
                session.channel_success(channel)
            }
            _ => session.channel_failure(channel),
        }
    }

    async fn shell_request(&mut self, channel: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        self.start(channel, Request::Shell, session)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        command: &[u8],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match std::str::from_utf8(command) {
            Ok(command) if command.len() < MAX_COMMAND && !command.contains('\0') => {
                self.start(channel, Request::Command(command.to_owned()), session)
            }
            _ => session.channel_failure(channel),
        }
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match name {
            "sftp" => self.start(channel, Request::Sftp, session),
            _ => session.channel_failure(channel),
        }
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        cols: u32,
        rows: u32,
        _: u32,
        _: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.control(channel, Control::Window(window(cols, rows)));
        session.channel_success(channel)
    }

    async fn agent_request(&mut self, _: ChannelId, session: &mut Session) -> Result<bool, Self::Error> {
        if self.agent.is_none()
            && let Some(guest) = self.guest()
        {
            let opened = agent_socket::open(guest, session.handle(), self.over.clone()).await;
            self.agent = opened.ok();
        }
        Ok(self.agent.is_some())
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        signal: Sig,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.control(channel, Control::Signal(signal));
        session.channel_success(channel)
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        session: &mut Session,
    ) -> Result<bool, Self::Error> {
        let Some(guest) = self.guest() else {
            return Ok(false);
        };
        let bound = self
            .forwards
            .listen_tcp(guest, session.handle(), address, *port)
            .await;
        *port = bound.unwrap_or(*port);
        Ok(bound.is_some())
    }

    async fn cancel_tcpip_forward(
        &mut self,
        address: &str,
        port: u32,
        _: &mut Session,
    ) -> Result<bool, Self::Error> {
        Ok(self.forwards.cancel_tcp(address, port))
    }

    async fn streamlocal_forward(&mut self, path: &str, session: &mut Session) -> Result<bool, Self::Error> {
        let Some(guest) = self.guest() else {
            return Ok(false);
        };
        Ok(self.forwards.listen_local(guest, session.handle(), path).await)
    }

    async fn cancel_streamlocal_forward(&mut self, path: &str, _: &mut Session) -> Result<bool, Self::Error> {
        Ok(self.forwards.cancel_local(path))
    }
}
