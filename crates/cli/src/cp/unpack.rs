//! Unpacks a tar that a guest made. A guest is not trusted: nothing may be written outside the destination.
//!
//! Names are checked by the letter (no absolute ones, no `..`), and the way to every entry is checked on the disk: it
//! goes through folders only, never through a symlink, whoever made it. Symlinks are made as they are, since making one
//! harms nobody; writing through one is what is refused. Owners, set-id bits and devices stay behind.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use offshoot_model::{ErrorKind, Explain};

use super::place::Root;

/// The most entries of one copy; a Debian system has some ten thousand.
const MAX_ENTRIES: u64 = 4_000_000;
/// The longest name, as Linux has it (`PATH_MAX`).
const MAX_NAME: usize = 4096;
/// The largest file: no disk of a VM is larger.
const MAX_FILE: u64 = 16 << 40;
/// The most that headers of one entry take, with extended ones, beyond what is skipped of the entry before: the tar
/// reader keeps them in memory.
const MAX_HEADERS: u64 = 1 << 20;
/// How much is copied at once; whole runs of zeros of this length become holes.
const BLOCK: usize = 64 << 10;

/// Why a guest's tar was not unpacked.
#[derive(Debug)]
pub(crate) enum UnpackError {
    /// The tar is broken, or the copy broke off.
    Read { source: io::Error },
    /// An entry would leave the destination.
    Outside { name: String },
    /// Something else stands in the way of an entry.
    InTheWay { path: PathBuf },
    /// Larger than anything that makes sense.
    TooMuch { what: &'static str },
    /// The disk refused it.
    Write { path: PathBuf, source: io::Error },
}

impl std::fmt::Display for UnpackError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Read { .. } => f.write_str("cannot read what the guest sent"),
            Self::Outside { name } => write!(
                f,
                "the guest sent an entry that lies outside of what was asked for: `{name}`"
            ),
            Self::InTheWay { path } => write!(f, "cannot write through or over `{}`", path.display()),
            Self::TooMuch { what } => write!(f, "the guest sent {what} than can be true"),
            Self::Write { path, .. } => write!(f, "cannot write `{}`", path.display()),
        }
    }
}

impl std::error::Error for UnpackError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Read { source } | Self::Write { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl Explain for UnpackError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { .. } | Self::Outside { .. } | Self::TooMuch { .. } => ErrorKind::BadContent,
            Self::InTheWay { .. } => ErrorKind::Conflict,
            Self::Write { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::InTheWay { path } => vec![format!(
                "move `{}` away, or copy to another folder",
                path.display()
            )],
            Self::Outside { .. } => vec!["look at it with `offshoot cp VM:PATH - | tar -tv`".to_owned()],
            _ => Vec::new(),
        }
    }
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Entries that are there now.
    pub(crate) entries: u64,
    /// Devices, pipes and sockets, which were left out.
    pub(crate) left_out: u64,
}

