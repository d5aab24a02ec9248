//! The messages of `attach` and `exec`, as Kubernetes numbers them (`v5.channel.k8s.io`).
//!
//! Every binary WebSocket message is one channel byte and data. Client to daemon: [`STDIN`], [`RESIZE`],
//! [`CLOSE`], [`SIGNAL`] (ours). Daemon to client: [`STDOUT`], [`STDERR`], [`STATUS`], which comes once and last.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ApiError;
use offshoot_model::ProcessConfig;

/// WebSocket subprotocol that both sides name.
pub const SUBPROTOCOL: &str = "v5.channel.k8s.io";
/// Data for standard input.
pub const STDIN: u8 = 0;
/// Data from standard output (everything, with a terminal).
pub const STDOUT: u8 = 1;
/// Data from standard error.
pub const STDERR: u8 = 2;
/// A JSON [`Status`].
pub const STATUS: u8 = 3;
/// A JSON [`WindowSize`].
pub const RESIZE: u8 = 4;
/// A signal number as decimal text. Not part of Kubernetes' protocol.
pub const SIGNAL: u8 = 5;
/// Closes the channel whose number is the one data byte; only [`STDIN`] can be closed.
pub const CLOSE: u8 = 255;

/// The largest message either side takes: one channel byte and 64 KiB.
pub const MAX_MESSAGE: usize = 64 * 1024 + 1;

/// The size of a terminal in characters. The fields are spelled as Kubernetes spells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "PascalCase")]
pub struct WindowSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum Status {
    /// The process ended.
    Exited {
        /// Its status as a shell counts it.
        code: i32,
    },
    /// It could not be started (126, 127) or the session broke (125).
    Failed {
        /// What the client should exit with: 125, 126 or 127.
        code: i32,
        /// Why.
        error: ApiError,
    },
}

/// The first message of an `exec` session, as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecStart {
    /// What to run; an empty user, working directory or environment is the VM's own.
    pub process: ProcessConfig,
    /// The client's window, with a terminal.
    #[serde(default)]
    pub window: Option<WindowSize>,
    /// Only start it: [`STATUS`] comes once it runs, and it runs on without this client.
    #[serde(default)]
    pub detach: bool,
}
