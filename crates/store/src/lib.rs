//! What is kept: SQLite rows and content-addressed files.

pub mod blobs;
pub mod db;
