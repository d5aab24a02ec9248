//! A kernel's modules as files: what is in `/lib/modules/<release>`, and what the kernel has built in.
//!
//! ```text
//! <dir>/modules.builtin               what is part of vmlinux, one path a line
//! <dir>/kernel/**/<name>.ko[.gz|.xz|.zst]
//! ```
//!
//! Symbolic links are not followed: `build` and `source` lead out of the tree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::decompress::decompress;
use crate::manifest::BuiltinKnowledge;
use crate::modinfo::{Modinfo, normalise};
use crate::modules::ModuleError;

/// The largest module we load; the largest in distributions (GPU drivers) have 30 MiB.
const MODULE_MAX: usize = 64 << 20;
/// A distribution's full kernel has 5,000 modules in 800 folders, at most 9 deep.
const ENTRIES_MAX: usize = 100_000;
const DEPTH_MAX: usize = 16;
/// `modules.builtin` of a full kernel has 50 KiB.
const LIST_MAX: u64 = 4 << 20;

/// What is known about a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// Part of vmlinux.
    Builtin,
    /// A file in the tree.
    Module(Modinfo),
    /// Neither.
    Missing,
}

/// The drivers of one kernel: files, and what is built in.
#[derive(Debug)]
pub(crate) struct ModuleTree {
    files: BTreeMap<String, PathBuf>,
    builtin: Builtin,
}

/// Where the knowledge about built-in drivers comes from.
#[derive(Debug)]
enum Builtin {
    /// `modules.builtin`.
    Listed(BTreeSet<String>),
    /// The configuration inside the kernel: what is set to `y`.
    Config(BTreeSet<String>),
    /// Nothing says; whoever brings a kernel without modules has built in what it takes.
    Assumed,
}

impl ModuleTree {
    /// Reads `dir`, a `/lib/modules/<release>`; without one, and without `modules.builtin` in it, the kernel's own
    /// configuration says what is built in.
    pub(crate) fn open(dir: Option<&Path>, config: Option<&str>) -> Result<Self, ModuleError> {
        let mut files = BTreeMap::new();
        let mut listed = None;
        if let Some(dir) = dir {
            let mut left = ENTRIES_MAX;
            walk(dir, DEPTH_MAX, &mut left, &mut files)?;
            listed = read_builtin(&dir.join("modules.builtin"))?;
        }
        let builtin = match (listed, config) {
            (Some(names), _) => Builtin::Listed(names),
            (None, Some(config)) => Builtin::Config(
                config
                    .lines()
                    .filter_map(|line| line.strip_suffix("=y"))
                    .map(str::to_owned)
                    .collect(),
            ),
            (None, None) => Builtin::Assumed,
        };
        Ok(Self { files, builtin })
    }

    /// Where the knowledge about built-in drivers comes from.
    pub(crate) fn knowledge(&self) -> BuiltinKnowledge {
        match self.builtin {
            Builtin::Listed(_) => BuiltinKnowledge::Listed,
            Builtin::Config(_) => BuiltinKnowledge::Config,
            Builtin::Assumed => BuiltinKnowledge::Assumed,
        }
    }

    /// Looks `name` (normalised) up; `config` is the option that builds it in, where it is known.
    pub(crate) fn lookup(&self, name: &str, config: Option<&str>) -> Result<Lookup, ModuleError> {
        if self.files.contains_key(name) {
            let path = &self.files[name];
            let info = Modinfo::of_module(&self.read(name)?)
                .ok_or_else(|| ModuleError::NotAModule { path: path.clone() })?;
            return Ok(Lookup::Module(info));
        }
        let is_builtin = match &self.builtin {
            Builtin::Listed(names) => names.contains(name),
            Builtin::Config(options) => config.is_some_and(|option| options.contains(option)),
            Builtin::Assumed => true,
        };
        Ok(if is_builtin {
            Lookup::Builtin
        } else {
            Lookup::Missing
        })
    }

    /// The uncompressed bytes of a module that [`Self::lookup`] has found.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<u8>, ModuleError> {
        let path = self.files.get(name).ok_or_else(|| ModuleError::Missing {
            name: name.to_owned(),
        })?;
        let bytes = read_limited(path, MODULE_MAX as u64).map_err(|source| ModuleError::Read {
            path: path.clone(),
            source,
        })?;
        if bytes.starts_with(b"\x7fELF") {
            return Ok(bytes);
        }
        decompress(&bytes, MODULE_MAX).map_err(|source| ModuleError::Unpack {
            path: path.clone(),
            source,
        })
    }
}

