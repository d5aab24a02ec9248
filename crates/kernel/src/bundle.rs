//! Makes the three files of a bundle in a folder, from files that are there: no network, no other program.

use std::io;
use std::path::{Path, PathBuf};

use object::elf::{EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_INTERP};
use object::endian::LittleEndian;
use object::read::elf::{FileHeader, ProgramHeader};
use offshoot_model::{ByteSize, Digest, KernelId, Progress, ProgressUnit};
use sha2::{Digest as _, Sha256};

use crate::initramfs::{self, INITRAMFS_MAX, InitramfsError};
use crate::manifest::{FORMAT, FileInfo, KernelManifest, KernelSource};
use crate::modinfo::without_signature;
use crate::module_tree::{ModuleTree, read_limited};
use crate::modules::{self, ModuleError};
use crate::vmlinux::{CONFIG_MAX, VMLINUX_MAX, Vmlinux, VmlinuxError};

/// The largest agent: ours has a few MiB.
const AGENT_MAX: u64 = 128 << 20;

/// The kernel's file in a bundle.
pub(crate) const VMLINUX: &str = "vmlinux";
/// The initramfs in a bundle.
pub(crate) const INITRAMFS: &str = "initramfs";
/// The manifest in a bundle.
pub(crate) const MANIFEST: &str = "kernel.json";

/// Why a bundle cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of the bundle cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel is none we can use.
    #[error("cannot use {} as a kernel", path.display())]
    Vmlinux {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: VmlinuxError,
    },
    /// The modules do not suffice.
    #[error("cannot choose modules for Linux {release}")]
    Modules {
        /// The kernel's release.
        release: String,
        /// Why not.
        #[source]
        source: ModuleError,
    },
    /// The agent cannot be PID 1.
    #[error("cannot use {} as the agent: {what}", path.display())]
    Agent {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The initramfs cannot be made.
    #[error("cannot make the initramfs")]
    Initramfs {
        /// Why not.
        #[source]
        source: InitramfsError,
    },
}

/// The agent, read and checked.
pub(crate) struct Agent {
    pub(crate) bytes: Vec<u8>,
    pub(crate) info: FileInfo,
}

impl Agent {
    /// Reads a program that can be PID 1 of an initramfs: static, for this machine.
    pub(crate) fn read(path: &Path) -> Result<Self, BuildError> {
        let bytes = read_limited(path, AGENT_MAX).map_err(|source| BuildError::Read {
            path: path.to_owned(),
            source,
        })?;
        if let Some(what) = why_not_an_agent(&bytes) {
            return Err(BuildError::Agent {
                path: path.to_owned(),
                what,
            });
        }
        Ok(Self {
            info: info(&bytes),
            bytes,
        })
    }
}

fn why_not_an_agent(bytes: &[u8]) -> Option<&'static str> {
    const NO_PROGRAM: &str = "it is not an x86-64 program";
    let Ok(header) = FileHeader64::<LittleEndian>::parse(bytes) else {
        return Some(NO_PROGRAM);
    };
    let Ok(endian) = header.endian() else {
        return Some(NO_PROGRAM);
    };
    if header.e_machine(endian) != EM_X86_64 || !matches!(header.e_type(endian), ET_EXEC | ET_DYN) {
        return Some(NO_PROGRAM);
    }
    let Ok(segments) = header.program_headers(endian, bytes) else {
        return Some(NO_PROGRAM);
    };
    let is_dynamic = segments.iter().any(|segment| segment.p_type(endian) == PT_INTERP);
    is_dynamic.then_some("it is not linked statically, and an initramfs has no libraries")
}

/// What a bundle is made of.
pub(crate) struct BundleInput {
    /// An ELF vmlinux or a bzImage.
    pub(crate) kernel: PathBuf,
    /// `/lib/modules/<release>`, or a folder that has it below; `None` when all is built in.
    pub(crate) modules: Option<PathBuf>,
    /// Where the kernel came from.
    pub(crate) source: KernelSource,
}

