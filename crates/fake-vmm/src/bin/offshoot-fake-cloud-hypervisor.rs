//! The fake Cloud Hypervisor as a program: see `offshoot_fake_vmm::cloud_hypervisor`.

use std::process::ExitCode;

use offshoot_fake_vmm::{cloud_hypervisor, main_of};

fn main() -> ExitCode {
    main_of(cloud_hypervisor::VERSION, cloud_hypervisor::run)
}
