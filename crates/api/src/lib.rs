//! The daemon's HTTP API: what goes over the wire, and a client for it.
//!
//! HTTP/1.1 and JSON over a Unix socket. Everything is under `/v1`; the OpenAPI document is at `/openapi.json`.
//! Five shapes besides plain JSON:
//!
//! * long work (pull, import, bootstrap, prepare, verify, kernel add, doctor's fixes) answers with one JSON [`progress::Line`] a line
//!   (`application/x-ndjson`), the last one being the result or the error;
//! * `events` answers with one JSON [`offshoot_model::Event`] a line, as they happen;
//! * `attach` and `exec` are WebSockets whose binary messages start with a channel byte, see [`channel`];
//! * `ssh` is a WebSocket whose binary messages are the bytes of one SSH connection, see [`ssh`];
//! * `logs` is a sequence of [`log_frame`] frames, as Docker multiplexes them.

/// The version of the API, the first part of every path.
pub const API_VERSION: &str = "v1";

pub mod channel;
pub mod client;
pub mod dns;
pub mod doctor;
pub mod error;
pub mod event;
pub mod image;
pub mod kernel;
pub mod log_frame;
pub mod network;
pub mod operation;
pub mod progress;
pub mod prune;
pub mod ssh;
pub mod stats;
pub mod system;
pub mod template;
pub mod usage;
pub mod vm;
