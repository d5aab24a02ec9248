//! Daemons whose VMs cost nothing: the fake VMM in QEMU's place, for tests of many VMs and many operations.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::{Daemon, bin_dir};

/// Where Debian puts the real one.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

fn program() -> PathBuf {
    let program = bin_dir().join("offshoot-fake-vmm");
    assert!(
        program.exists(),
        "there is no {}; run `make test`, which builds it",
        program.display()
    );
    program
}

/// Settings that put a program in QEMU's place, with more settings. Fakes touch none of the memory that they are
/// promised, so any number of them may be promised theirs.
fn instead_of_qemu(program: &Path, settings: &str) -> String {
    // A script finds the fake beside it.
    format!(
        "qemu = {:?}\nvmm_files = [{:?}]\nmemory_overcommit = 1000.0\n{settings}",
        program.display().to_string(),
        bin_dir().display().to_string()
    )
}

impl Daemon {
    /// The memory of VMs that [`start_fake_beside_qemu`](Self::start_fake_beside_qemu) runs on the fake, MiB.
    pub const FAKE_MEMORY_MIB: u64 = 64;

    /// A daemon with the golden image and kernel, and more lines in its config, whose every VM is a fake: its guest
    /// has an agent and pretend processes, but no processor and no files.
    pub fn start_fake(settings: &str) -> Self {
        Self::start_with(&instead_of_qemu(&program(), settings))
    }

    /// The settings of [`start_fake`](Self::start_fake), with these.
    pub fn fake_settings(settings: &str) -> String {
        instead_of_qemu(&program(), settings)
    }

    /// The same, on a file system that has so many MiB left beside the image.
    pub fn start_fake_on_small_disk(mib: u64) -> Self {
        Self::start_on_small_disk_with(mib, &instead_of_qemu(&program(), ""))
    }

    /// The same as [`start_fake`](Self::start_fake), but only VMs of [`FAKE_MEMORY_MIB`](Self::FAKE_MEMORY_MIB) are fakes; all others run on the real QEMU.
    pub fn start_fake_beside_qemu(settings: &str) -> Self {
        let script = format!(
            "#!/bin/sh\n# Made by the tests.\ncase \" $* \" in\n*\" size={}M\"*) exec '{}' \"$@\" ;;\nesac\nexec {QEMU} \"$@\"\n",
            Self::FAKE_MEMORY_MIB,
            program().display()
        );
        let folder = bin_dir().parent().expect("target").join("e2e");
        std::fs::create_dir_all(&folder).expect("target/e2e");
        // Whole or not at all: another test may be reading it.
        let unfinished = tempfile::Builder::new()
            .permissions(PermissionsExt::from_mode(0o755))
            .tempfile_in(&folder)
            .expect("a script");
        std::fs::write(unfinished.path(), script).expect("the script");
        let path = folder.join("fake-or-qemu");
        unfinished.persist(&path).expect("rename");
        Self::start_with(&instead_of_qemu(&path, settings))
    }
}
