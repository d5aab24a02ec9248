//! The source of Linux, out of the tarball of a distribution's package or of kernel.org.
//!
//! What a kernel for this machine is not compiled from (other architectures, documents, self tests) is left out: a third
//! of the files. A tarball is made by others, so that its paths, kinds and sizes are checked before anything is made of it.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::lchown;
use std::path::{Component, Path, PathBuf};

use offshoot_model::{Progress, ProgressUnit};
use xz2::stream::{CONCATENATED, Stream};

use crate::module_tree::read_limited;

/// The most that a tarball unpacks to: Linux 6.12 has 1.5 GiB.
const UNPACKED_MAX: u64 = 4 << 30;
/// The most files and folders: Linux 6.12 has 92,000.
const ENTRIES_MAX: u64 = 400_000;
/// How much memory xz may take: `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;
/// The largest top Makefile: Linux 6.12's has 70 KiB.
const MAKEFILE_MAX: u64 = 1 << 20;
/// How many bytes are read between two reports.
const REPORT_EVERY: u64 = 4 << 20;
/// Architectures whose folders are kept. `um` is a part of `x86` to its Makefiles.
const ARCHITECTURES: [&str; 2] = ["x86", "um"];
/// The folder of the tree, in the folder that it is unpacked to.
pub(crate) const TREE: &str = "linux";

/// Why a tarball gives no source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The tarball cannot be read, or is damaged.
    #[error("cannot read the tarball")]
    Read {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The tree cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Compressed in a way that kernel sources are not.
    #[error("it is neither a tar nor one compressed with xz, gzip or zstd")]
    Format,
    /// Too much of something.
    #[error("it has more than {limit} {what}")]
    TooLarge {
        /// `bytes`, `files`.
        what: &'static str,
        /// The most that is taken.
        limit: u64,
    },
    /// Something that no kernel source has.
    #[error("it has `{path}`, {what}")]
    Entry {
        /// Its path, shortened.
        path: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Another program's source.
    #[error(
        "it is not the source of Linux: it has no Makefile with VERSION and PATCHLEVEL in one top folder"
    )]
    NotLinux,
}

/// A source that is there to be compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// `6.12.117`, as its Makefile says.
    pub(crate) version: String,
    /// When it was made, seconds since 1970.
    pub(crate) made: u64,
}

/// Unpacks `tarball` to the folder [`TREE`] in `dir`, and gives what is made to `owner`. Blocks.
pub(crate) fn unpack(
    tarball: &Path,
    dir: &Path,
    owner: u32,
    progress: &Progress,
) -> Result<Source, SourceError> {
    let read = |source| SourceError::Read { source };
    let file = File::open(tarball).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    let task = progress.start("unpacking the source", ProgressUnit::Bytes, Some(size));
    let counted = Counted {
        inner: file,
        done: 0,
        reported: 0,
        report: |done| progress.moved(task, done),
    };
    let top = dir.join("unpacked");
    std::fs::create_dir(&top).map_err(|source| SourceError::Write {
        path: top.clone(),
        source,
    })?;
    let made = unpack_tar(decoder(BufReader::new(counted))?, &top)?;
    let mut folders = std::fs::read_dir(&top).map_err(read)?.flatten();
    let (Some(first), None) = (folders.next(), folders.next()) else {
        return Err(SourceError::NotLinux);
    };
    let tree = dir.join(TREE);
    std::fs::rename(first.path(), &tree).map_err(|source| SourceError::Write {
        path: tree.clone(),
        source,
    })?;
    let makefile = tree.join("Makefile");
    // A link might lead to a file of the host.
    if !is_plain_dir(&tree) || !is_plain_file(&makefile) {
        return Err(SourceError::NotLinux);
    }
    let makefile = read_limited(&makefile, MAKEFILE_MAX).map_err(|_| SourceError::NotLinux)?;
    let version = version(&String::from_utf8_lossy(&makefile)).ok_or(SourceError::NotLinux)?;
    give(&tree, owner)?;
    progress.finish(task);
    Ok(Source { version, made })
}

