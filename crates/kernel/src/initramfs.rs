//! The initramfs: an uncompressed newc cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! ```text
//! init                the agent, 0755
//! dev/console         5,1: the kernel opens it as standard input, output and error of PID 1
//! dev/null            1,3
//! proc sys run tmp sysroot overlay      mount points
//! modules/            lists and modules, see `modules`
//! ```
//!
//! Equal input makes equal bytes: no times, no owners, counted inodes. It is not compressed, because the guest would
//! have to unpack it and the host's page cache holds it once for all guests.

use std::io::{self, Read};

use cpio::newc::{self, ModeFileType};

use crate::modules::{ModuleError, ModulePlan};

/// The largest initramfs that we read back; ours have 5 to 10 MiB.
pub(crate) const INITRAMFS_MAX: u64 = 256 << 20;
/// The most files in one that we read back.
const ENTRIES_MAX: usize = 10_000;

/// Why an initramfs cannot be written or read back.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file is larger than the format can say.
    #[error("`{name}` is too large for an initramfs: {size} bytes")]
    TooLarge {
        /// Which.
        name: String,
        /// Its size.
        size: usize,
    },
    /// The archive is damaged.
    #[error("the cpio archive is damaged")]
    Damaged {
        /// What the reader said.
        #[source]
        source: io::Error,
    },
    /// The archive holds no agent.
    #[error("the cpio archive holds no `{name}`")]
    NoAgent {
        /// The name that was looked for.
        name: &'static str,
    },
    /// A module cannot be read.
    #[error("cannot read a module")]
    Module {
        /// Why not.
        #[source]
        source: ModuleError,
    },
}

/// Where the agent is: the program that the kernel starts unless the command line says otherwise.
const AGENT: &str = "init";

/// Writes one file after the other.
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        self.inode += 1;
        let is_dir = matches!(kind, ModeFileType::Directory);
        let header = newc::Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .set_mode_file_type(kind)
            .nlink(if is_dir { 2 } else { 1 })
            .rdev_major(device.0)
            .rdev_minor(device.1);
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut writer = header.write(&mut self.bytes, size);
        io::Write::write_all(&mut writer, content)?;
        writer.finish()?;
        Ok(())
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), InitramfsError> {
        self.add(name, ModeFileType::Regular, mode, (0, 0), content)
            .map_err(|_| InitramfsError::TooLarge {
                name: name.to_owned(),
                size: content.len(),
            })
    }

    fn finish(self) -> Result<Vec<u8>, InitramfsError> {
        newc::trailer(self.bytes).map_err(|source| InitramfsError::Damaged { source })
    }
}

/// Makes the archive; `read` gives a module of the plan.
pub(crate) fn build(
    agent: &[u8],
    plan: &ModulePlan,
    mut read: impl FnMut(&str) -> Result<Vec<u8>, ModuleError>,
) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive {
        bytes: Vec::with_capacity(agent.len() + (8 << 20)),
        inode: 0,
    };
    let damaged = |source| InitramfsError::Damaged { source };
    for (name, mode) in [
        ("dev", 0o755),
        ("proc", 0o755),
        ("sys", 0o755),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("sysroot", 0o755),
        ("overlay", 0o755),
        ("modules", 0o755),
    ] {
        archive
            .add(name, ModeFileType::Directory, mode, (0, 0), &[])
            .map_err(damaged)?;
    }
    archive
        .add("dev/console", ModeFileType::Char, 0o600, (5, 1), &[])
        .map_err(damaged)?;
    archive
        .add("dev/null", ModeFileType::Char, 0o666, (1, 3), &[])
        .map_err(damaged)?;
    archive.file(AGENT, 0o755, agent)?;
    for (group, names) in &plan.groups {
        let list: String = names
            .iter()
            .map(|name| format!("/{}\n", module_path(name)))
            .collect();
        archive.file(group.list_path(), 0o644, list.as_bytes())?;
    }
    for name in plan.modules() {
        let module = read(&name).map_err(|source| InitramfsError::Module { source })?;
        archive.file(&module_path(&name), 0o644, &module)?;
    }
    archive.finish()
}

fn module_path(name: &str) -> String {
    format!("modules/{name}.ko")
}

/// Makes the archive `old` again with another agent; nothing else of it changes.
pub(crate) fn replace_agent(old: &[u8], agent: &[u8]) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive {
        bytes: Vec::with_capacity(old.len() + agent.len()),
        inode: 0,
    };
    let mut replaced = false;
    for entry in entries(old)? {
        let content = if entry.name == AGENT {
            agent
        } else {
            &entry.content
        };
        replaced |= entry.name == AGENT;
        let kind = match entry.mode & 0o170_000 {
            0o040_000 => ModeFileType::Directory,
            0o020_000 => ModeFileType::Char,
            0o100_000 => ModeFileType::Regular,
            _ => {
                let why = format!("`{}` has mode {:o}, which we never write", entry.name, entry.mode);
                return Err(InitramfsError::Damaged {
                    source: io::Error::new(io::ErrorKind::InvalidData, why),
                });
            }
        };
        archive
            .add(&entry.name, kind, entry.mode & 0o7777, entry.device, content)
            .map_err(|_| InitramfsError::TooLarge {
                name: entry.name.clone(),
                size: content.len(),
            })?;
    }
    if !replaced {
        return Err(InitramfsError::NoAgent { name: AGENT });
    }
    archive.finish()
}

