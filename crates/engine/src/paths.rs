//! Where the files of one VM lie.

use std::path::{Path, PathBuf};

use offshoot_model::VmId;

/// The folders of one VM: `<data>/vms/<id>` for what it keeps, `<run>/vms/<id>` for sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmPaths {
    data: PathBuf,
    run: PathBuf,
}

impl VmPaths {
    /// The folders of `id`.
    pub fn new(data_dir: &Path, run_dir: &Path, id: &VmId) -> Self {
        Self {
            data: data_dir.join("vms").join(id.as_str()),
            run: run_dir.join("vms").join(id.as_str()),
        }
    }

    /// What it keeps; gone after `rm`.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Its sockets; gone after it stopped.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The overlay disk.
    pub fn overlay(&self) -> PathBuf {
        self.data.join("overlay.ext4")
    }

    /// The work disk.
    pub fn work(&self) -> PathBuf {
        self.data.join("work.ext4")
    }

    /// The private root of a VM whose root is a copy.
    pub fn root_copy(&self) -> PathBuf {
        self.data.join("root.ext4")
    }

    /// Where the VMM meets the virtiofsd of a share.
    pub fn share_socket(&self, tag: &str) -> PathBuf {
        self.run.join(format!("{tag}.sock"))
    }

    /// Where it is said which control group its processes are in.
    pub fn cgroup(&self) -> PathBuf {
        self.run.join("cgroup.json")
    }

    /// What its virtiofsds wrote.
    pub fn virtiofsd_log(&self) -> PathBuf {
        self.data.join("virtiofsd.log")
    }

    /// The private key by which SSH clients know it again; root's alone.
    pub fn ssh_host_key(&self) -> PathBuf {
        self.data.join("ssh_host_ed25519_key")
    }

    /// What its main process wrote.
    pub fn output(&self) -> PathBuf {
        self.data.join("output.log")
    }

    /// What its kernel and agent wrote.
    pub fn console(&self) -> PathBuf {
        self.data.join("console.log")
    }

    /// What its VMM wrote.
    pub fn vmm_log(&self) -> PathBuf {
        self.data.join("vmm.log")
    }
}