/// Unpacks the tar of a thing called `name` into `folder`, which exists and whose own path is trusted.
pub(crate) fn unpack(
    tar: impl Read,
    name: &str,
    folder: &Path,
    root: &Root,
    same_owner: bool,
) -> Result<Unpacked, UnpackError> {
    let allowance = Rc::new(Cell::new(MAX_HEADERS));
    let mut archive = tar::Archive::new(Metered {
        inner: tar,
        allowance: Rc::clone(&allowance),
    });
    let mut unpacked = Unpacked::default();
    // Folders get their modes last: they may forbid to write what they hold.
    let mut modes: Vec<(PathBuf, u32)> = Vec::new();
    let mut entries = archive.entries().map_err(|source| UnpackError::Read { source })?;
    loop {
        allowance.set(MAX_HEADERS);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(|source| UnpackError::Read { source })?;
        allowance.set(u64::MAX);
        if unpacked.entries + unpacked.left_out >= MAX_ENTRIES {
            return Err(UnpackError::TooMuch { what: "more entries" });
        }
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        let Some(inside) = destination(&entry.path_bytes(), name, root)? else {
            continue;
        };
        let path = way_to(folder, &inside)?;
        let write_error = |source| UnpackError::Write {
            path: path.clone(),
            source,
        };
        let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
        let there = match fs::symlink_metadata(&path) {
            Ok(metadata) => Some(metadata),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(write_error(e)),
        };
        if there
            .as_ref()
            .is_some_and(|metadata| metadata.is_dir() != kind.is_dir())
        {
            return Err(UnpackError::InTheWay { path });
        }
        if kind.is_dir() {
            if there.is_none() {
                fs::create_dir(&path).map_err(write_error)?;
                modes.push((path.clone(), mode));
            }
        } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            if entry.size() > MAX_FILE {
                return Err(UnpackError::TooMuch {
                    what: "a larger file",
                });
            }
            replace(&path, there.is_some()).map_err(write_error)?;
            let mtime = entry.header().mtime().ok();
            write_file(&mut entry, &path, mode, mtime)?;
        } else if kind.is_symlink() {
            let target = entry.link_name().ok().flatten();
            let target = target.ok_or_else(|| UnpackError::Read {
                source: io::Error::other("a symlink leads nowhere"),
            })?;
            replace(&path, there.is_some()).map_err(write_error)?;
            std::os::unix::fs::symlink(target, &path).map_err(write_error)?;
        } else if kind.is_hard_link() {
            let bytes = entry
                .link_name_bytes()
                .map(std::borrow::Cow::into_owned)
                .unwrap_or_default();
            let outside = || UnpackError::Outside { name: show(&bytes) };
            let target = way_to(folder, &destination(&bytes, name, root)?.ok_or_else(outside)?)?;
            if !fs::symlink_metadata(&target)
                .is_ok_and(|metadata| metadata.is_file() || metadata.is_symlink())
            {
                return Err(outside());
            }
            if target != path {
                replace(&path, there.is_some()).map_err(write_error)?;
                fs::hard_link(target, &path).map_err(write_error)?;
            }
        } else {
            unpacked.left_out += 1;
            continue;
        }
        if same_owner && !kind.is_hard_link() {
            let number = |id: io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok());
            let (uid, gid) = (number(entry.header().uid()), number(entry.header().gid()));
            std::os::unix::fs::lchown(&path, uid, gid).map_err(write_error)?;
        }
        unpacked.entries += 1;
    }
    for (path, mode) in modes.iter().rev() {
        fs::set_permissions(path, Permissions::from_mode(*mode)).map_err(|source| UnpackError::Write {
            path: path.clone(),
            source,
        })?;
    }
    Ok(unpacked)
}

/// The place of an entry below the folder; `None` for the top of a thing whose contents only are wanted.
fn destination(entry: &[u8], name: &str, root: &Root) -> Result<Option<PathBuf>, UnpackError> {
    use std::os::unix::ffi::OsStrExt;
    let outside = || UnpackError::Outside { name: show(entry) };
    if entry.len() > MAX_NAME || entry.contains(&0) {
        return Err(outside());
    }
    let mut components = Vec::new();
    for component in Path::new(std::ffi::OsStr::from_bytes(entry)).components() {
        match component {
            Component::Normal(part) => components.push(part),
            Component::CurDir => {}
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => return Err(outside()),
        }
    }
    let below = match (name, components.split_first()) {
        ("", _) => components.as_slice(),
        (name, Some((first, rest))) if first.as_bytes() == name.as_bytes() => rest,
        _ => return Err(outside()),
    };
    let mut path = PathBuf::new();
    if let Root::Named(name) = root {
        path.push(name);
    }
    path.extend(below);
    Ok((!path.as_os_str().is_empty()).then_some(path))
}