/// One file of an archive that is read back.
struct Entry {
    name: String,
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

fn entries(mut bytes: &[u8]) -> Result<Vec<Entry>, InitramfsError> {
    let damaged = |source| InitramfsError::Damaged { source };
    let invalid = |why: &str| damaged(io::Error::new(io::ErrorKind::InvalidData, why.to_owned()));
    let mut entries = Vec::new();
    loop {
        let left = bytes.len();
        let mut reader = newc::Reader::new(bytes).map_err(damaged)?;
        let header = reader.entry();
        if header.is_trailer() {
            return Ok(entries);
        }
        let size = header.file_size() as usize;
        if size > left || entries.len() == ENTRIES_MAX {
            return Err(invalid(
                "a file is longer than the archive, or there are too many",
            ));
        }
        let mut entry = Entry {
            name: header.name().to_owned(),
            mode: header.mode(),
            device: (header.rdev_major(), header.rdev_minor()),
            content: Vec::with_capacity(size),
        };
        reader.read_to_end(&mut entry.content).map_err(damaged)?;
        if entry.content.len() != size {
            return Err(invalid("it ends within a file"));
        }
        bytes = reader.finish().map_err(damaged)?;
        entries.push(entry);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::modules::ModuleGroup;

    /// `(name, mode, content)` of everything in an archive.
    pub(crate) fn read_back(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        entries(archive)
            .unwrap()
            .into_iter()
            .map(|e| (e.name, e.mode, e.content))
            .collect()
    }

    fn sample(agent: &[u8]) -> Vec<u8> {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let plan = ModulePlan {
            groups: vec![
                (ModuleGroup::Base, names(&["b", "a"])),
                (ModuleGroup::Net, names(&["c", "n"])),
                (ModuleGroup::Vsock, names(&["c", "v"])),
            ],
            ..ModulePlan::default()
        };
        build(agent, &plan, |name| Ok(format!("module {name}").into_bytes())).unwrap()
    }

    #[test]
    fn holds_the_agent_the_lists_and_each_module_once() {
        let archive = sample(b"agent");
        assert_eq!(archive.len() % 4, 0);
        let files = read_back(&archive);
        let file = |name: &str| {
            files
                .iter()
                .find(|f| f.0 == name)
                .map(|f| (f.1, str::from_utf8(&f.2).unwrap()))
        };
        assert_eq!(file("init"), Some((0o100_755, "agent")));
        assert_eq!(file("dev/console"), Some((0o020_600, "")));
        assert_eq!(file("tmp"), Some((0o041_777, "")));
        assert_eq!(
            file("modules/order"),
            Some((0o100_644, "/modules/b.ko\n/modules/a.ko\n"))
        );
        assert_eq!(
            file("modules/order.net"),
            Some((0o100_644, "/modules/c.ko\n/modules/n.ko\n"))
        );
        assert_eq!(
            file("modules/order.vsock"),
            Some((0o100_644, "/modules/c.ko\n/modules/v.ko\n"))
        );
        assert_eq!(file("modules/order.pmem"), None);
        assert_eq!(file("modules/c.ko"), Some((0o100_644, "module c")));
        assert_eq!(files.iter().filter(|f| f.0.ends_with(".ko")).count(), 5);
        // A folder stands before what is in it: the kernel makes none by itself.
        for (at, (name, ..)) in files.iter().enumerate() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(files[..at].iter().any(|f| f.0 == parent), "{name}");
            }
        }
    }

    #[test]
    fn equal_input_makes_equal_bytes_and_only_the_agent_is_replaced() {
        assert_eq!(sample(b"one"), sample(b"one"));
        assert_eq!(
            replace_agent(&sample(b"one"), b"another").unwrap(),
            sample(b"another")
        );
        assert_ne!(sample(b"one"), sample(b"another"));
    }

    #[test]
    fn the_real_cpio_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initramfs");
        std::fs::write(&path, sample(b"agent")).unwrap();
        let input = std::fs::File::open(&path).unwrap();
        let Ok(output) = std::process::Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(input)
            .output()
        else {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED: cpio is not installed");
            }
            return;
        };
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.lines().any(|line| line == "modules/order.net"), "{text}");
    }

    #[test]
    fn damaged_archives_are_refused() {
        let archive = sample(b"agent");
        let check = |bytes: &[u8]| assert!(replace_agent(bytes, b"x").is_err());
        check(b"");
        check(b"070701");
        check(&archive[..archive.len() / 2]);
        let mut absurd = archive.clone();
        // c_filesize of the first entry.
        absurd[54..62].copy_from_slice(b"ffffffff");
        check(&absurd);
        let mut fifo = archive.clone();
        fifo[14..22].copy_from_slice(b"00001000");
        check(&fifo);
        let trailer = newc::trailer(Vec::new()).unwrap();
        assert!(matches!(
            replace_agent(&trailer, b"x"),
            Err(InitramfsError::NoAgent { .. })
        ));
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in any::<prop::sample::Index>(), value: [u8; 8], cut in any::<prop::sample::Index>()) {
            let mut bytes = sample(b"agent");
            let at = at.index(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&value);
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = replace_agent(&bytes, b"x");
        }
    }
}