/// Whether it is a folder, and no link to one.
pub(crate) fn is_plain_dir(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// Whether it is a file, and no link to one.
pub(crate) fn is_plain_file(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file())
}

/// Tells how far the tarball is read.
struct Counted<F> {
    inner: File,
    done: u64,
    reported: u64,
    report: F,
}

impl<F: FnMut(u64)> Read for Counted<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.done += read as u64;
        if self.done - self.reported >= REPORT_EVERY {
            self.reported = self.done;
            (self.report)(self.done);
        }
        Ok(read)
    }
}

fn decoder<'a>(mut packed: impl io::BufRead + 'a) -> Result<Box<dyn Read + 'a>, SourceError> {
    let read = |source| SourceError::Read { source };
    Ok(match packed.fill_buf().map_err(read)? {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream =
                Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED).map_err(|error| read(error.into()))?;
            Box::new(xz2::bufread::XzDecoder::new_stream(packed, stream))
        }
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Box::new(zstd::stream::read::Decoder::with_buffer(packed).map_err(read)?)
        }
        // The first header of a tar has its magic at byte 257 (pax(1), "ustar Interchange Format").
        start if start.get(257..262) == Some(b"ustar") => Box::new(packed),
        _ => return Err(SourceError::Format),
    })
}

/// Unpacks what is needed into `top`; gives when the youngest file was changed, seconds since 1970.
fn unpack_tar(tar: impl Read, top: &Path) -> Result<u64, SourceError> {
    let read = |source| SourceError::Read { source };
    let mut archive = tar::Archive::new(Limited {
        inner: tar,
        left: UNPACKED_MAX,
    });
    archive.set_preserve_permissions(false);
    let (mut made, mut count) = (0, 0);
    for entry in archive.entries().map_err(read)? {
        let mut entry = entry.map_err(too_large)?;
        count += 1;
        if count > ENTRIES_MAX {
            return Err(SourceError::TooLarge {
                what: "files",
                limit: ENTRIES_MAX,
            });
        }
        let path = entry.path().map_err(read)?.into_owned();
        let refuse = |what| SourceError::Entry {
            path: path.to_string_lossy().chars().take(120).collect(),
            what,
        };
        if !path
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        {
            return Err(refuse("which leads out of it"));
        }
        let kind = entry.header().entry_type();
        if kind == tar::EntryType::XGlobalHeader {
            continue;
        }
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink()) {
            return Err(refuse("which is neither a file nor a folder nor a symbolic link"));
        }
        if !is_needed(&path) {
            continue;
        }
        made = made.max(entry.header().mtime().unwrap_or_default());
        match entry.unpack_in(top) {
            Ok(true) => {}
            Ok(false) => return Err(refuse("which leads out of it")),
            Err(source) => return Err(written(source, top.join(&path))),
        }
    }
    Ok(made)
}

/// Whether a kernel for this machine is compiled from it. The first part of the path is the top folder.
fn is_needed(path: &Path) -> bool {
    let parts: Vec<_> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .skip(1)
        .collect();
    match parts.as_slice() {
        // Kconfig reads all of its files, for whatever machine.
        [.., last] if last.starts_with("Kconfig") => true,
        ["Documentation", .., last] => *last == "Makefile",
        ["tools", "testing", ..] => false,
        ["arch", architecture, _, ..] => ARCHITECTURES.contains(architecture),
        _ => true,
    }
}

/// An end of what is read before its own, told apart from damage.
struct Limited<R> {
    inner: R,
    left: u64,
}

#[derive(Debug, thiserror::Error)]
#[error("too many bytes")]
struct TooManyBytes;

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(read as u64)
            .ok_or_else(|| io::Error::other(TooManyBytes))?;
        Ok(read)
    }
}

fn too_large(error: io::Error) -> SourceError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|inner| inner as _);
    while let Some(now) = cause {
        if now.is::<TooManyBytes>() {
            return SourceError::TooLarge {
                what: "bytes",
                limit: UNPACKED_MAX,
            };
        }
        cause = now.source().or_else(|| inner_of(now));
    }
    SourceError::Read { source: error }
}