/// Makes a bundle's files in `dir`.
pub(crate) fn build(
    input: &BundleInput,
    agent: &Agent,
    dir: &Path,
    created_unix_ms: u64,
    progress: &Progress,
) -> Result<KernelManifest, BuildError> {
    let task = progress.start("unpacking the kernel", ProgressUnit::Items, None);
    let bytes = read_limited(&input.kernel, VMLINUX_MAX as u64).map_err(|source| BuildError::Read {
        path: input.kernel.clone(),
        source,
    })?;
    let kernel = Vmlinux::parse(bytes).map_err(|source| BuildError::Vmlinux {
        path: input.kernel.clone(),
        source,
    })?;
    progress.finish(task);

    let task = progress.start("writing the initramfs", ProgressUnit::Items, None);
    let choose = || {
        let modules_dir = input
            .modules
            .as_deref()
            .map(|dir| find_modules(dir, &kernel.release))
            .transpose()?;
        let config = kernel
            .config()
            .or_else(|| read_config(&input.kernel, &kernel.release));
        let tree = ModuleTree::open(modules_dir.as_deref(), config.as_deref())?;
        let mut plan = modules::plan(&tree, &kernel.release)?;
        plan.features.pvh = kernel.pvh;
        Ok((
            tree,
            plan,
            config.is_some_and(|config| takes_unsigned_modules(&config)),
        ))
    };
    let (tree, plan, unsigned) = choose().map_err(|source| BuildError::Modules {
        release: kernel.release.clone(),
        source,
    })?;
    let read = |name: &str| {
        let module = tree.read(name)?;
        Ok(if unsigned {
            without_signature(&module).to_vec()
        } else {
            module
        })
    };
    let initramfs =
        initramfs::build(&agent.bytes, &plan, read).map_err(|source| BuildError::Initramfs { source })?;
    let manifest = KernelManifest {
        format: FORMAT,
        arch: "x86_64".to_owned(),
        release: kernel.release,
        source: input.source.clone(),
        modules: plan.modules(),
        builtin: tree.knowledge(),
        features: plan.features,
        agent: agent.info,
        vmlinux: info(&kernel.elf),
        initramfs: info(&initramfs),
        created_unix_ms,
    };
    write(&dir.join(VMLINUX), &kernel.elf)?;
    write(&dir.join(INITRAMFS), &initramfs)?;
    write_manifest(dir, &manifest)?;
    progress.finish(task);
    Ok(manifest)
}

/// Makes in `dir` what the bundle `old` in `old_dir` is, with another agent.
pub(crate) fn rebuild(
    old: &KernelManifest,
    old_dir: &Path,
    agent: &Agent,
    dir: &Path,
    created_unix_ms: u64,
) -> Result<KernelManifest, BuildError> {
    let (from, to) = (old_dir.join(VMLINUX), dir.join(VMLINUX));
    // Neither is ever written to, so they may be one file. Links fail on some file systems and past some number.
    if std::fs::hard_link(&from, &to).is_err() {
        std::fs::copy(&from, &to).map_err(|source| BuildError::Write { path: to, source })?;
    }
    let from = old_dir.join(INITRAMFS);
    let archive =
        read_limited(&from, INITRAMFS_MAX).map_err(|source| BuildError::Read { path: from, source })?;
    let initramfs = initramfs::replace_agent(&archive, &agent.bytes)
        .map_err(|source| BuildError::Initramfs { source })?;
    let manifest = KernelManifest {
        agent: agent.info,
        initramfs: info(&initramfs),
        created_unix_ms,
        ..old.clone()
    };
    write(&dir.join(INITRAMFS), &initramfs)?;
    write_manifest(dir, &manifest)?;
    Ok(manifest)
}

/// The id of a bundle: over what a VM gets to see, and not over when or from where it came.
pub(crate) fn id(manifest: &KernelManifest) -> KernelId {
    let text = format!(
        "offshoot kernel bundle {}\nvmlinux {}\ninitramfs {}\n",
        manifest.format, manifest.vmlinux.digest, manifest.initramfs.digest
    );
    KernelId::from_bytes(&Sha256::digest(text))
}

/// `dir` itself where it is a `/lib/modules/<release>`, else the one of `release` below it.
fn find_modules(dir: &Path, release: &str) -> Result<PathBuf, ModuleError> {
    if dir.join("kernel").is_dir() || dir.join("modules.builtin").is_file() {
        return Ok(dir.to_owned());
    }
    // The release has been checked for `/` and `..` where it was read.
    ["lib/modules", "usr/lib/modules", ""]
        .iter()
        .map(|parent| dir.join(parent).join(release))
        .find(|dir| dir.is_dir())
        .ok_or_else(|| ModuleError::NoTree {
            path: dir.to_owned(),
            release: release.to_owned(),
        })
}

