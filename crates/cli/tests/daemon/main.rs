//! The program as a process of its own, against a daemon with chosen answers.

mod commands;
mod doctor;
mod fake;
mod sessions;
