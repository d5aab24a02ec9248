//! The fake Firecracker as a program: see `offshoot_fake_vmm::firecracker`.

use std::process::ExitCode;

use offshoot_fake_vmm::{firecracker, main_of};

fn main() -> ExitCode {
    main_of(firecracker::VERSION, firecracker::run)
}