/// The path of `inside` below `folder`, whose parents are folders, made where they are missing.
fn way_to(folder: &Path, inside: &Path) -> Result<PathBuf, UnpackError> {
    let mut path = folder.to_owned();
    if let Some(parents) = inside.parent() {
        for part in parents {
            path.push(part);
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(_) => return Err(UnpackError::InTheWay { path }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir(&path).map_err(|source| UnpackError::Write {
                        path: path.clone(),
                        source,
                    })?;
                }
                Err(source) => return Err(UnpackError::Write { path, source }),
            }
        }
    }
    if let Some(last) = inside.file_name() {
        path.push(last);
    }
    Ok(path)
}

fn replace(path: &Path, there: bool) -> io::Result<()> {
    if there { fs::remove_file(path) } else { Ok(()) }
}

fn write_file(from: &mut impl Read, path: &Path, mode: u32, mtime: Option<u64>) -> Result<(), UnpackError> {
    let write_error = |source| UnpackError::Write {
        path: path.to_owned(),
        source,
    };
    // `create_new` follows no symlink, and nobody else reads it before it is whole.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(write_error)?;
    let mut block = vec![0; BLOCK];
    let mut size = 0;
    loop {
        let read = fill(from, &mut block).map_err(|source| UnpackError::Read { source })?;
        if read == 0 {
            break;
        }
        size += read as u64;
        if read == BLOCK && block.iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Current(BLOCK as i64)).map_err(write_error)?;
        } else {
            file.write_all(&block[..read]).map_err(write_error)?;
        }
    }
    finish(&file, size, mode, mtime).map_err(write_error)
}

fn finish(file: &File, size: u64, mode: u32, mtime: Option<u64>) -> io::Result<()> {
    file.set_len(size)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    match mtime.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))) {
        Some(time) => file.set_modified(time),
        None => Ok(()),
    }
}

/// Reads until the block is full or the end.
fn fill(from: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match from.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(200).collect()
}

