//! Networks of VMs in the host's kernel: bridges and TAPs, addresses, what may talk to what, names.
//!
//! Nothing here knows VMs beyond their ids, names and [`Attachment`](offshoot_model::Attachment)s. Everything happens in one
//! [`Namespace`], which is the host's own or one with a name.

pub mod allocate;
pub mod counters;
pub mod dns;
pub mod firewall;
pub mod host_ports;
pub mod links;
mod namespace;
pub mod ports;
pub mod tap_pool;

pub use namespace::{Namespace, NamespaceError};
