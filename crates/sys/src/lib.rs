//! What the operating system offers, as safe functions. The one host crate with `unsafe`.

pub mod cgroup;
pub mod clock;
pub mod clone;
pub mod durable;
pub mod kvm;
pub mod lock;
pub mod memory;
pub mod memory_file;
pub mod process;
pub mod programs;
pub mod random;
pub mod signal;
pub mod smaps;
pub mod space;
pub mod tap;
pub mod tsc;
pub mod usage;
