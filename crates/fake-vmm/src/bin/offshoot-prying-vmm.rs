//! A VMM that its guest has taken over, as a program: see `offshoot_fake_vmm::prying`.

use std::process::ExitCode;

fn main() -> ExitCode {
    offshoot_fake_vmm::prying::main()
}
