//! The DNS server with real clients, each test in a network namespace of its own.
//!
//! ```text
//! namespace of the test                       namespace of a client
//!   gateway on the host's side of a veth ◄────► a VM's address
//!   127.0.0.1: upstreams that the test runs
//! ```

#![expect(clippy::print_stdout, reason = "what was skipped is for people")]

mod clients;
mod hostile;
mod ours;
mod upstreams;
mod world;