fn walk(
    dir: &Path,
    depth: usize,
    left: &mut usize,
    files: &mut BTreeMap<String, PathBuf>,
) -> Result<(), ModuleError> {
    let failed = |source| ModuleError::Read {
        path: dir.to_owned(),
        source,
    };
    let too_large = || ModuleError::TreeTooLarge {
        path: dir.to_owned(),
        entries: ENTRIES_MAX,
        depth: DEPTH_MAX,
    };
    let deeper = depth.checked_sub(1).ok_or_else(too_large)?;
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        *left = left.checked_sub(1).ok_or_else(too_large)?;
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            walk(&entry.path(), deeper, left, files)?;
        } else if kind.is_file()
            && let Some(name) = entry.file_name().to_str().and_then(module_name)
        {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// The normalised name of a module's file.
fn module_name(file: &str) -> Option<String> {
    let stem = [".gz", ".xz", ".zst"]
        .iter()
        .find_map(|end| file.strip_suffix(end))
        .unwrap_or(file);
    stem.strip_suffix(".ko")
        .filter(|name| is_name(name))
        .map(normalise)
}

/// Names become file names in an initramfs and lines in a list.
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

fn read_builtin(path: &Path) -> Result<Option<BTreeSet<String>>, ModuleError> {
    let failed = |source| ModuleError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = match read_limited(path, LIST_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let text = String::from_utf8_lossy(&bytes);
    Ok(Some(
        text.lines()
            .filter_map(|line| line.rsplit('/').next())
            .filter_map(module_name)
            .collect(),
    ))
}

/// Reads a regular file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::with_capacity(metadata.len().min(limit) as usize);
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("larger than {limit} bytes"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::decompress::tests::{gzip, xz, zstd};
    use crate::modinfo::tests::module;

    /// Writes a tree: `(path, modinfo)`, compressed as the path's ending says.
    pub(crate) fn write_tree(dir: &Path, modules: &[(&str, &str)], builtin: Option<&str>) {
        for (path, modinfo) in modules {
            let path = dir.join("kernel").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let ko = module(modinfo);
            let bytes = match path.extension().unwrap().to_str().unwrap() {
                "gz" => gzip(&ko),
                "xz" => xz(&ko),
                "zst" => zstd(&ko),
                _ => ko,
            };
            std::fs::write(path, bytes).unwrap();
        }
        if let Some(text) = builtin {
            std::fs::write(dir.join("modules.builtin"), text).unwrap();
        }
    }

    #[test]
    fn finds_modules_however_they_are_packed() {
        let dir = tempfile::tempdir().unwrap();
        write_tree(
            dir.path(),
            &[
                ("a.ko", "depends=x"),
                ("d/b-c.ko.xz", "depends=a"),
                ("d/e/f.ko.zst", ""),
                ("g.ko.gz", ""),
            ],
            Some("kernel/fs/ext4/ext4.ko\nkernel/virtio-x.ko\n\nnonsense\n"),
        );
        std::os::unix::fs::symlink("/", dir.path().join("build")).unwrap();
        std::fs::write(dir.path().join("kernel/.ko"), "").unwrap();
        let tree = ModuleTree::open(Some(dir.path()), None).unwrap();
        assert_eq!(tree.knowledge(), BuiltinKnowledge::Listed);
        assert_eq!(tree.files.keys().collect::<Vec<_>>(), ["a", "b_c", "f", "g"]);
        for name in ["a", "b_c", "f", "g"] {
            assert!(tree.read(name).unwrap().starts_with(b"\x7fELF"));
        }
        let depends = |names: &[&str]| {
            Lookup::Module(Modinfo {
                depends: names.iter().map(ToString::to_string).collect(),
                ..Modinfo::default()
            })
        };
        assert_eq!(tree.lookup("b_c", None).unwrap(), depends(&["a"]));
        assert_eq!(tree.lookup("ext4", None).unwrap(), Lookup::Builtin);
        assert_eq!(tree.lookup("virtio_x", None).unwrap(), Lookup::Builtin);
        assert_eq!(tree.lookup("nonsense", None).unwrap(), Lookup::Missing);
    }

    #[test]
    fn without_a_list_the_configuration_counts_and_without_that_the_user() {
        let tree = ModuleTree::open(
            None,
            Some("CONFIG_EXT4_FS=y\nCONFIG_EROFS_FS=m\n# CONFIG_X is not set\n"),
        )
        .unwrap();
        assert_eq!(tree.knowledge(), BuiltinKnowledge::Config);
        assert_eq!(
            tree.lookup("ext4", Some("CONFIG_EXT4_FS")).unwrap(),
            Lookup::Builtin
        );
        assert_eq!(
            tree.lookup("erofs", Some("CONFIG_EROFS_FS")).unwrap(),
            Lookup::Missing
        );
        assert_eq!(tree.lookup("netfs", None).unwrap(), Lookup::Missing);
        let tree = ModuleTree::open(None, None).unwrap();
        assert_eq!(tree.knowledge(), BuiltinKnowledge::Assumed);
        assert_eq!(
            tree.lookup("ext4", Some("CONFIG_EXT4_FS")).unwrap(),
            Lookup::Builtin
        );
    }

    #[test]
    fn hostile_trees_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write_tree(dir.path(), &[("a.ko", "")], None);
        std::fs::write(dir.path().join("kernel/b.ko.xz"), "not xz").unwrap();
        std::fs::write(dir.path().join("kernel/c.ko"), "\x7fELF").unwrap();
        let bomb = zstd(&vec![0; MODULE_MAX + 1]);
        std::fs::write(dir.path().join("kernel/d.ko.zst"), bomb).unwrap();
        let tree = ModuleTree::open(Some(dir.path()), None).unwrap();
        assert!(matches!(tree.lookup("b", None), Err(ModuleError::Unpack { .. })));
        assert!(matches!(
            tree.lookup("c", None),
            Err(ModuleError::NotAModule { .. })
        ));
        assert!(matches!(tree.lookup("d", None), Err(ModuleError::Unpack { .. })));
        std::fs::create_dir_all(dir.path().join("x/".repeat(DEPTH_MAX))).unwrap();
        assert!(matches!(
            ModuleTree::open(Some(dir.path()), None),
            Err(ModuleError::TreeTooLarge { .. })
        ));
        let list = dir.path().join("list");
        std::fs::write(&list, "12345").unwrap();
        assert_eq!(
            read_limited(&list, 4).unwrap_err().kind(),
            io::ErrorKind::FileTooLarge
        );
        assert_eq!(read_limited(&list, 5).unwrap(), b"12345");
        assert!(read_limited(dir.path(), 5).is_err());
    }
}