/// A reader that gives no more than an allowance, which is renewed for every entry's headers.
struct Metered<R> {
    inner: R,
    allowance: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.allowance.get())
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if most == 0 && !buffer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("headers of more than {MAX_HEADERS} bytes"),
            ));
        }
        let read = self.inner.read(&mut buffer[..most])?;
        self.allowance
            .set(self.allowance.get().saturating_sub(read as u64));
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use tar::EntryType;

    /// Entries with any name whatever, as no honest tar writer makes them.
    fn tar(entries: &[(&str, EntryType, &str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, link, data) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(if kind.is_dir() { 0o755 } else { 0o6754 });
            header.set_mtime(1_000_000_000);
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn named(name: &str) -> Root {
        Root::Named(name.to_owned())
    }

    const FILE: EntryType = EntryType::Regular;
    const DIR: EntryType = EntryType::Directory;
    const SYMLINK: EntryType = EntryType::Symlink;
    const LINK: EntryType = EntryType::Link;

    #[test]
    fn an_honest_tree_is_unpacked_under_its_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = tar(&[
            ("d/", DIR, "", b""),
            ("d/a", FILE, "", b"hello"),
            ("d/deep/er/b", FILE, "", b""),
            ("d/l", SYMLINK, "/etc/passwd", b""),
            ("d/h", LINK, "d/a", b""),
            ("d/null", EntryType::Char, "", b""),
        ]);
        let unpacked = unpack(bytes.as_slice(), "d", dir.path(), &named("n"), false).unwrap();
        assert_eq!(
            unpacked,
            Unpacked {
                entries: 5,
                left_out: 1
            }
        );
        let at = |name: &str| dir.path().join("n").join(name);
        assert_eq!(fs::read(at("a")).unwrap(), b"hello");
        let metadata = fs::metadata(at("a")).unwrap();
        assert_eq!(
            (metadata.mode() & 0o7777, metadata.nlink(), metadata.mtime()),
            (0o754, 2, 1_000_000_000)
        );
        assert_eq!(fs::read_link(at("l")).unwrap(), Path::new("/etc/passwd"));
        assert!(at("deep/er/b").exists());
        // Again, over what is there, and as contents only.
        unpack(bytes.as_slice(), "d", dir.path(), &named("n"), false).unwrap();
        unpack(bytes.as_slice(), "d", dir.path(), &Root::Contents, false).unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"hello");
    }

    #[test]
    fn nothing_is_written_outside() {
        for (entries, why) in [
            (&[("/etc/x", FILE, "", &b"evil"[..])][..], "absolute"),
            (&[("d/../../x", FILE, "", b"evil")], "dot dot"),
            (&[("..", DIR, "", b"")], "only dot dot"),
            (&[("other/x", FILE, "", b"evil")], "not what was asked for"),
            (
                &[
                    ("d", DIR, "", b""),
                    ("d/l", SYMLINK, "OUT", b""),
                    ("d/l/x", FILE, "", b"evil"),
                ],
                "through a symlink",
            ),
            (
                &[("d", SYMLINK, "OUT", b""), ("d/x", FILE, "", b"evil")],
                "root is a symlink",
            ),
            (
                &[
                    ("d", DIR, "", b""),
                    ("d/l", SYMLINK, "OUT", b""),
                    ("d/l", DIR, "", b""),
                ],
                "folder over symlink",
            ),
            (
                &[("d/h", LINK, "/etc/passwd", b"")],
                "hard link to an absolute name",
            ),
            (&[("d/h", LINK, "d/../../secret", b"")], "hard link out"),
            (
                &[("d/l", SYMLINK, "OUT", b""), ("d/h", LINK, "d/l/secret", b"")],
                "hard link through a symlink",
            ),
            (&[("d/h", LINK, "d/missing", b"")], "hard link to nothing"),
            (&[("d/h", LINK, "d", b"")], "hard link to a folder"),
            (
                &[("d/a", FILE, "", b"x"), ("d/a/b", FILE, "", b"x")],
                "a file as a folder",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
            fs::create_dir(&inside).unwrap();
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("secret"), "secret").unwrap();
            fs::write(dir.path().join("secret"), "secret").unwrap();
            let link = outside.to_str().unwrap();
            let entries: Vec<_> = entries
                .iter()
                .map(|(n, k, l, d)| (*n, *k, if *l == "OUT" { link } else { l }, *d))
                .collect();
            let result = unpack(tar(&entries).as_slice(), "d", &inside, &named("d"), false);
            assert!(result.is_err(), "{why}");
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{why}");
            assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1, "{why}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "{why}");
        }
    }

    #[test]
    fn a_symlink_at_the_destination_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "keep").unwrap();
        let bytes = tar(&[
            ("f", SYMLINK, precious.to_str().unwrap(), b""),
            ("f", FILE, "", b"evil"),
        ]);
        unpack(bytes.as_slice(), "f", dir.path(), &named("g"), false).unwrap();
        assert_eq!(fs::read(&precious).unwrap(), b"keep");
        assert_eq!(fs::read(dir.path().join("g")).unwrap(), b"evil");
    }

    #[test]
    fn endless_headers_and_cut_archives_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let long = vec![b'a'; 2 << 20];
        let bytes = tar(&[
            ("././@LongLink", EntryType::GNULongName, "", &long),
            ("d", FILE, "", b""),
        ]);
        let error = unpack(bytes.as_slice(), "d", dir.path(), &named("d"), false).unwrap_err();
        assert!(matches!(error, UnpackError::Read { .. }), "{error}");
        let whole = tar(&[("d", FILE, "", &[7; 5000])]);
        let error = unpack(&whole[..3000], "d", dir.path(), &named("d"), false).unwrap_err();
        assert!(matches!(error, UnpackError::Read { .. }), "{error}");
    }

    #[test]
    fn zeros_become_holes_and_sizes_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut data = vec![0; 4 << 20];
        data.extend_from_slice(b"end");
        data.extend_from_slice(&[0; 100_000]);
        unpack(
            tar(&[("f", FILE, "", &data)]).as_slice(),
            "f",
            dir.path(),
            &named("f"),
            false,
        )
        .unwrap();
        assert_eq!(fs::read(dir.path().join("f")).unwrap(), data);
        assert!(fs::metadata(dir.path().join("f")).unwrap().blocks() * 512 < 1 << 20);
    }
}
