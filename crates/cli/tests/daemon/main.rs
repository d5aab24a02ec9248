//! The program as a process of its own, against a daemon with chosen answers.

#![expect(clippy::print_stdout, reason = "what was skipped is for people")]

mod commands;
mod doctor;
mod fake;
mod names;
mod sessions;
mod ssh;