/// What an `io::Error` wraps: it is not its source.
fn inner_of<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a (dyn std::error::Error + 'static)> {
    error
        .downcast_ref::<io::Error>()?
        .get_ref()
        .map(|inner| inner as _)
}

/// An error while an entry was unpacked: of the disk where it has a number, else of the tarball.
fn written(error: io::Error, path: PathBuf) -> SourceError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(now) = cause {
        if let Some(number) = now.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return SourceError::Write {
                path,
                source: io::Error::from_raw_os_error(number),
            };
        }
        cause = now.source().or_else(|| inner_of(now));
    }
    too_large(error)
}

/// `6.12.117` out of the first lines of Linux's Makefile.
fn version(makefile: &str) -> Option<String> {
    let value = |name: &str| {
        let line = makefile.lines().take(50).find_map(|line| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == name).then(|| value.trim())
        })?;
        let is_number = !line.is_empty() && line.len() <= 9 && line.bytes().all(|b| b.is_ascii_digit());
        is_number.then_some(line)
    };
    let (version, patchlevel) = (value("VERSION")?, value("PATCHLEVEL")?);
    Some(match value("SUBLEVEL") {
        Some(sublevel) => format!("{version}.{patchlevel}.{sublevel}"),
        None => format!("{version}.{patchlevel}"),
    })
}

