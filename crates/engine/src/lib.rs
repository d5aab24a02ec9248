//! The life of a VM.
//!
//! ```text
//!           requests (mpsc)                     hooks, in order to start, backwards to stop
//! daemon ───────────────────► owner task ──────────────────────────────► capabilities
//!        ◄─────────────────── one per VM  ◄────────────────────────────── machine exit, main exit
//!           view (watch)          │
//!                                 └── row in the database, written before what it announces
//! ```
//!
//! Read in this order: [`request`] says which request is legal when; [`admission`] which VM fits this host;
//! [`capability`] is what a VM is put together from; [`run`] is one run of a VM; [`operation`] puts hooks into timed
//! stages and undoes them, [`operation_log`] keeps them; [`owner`] is the task that owns a VM; [`engine`] keeps all owners; [`reconcile`] mends what a
//! crash left. [`output`] is what the main process wrote, [`events`] what happened, [`measure`] the same as
//! numbers. [`networks`] are what VMs are on, [`tap_pool`] their TAPs before they have them, [`zone`] what they are called there.
//!
//! [`templates`] are VMs that were booted once and saved, so that others need not; [`slots`] are VMs that
//! were restored from them and wait for somebody.
//!
//! Not here: HTTP, images, how a base is made. Back ends come in as values ([`engine::Parts`]).

pub mod request;

pub mod admission;
pub mod capabilities;
pub mod capability;
pub mod definition;
pub mod paths;
pub mod run;
pub mod shares;
pub mod ssh_keys;

mod exit;
pub mod fail_point;
pub mod measure;
pub mod operation;
pub mod operation_log;
pub mod output;

pub mod engine;
pub mod error;
pub mod events;
pub mod names;
pub mod networks;
pub mod owner;
mod preflight;
pub mod reconcile;
mod restart;
pub mod slots;
pub mod tap_pool;
pub mod templates;
pub mod zone;