/// The configuration that distributions put beside their kernel.
fn read_config(kernel: &Path, release: &str) -> Option<String> {
    let path = kernel.parent()?.join(format!("config-{release}"));
    String::from_utf8(read_limited(&path, CONFIG_MAX as u64).ok()?).ok()
}

/// Whether a kernel with this configuration loads modules without a signature.
///
/// Where it does, the signature only costs: checking those of the base group takes a guest 0.2 s under emulation. The
/// modules come out of a package that was checked, in an initramfs that the host hands over.
fn takes_unsigned_modules(config: &str) -> bool {
    const INSISTS: [&str; 3] = [
        "CONFIG_MODULE_SIG_FORCE=y",
        "CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY=y",
        "CONFIG_LOCK_DOWN_KERNEL_FORCE_CONFIDENTIALITY=y",
    ];
    !config.lines().any(|line| INSISTS.contains(&line))
}

fn info(bytes: &[u8]) -> FileInfo {
    FileInfo {
        size: ByteSize::from_bytes(bytes.len() as u64),
        digest: Digest::from_bytes(Sha256::digest(bytes).into()),
    }
}

fn write_manifest(dir: &Path, manifest: &KernelManifest) -> Result<(), BuildError> {
    let path = dir.join(MANIFEST);
    let json = serde_json::to_vec_pretty(manifest).map_err(|error| BuildError::Write {
        path: path.clone(),
        source: error.into(),
    })?;
    write(&path, &json)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    std::fs::write(path, bytes).map_err(|source| BuildError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A static program, as far as its headers say.
    pub(crate) fn agent(tail: &[u8]) -> Vec<u8> {
        crate::vmlinux::tests::elf(EM_X86_64.0, 0, tail)
    }

    #[test]
    fn an_agent_is_static_and_for_this_machine() {
        let check = |bytes: &[u8], expected: Option<&str>| assert_eq!(why_not_an_agent(bytes), expected);
        let not_a_program = Some("it is not an x86-64 program");
        check(&agent(b""), None);
        check(b"#!/bin/sh", not_a_program);
        check(&crate::vmlinux::tests::elf(183, 0, b""), not_a_program);
        let mut dynamic = agent(b"");
        dynamic[64] = 3;
        check(
            &dynamic,
            Some("it is not linked statically, and an initramfs has no libraries"),
        );
    }

    #[test]
    fn only_a_kernel_that_insists_gets_signed_modules() {
        assert!(takes_unsigned_modules(
            "CONFIG_MODULE_SIG=y\n# CONFIG_MODULE_SIG_FORCE is not set\n"
        ));
        assert!(!takes_unsigned_modules(
            "CONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_FORCE=y\n"
        ));
        assert!(!takes_unsigned_modules(
            "CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY=y"
        ));
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinuz-6.1");
        assert_eq!(read_config(&kernel, "6.1"), None);
        std::fs::write(dir.path().join("config-6.1"), "CONFIG_X=y\n").unwrap();
        assert_eq!(read_config(&kernel, "6.1").as_deref(), Some("CONFIG_X=y\n"));
    }

    #[test]
    fn modules_are_found_where_people_have_them() {
        let dir = tempfile::tempdir().unwrap();
        for path in [
            "itself/kernel",
            "package/lib/modules/6.1",
            "newer/usr/lib/modules/6.1",
            "all/6.1",
            "all/6.2",
        ] {
            std::fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        let check = |name: &str, expected: &str| {
            assert_eq!(
                find_modules(&dir.path().join(name), "6.1").unwrap(),
                dir.path().join(expected)
            );
        };
        check("itself", "itself");
        check("package", "package/lib/modules/6.1");
        check("newer", "newer/usr/lib/modules/6.1");
        check("all", "all/6.1");
        assert!(matches!(
            find_modules(dir.path(), "6.1"),
            Err(ModuleError::NoTree { .. })
        ));
    }
}