/// Makes `owner` the owner of all of `tree`.
pub(crate) fn give(tree: &Path, owner: u32) -> Result<(), SourceError> {
    let mut left = vec![tree.to_owned()];
    while let Some(path) = left.pop() {
        let failed = |source| SourceError::Write {
            path: path.clone(),
            source,
        };
        lchown(&path, Some(owner), Some(owner)).map_err(failed)?;
        if std::fs::symlink_metadata(&path).map_err(failed)?.is_dir() {
            for entry in std::fs::read_dir(&path).map_err(failed)? {
                left.push(entry.map_err(failed)?.path());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const MAKEFILE: &str =
        "# SPDX\nVERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 117\nEXTRAVERSION =\nNAME = Baby\n";

    enum What<'a> {
        File(&'a str),
        Link(&'a str),
        Kind(tar::EntryType),
    }

    fn tar_of(entries: &[(&str, What)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, what) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o755);
            header.set_mtime(1_000);
            // Set byte by byte: the setter refuses what an attacker would not.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            let data: &[u8] = match what {
                What::File(text) => {
                    header.set_entry_type(tar::EntryType::Regular);
                    text.as_bytes()
                }
                What::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_link_name(target).unwrap();
                    b""
                }
                What::Kind(kind) => {
                    header.set_entry_type(*kind);
                    b""
                }
            };
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn xz(data: &[u8]) -> Vec<u8> {
        let mut encoder = xz2::write::XzEncoder::new(Vec::new(), 0);
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn unpacked(packed: &[u8]) -> (tempfile::TempDir, Result<Source, SourceError>) {
        let dir = tempfile::tempdir().unwrap();
        let tarball = dir.path().join("linux.tar");
        std::fs::write(&tarball, packed).unwrap();
        let owner = rustix::process::geteuid().as_raw();
        let source = unpack(&tarball, dir.path(), owner, &Progress::silent());
        (dir, source)
    }

    #[test]
    fn a_source_is_unpacked_without_what_is_not_compiled() {
        let tar = tar_of(&[
            ("linux-6/Makefile", What::File(MAKEFILE)),
            ("linux-6/Documentation/Kconfig", What::File("")),
            ("linux-6/Documentation/a/b.rst", What::File("")),
            ("linux-6/arch/Kconfig", What::File("")),
            ("linux-6/arch/x86/Makefile", What::File("")),
            ("linux-6/arch/arm/Makefile", What::File("")),
            ("linux-6/arch/arm/crypto/Kconfig", What::File("")),
            ("linux-6/scripts/link", What::Link("../arch/x86/Makefile")),
            ("linux-6/tools/testing/x", What::File("")),
        ]);
        for packed in [tar.clone(), xz(&tar), [xz(&tar[..512]), xz(&tar[512..])].concat()] {
            let (dir, source) = unpacked(&packed);
            let source = source.unwrap();
            assert_eq!((source.version.as_str(), source.made), ("6.12.117", 1_000));
            let tree = dir.path().join(TREE);
            let there = |path: &str| tree.join(path).symlink_metadata().is_ok();
            for path in [
                "Makefile",
                "Documentation/Kconfig",
                "arch/Kconfig",
                "arch/x86/Makefile",
                "scripts/link",
            ] {
                assert!(there(path), "{path}");
            }
            for path in ["Documentation/a", "arch/arm/Makefile", "tools"] {
                assert!(!there(path), "{path}");
            }
        }
    }

    #[test]
    fn what_is_no_source_of_linux_is_refused_with_the_reason() {
        let check = |packed: &[u8], expected: &str| {
            let (_dir, source) = unpacked(packed);
            let error = source.unwrap_err();
            let cause = std::error::Error::source(&error).map_or(String::new(), |cause| format!(": {cause}"));
            assert_eq!(format!("{error}{cause}"), expected);
        };
        let not_linux =
            "it is not the source of Linux: it has no Makefile with VERSION and PATCHLEVEL in one top folder";
        check(
            b"text",
            "it is neither a tar nor one compressed with xz, gzip or zstd",
        );
        check(&tar_of(&[("a/Makefile", What::File("all:\n"))]), not_linux);
        check(&tar_of(&[("a/x", What::File(""))]), not_linux);
        check(
            &tar_of(&[("a/Makefile", What::File(MAKEFILE)), ("b/x", What::File(""))]),
            not_linux,
        );
        check(
            &tar_of(&[("a/../../x", What::File(""))]),
            "it has `a/../../x`, which leads out of it",
        );
        check(
            &tar_of(&[("/etc/x", What::File(""))]),
            "it has `/etc/x`, which leads out of it",
        );
        for kind in [tar::EntryType::Char, tar::EntryType::Fifo, tar::EntryType::Link] {
            check(
                &tar_of(&[("a/x", What::Kind(kind))]),
                "it has `a/x`, which is neither a file nor a folder nor a symbolic link",
            );
        }
        let cut = xz(&tar_of(&[("a/Makefile", What::File(MAKEFILE))]));
        let (_dir, source) = unpacked(&cut[..cut.len() / 2]);
        assert!(
            matches!(source, Err(SourceError::Read { .. } | SourceError::Write { .. })),
            "{source:?}"
        );
    }

    #[test]
    fn nothing_is_written_through_a_link_that_leads_out() {
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().to_str().unwrap();
        let (_dir, source) = unpacked(&tar_of(&[
            ("a/Makefile", What::File(MAKEFILE)),
            ("a/link", What::Link(target)),
            ("a/link/file", What::File("x")),
        ]));
        assert!(source.is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_source_that_is_a_link_is_none() {
        let (_dir, source) = unpacked(&tar_of(&[("a", What::Link("/etc"))]));
        assert!(matches!(source, Err(SourceError::NotLinux)));
        let (_dir, source) = unpacked(&tar_of(&[("a/Makefile", What::Link("/etc/passwd"))]));
        assert!(matches!(source, Err(SourceError::NotLinux)));
    }

    #[test]
    fn there_is_an_end_of_what_is_unpacked() {
        let mut limited = Limited {
            inner: io::repeat(0),
            left: 10,
        };
        let error = limited.read_to_end(&mut Vec::new()).unwrap_err();
        assert!(matches!(
            too_large(error),
            SourceError::TooLarge { what: "bytes", .. }
        ));
        let nested = io::Error::other(io::Error::other(TooManyBytes));
        assert!(matches!(too_large(nested), SourceError::TooLarge { .. }));
        assert!(matches!(
            too_large(io::Error::other("x")),
            SourceError::Read { .. }
        ));
    }
}
