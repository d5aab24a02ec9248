//! One request, one answer.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, OpenOptions, ReadDir};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use russh_sftp::protocol::{
    Attrs, Data, FileAttributes, Handle as HandleReply, Name, OpenFlags, Packet, StatusCode, Version,
};
use rustix::fs::{AtFlags, CWD, Gid, RenameFlags, Timespec, Timestamps, Uid, renameat_with};

use super::names::{Names, attributes};

/// The most that one request reads or writes; what is left of a packet is for what surrounds it (as OpenSSH does it).
pub(super) const MAX_DATA: usize = super::MAX_PACKET - 1024;

/// Open files and folders of one client.
pub(super) const MAX_HANDLES: usize = 256;

/// Entries of a folder in one answer.
const ENTRIES: usize = 100;

/// The bits of a mode that may be set.
const MODE_BITS: u32 = 0o7777;

/// Files that are made without a mode; the umask takes from it.
const DEFAULT_MODE: u32 = 0o666;

/// Why a request is not served.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The protocol has a word for it.
    Status(StatusCode),
    /// The kernel says why.
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<rustix::io::Errno> for Refusal {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

impl Refusal {
    fn packet(self, id: u32) -> Packet {
        match self {
            Self::Status(code) => Packet::error(id, code),
            Self::Io(error) => {
                let code = match error.raw_os_error() {
                    Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => StatusCode::NoSuchFile,
                    Some(libc::EPERM | libc::EACCES | libc::EFAULT) => StatusCode::PermissionDenied,
                    Some(libc::ENOSYS | libc::EOPNOTSUPP) => StatusCode::OpUnsupported,
                    _ => StatusCode::Failure,
                };
                let text = error.to_string();
                let text = text.split(" (os error").next().unwrap_or(&text);
                Packet::status(id, code, text, "en")
            }
        }
    }
}

pub(super) type Answer = Result<Packet, Refusal>;

pub(super) fn fine(id: u32) -> Answer {
    Ok(Packet::error(id, StatusCode::Ok))
}

enum Handle {
    File { file: File, append: bool },
    Folder { path: PathBuf, entries: ReadDir },
}

/// One client's open files.
#[derive(Default)]
pub(super) struct Server {
    handles: HashMap<String, Handle>,
    last_handle: u64,
    names: Option<Names>,
}

impl Server {
    /// Does what a packet asks for.
    pub(super) fn answer(&mut self, packet: Packet) -> Packet {
        let id = packet.get_request_id();
        self.serve(packet).unwrap_or_else(|refusal| refusal.packet(id))
    }

    fn serve(&mut self, packet: Packet) -> Answer {
        match packet {
            Packet::Init(_) => {
                let mut version = Version::new();
                version.extensions = super::extended::offered();
                Ok(version.into())
            }
            Packet::Open(open) => self.open(open.id, &open.filename, open.pflags, &open.attrs),
            Packet::Close(close) => match self.handles.remove(&close.handle) {
                Some(_) => fine(close.id),
                None => Err(Refusal::Status(StatusCode::Failure)),
            },
            Packet::Read(read) => {
                let (file, _) = self.file(&read.handle)?;
                let data = read_at(file, read.offset, read.len)?;
                Ok(Data { id: read.id, data }.into())
            }
            Packet::Write(write) => {
                let (file, append) = self.file(&write.handle)?;
                if append {
                    io::Write::write_all(&mut &*file, &write.data)?;
                } else {
                    file.write_all_at(&write.data, write.offset)?;
                }
                fine(write.id)
            }
            Packet::Lstat(stat) => attrs(stat.id, &fs::symlink_metadata(path(&stat.path))?),
            Packet::Stat(stat) => attrs(stat.id, &fs::metadata(path(&stat.path))?),
            Packet::Fstat(stat) => attrs(stat.id, &self.file(&stat.handle)?.0.metadata()?),
            Packet::SetStat(set) => {
                let path = path(&set.path);
                if let Some(size) = set.attrs.size {
                    OpenOptions::new().write(true).open(path)?.set_len(size)?;
                }
                set_attributes(path, &set.attrs, AtFlags::empty())?;
                fine(set.id)
            }
            Packet::FSetStat(set) => {
                let (file, _) = self.file(&set.handle)?;
                set_file_attributes(file, &set.attrs)?;
                fine(set.id)
            }
            Packet::OpenDir(open) => {
                let path = path(&open.path).to_owned();
                let entries = fs::read_dir(&path)?;
                self.keep(open.id, Handle::Folder { path, entries })
            }
            Packet::ReadDir(read) => self.entries(read.id, &read.handle),
            Packet::Remove(remove) => {
                fs::remove_file(path(&remove.filename))?;
                fine(remove.id)
            }
            Packet::MkDir(make) => {
                let mode = make.attrs.permissions.unwrap_or(0o777) & MODE_BITS;
                rustix::fs::mkdir(path(&make.path), mode.into())?;
                fine(make.id)
            }
            Packet::RmDir(remove) => {
                fs::remove_dir(path(&remove.path))?;
                fine(remove.id)
            }
            Packet::RealPath(real) => Ok(name(real.id, &real_path(path(&real.path))?)),
            Packet::Rename(rename) => {
                rename_to_new(path(&rename.oldpath), path(&rename.newpath))?;
                fine(rename.id)
            }
            Packet::ReadLink(read) => Ok(name(read.id, &fs::read_link(path(&read.path))?)),
            // OpenSSH has sent the two in the wrong order from the beginning, and everybody follows it: the target first.
            Packet::Symlink(link) => {
                std::os::unix::fs::symlink(&link.linkpath, path(&link.targetpath))?;
                fine(link.id)
            }
            Packet::Extended(extended) => {
                super::extended::serve(self, extended.id, &extended.request, &extended.data)
            }
            _ => Err(Refusal::Status(StatusCode::OpUnsupported)),
        }
    }

    fn open(&mut self, id: u32, filename: &str, flags: OpenFlags, attrs: &FileAttributes) -> Answer {
        let append = flags.contains(OpenFlags::APPEND);
        let mut options = OpenOptions::new();
        // As sftp-server has it: what asks for neither reads.
        options
            .read(flags.contains(OpenFlags::READ) || !flags.contains(OpenFlags::WRITE))
            .write(flags.contains(OpenFlags::WRITE))
            .mode(attrs.permissions.unwrap_or(DEFAULT_MODE) & MODE_BITS);
        let mut more = 0;
        for (flag, bits) in [
            (OpenFlags::APPEND, libc::O_APPEND),
            (OpenFlags::CREATE, libc::O_CREAT),
            (OpenFlags::TRUNCATE, libc::O_TRUNC),
            (OpenFlags::EXCLUDE, libc::O_EXCL),
        ] {
            more |= if flags.contains(flag) { bits } else { 0 };
        }
        let file = options.custom_flags(more | libc::O_NOCTTY).open(path(filename))?;
        self.keep(id, Handle::File { file, append })
    }

    fn keep(&mut self, id: u32, handle: Handle) -> Answer {
        if self.handles.len() >= MAX_HANDLES {
            return Err(io::Error::from_raw_os_error(libc::EMFILE).into());
        }
        self.last_handle += 1;
        let name = self.last_handle.to_string();
        self.handles.insert(name.clone(), handle);
        Ok(HandleReply { id, handle: name }.into())
    }

    /// An open file, and whether writes go to its end.
    pub(super) fn file(&self, handle: &str) -> Result<(&File, bool), Refusal> {
        match self.handles.get(handle) {
            Some(Handle::File { file, append }) => Ok((file, *append)),
            _ => Err(Refusal::Status(StatusCode::Failure)),
        }
    }

    fn entries(&mut self, id: u32, handle: &str) -> Answer {
        let Some(Handle::Folder { path, entries }) = self.handles.get_mut(handle) else {
            return Err(Refusal::Status(StatusCode::Failure));
        };
        let names = self.names.get_or_insert_with(Names::read);
        let mut files = Vec::new();
        for entry in entries.by_ref().take(ENTRIES) {
            let name = entry?.file_name();
            // What vanishes meanwhile is left out.
            if let Ok(metadata) = fs::symlink_metadata(path.join(&name)) {
                files.push(names.entry(name.to_string_lossy().into_owned(), &metadata));
            }
        }
        if files.is_empty() {
            return Err(Refusal::Status(StatusCode::Eof));
        }
        Ok(Name { id, files }.into())
    }
}

/// A path as the client means it: nothing is the folder that it starts in.
pub(super) fn path(text: &str) -> &Path {
    Path::new(if text.is_empty() { "." } else { text })
}

fn attrs(id: u32, metadata: &fs::Metadata) -> Answer {
    let attrs = attributes(metadata);
    Ok(Attrs { id, attrs }.into())
}

pub(super) fn name(id: u32, path: &Path) -> Packet {
    let file = russh_sftp::protocol::File::dummy(path.to_string_lossy());
    Name {
        id,
        files: vec![file],
    }
    .into()
}

/// As many bytes as there are up to the end of the file, but at least one.
fn read_at(file: &File, offset: u64, length: u32) -> Result<Vec<u8>, Refusal> {
    let mut data = vec![0; MAX_DATA.min(length as usize)];
    let mut filled = 0;
    while filled < data.len() {
        match file.read_at(&mut data[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Pipes and devices have no offsets.
            Err(error) if error.raw_os_error() == Some(libc::ESPIPE) => {
                filled = io::Read::read(&mut &*file, &mut data)?;
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    if filled == 0 && length > 0 {
        return Err(Refusal::Status(StatusCode::Eof));
    }
    data.truncate(filled);
    Ok(data)
}

fn seconds(time: u32) -> Timespec {
    Timespec {
        tv_sec: time.into(),
        tv_nsec: 0,
    }
}

/// Sets everything but the size, of the path or of the symlink that it is.
pub(super) fn set_attributes(path: &Path, attrs: &FileAttributes, flags: AtFlags) -> Result<(), Refusal> {
    if let Some(mode) = attrs.permissions {
        rustix::fs::chmodat(CWD, path, (mode & MODE_BITS).into(), flags)?;
    }
    if let (Some(atime), Some(mtime)) = (attrs.atime, attrs.mtime) {
        let times = Timestamps {
            last_access: seconds(atime),
            last_modification: seconds(mtime),
        };
        rustix::fs::utimensat(CWD, path, &times, flags)?;
    }
    if let (Some(uid), Some(gid)) = (attrs.uid, attrs.gid) {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), flags)?;
    }
    Ok(())
}

fn set_file_attributes(file: &File, attrs: &FileAttributes) -> Result<(), Refusal> {
    if let Some(size) = attrs.size {
        file.set_len(size)?;
    }
    if let Some(mode) = attrs.permissions {
        file.set_permissions(fs::Permissions::from_mode(mode & MODE_BITS))?;
    }
    if let (Some(atime), Some(mtime)) = (attrs.atime, attrs.mtime) {
        let time = |seconds: u32| UNIX_EPOCH + Duration::from_secs(seconds.into());
        file.set_times(
            FileTimes::new()
                .set_accessed(time(atime))
                .set_modified(time(mtime)),
        )?;
    }
    if let (Some(uid), Some(gid)) = (attrs.uid, attrs.gid) {
        std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
    }
    Ok(())
}

/// rename(2), but never over what is there.
fn rename_to_new(old: &Path, new: &Path) -> Result<(), Refusal> {
    match renameat_with(CWD, old, CWD, new, RenameFlags::NOREPLACE) {
        // A file system without that flag.
        Err(rustix::io::Errno::INVAL) if fs::symlink_metadata(new).is_err() => Ok(fs::rename(old, new)?),
        result => Ok(result?),
    }
}

/// The absolute path; its last part may be missing.
pub(super) fn real_path(path: &Path) -> io::Result<PathBuf> {
    match (fs::canonicalize(path), path.file_name()) {
        (Err(error), Some(name)) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            Ok(fs::canonicalize(parent.unwrap_or(Path::new(".")))?.join(name))
        }
        (found, _) => found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_absolute_also_when_their_end_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let folder = fs::canonicalize(folder.path()).unwrap();
        assert_eq!(real_path(&folder.join("../new").join("..")).ok(), None);
        assert_eq!(real_path(&folder.join("new")).unwrap(), folder.join("new"));
        assert!(real_path(&folder.join("no/new")).is_err());
        assert_eq!(real_path(path("")).unwrap(), std::env::current_dir().unwrap());
        assert_eq!(
            real_path(path("x.new")).unwrap(),
            std::env::current_dir().unwrap().join("x.new")
        );
    }

    #[test]
    fn a_rename_takes_no_place_that_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("a"), "a").unwrap();
        fs::write(at("b"), "b").unwrap();
        assert!(rename_to_new(&at("a"), &at("b")).is_err());
        rename_to_new(&at("a"), &at("c")).unwrap();
        assert_eq!(fs::read(at("b")).unwrap(), b"b");
        assert_eq!(fs::read(at("c")).unwrap(), b"a");
    }

    #[test]
    fn reads_end_with_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "0123456789").unwrap();
        let file = File::open(path).unwrap();
        assert_eq!(read_at(&file, 8, 100).unwrap(), b"89");
        assert_eq!(read_at(&file, 2, 3).unwrap(), b"234");
        assert!(matches!(
            read_at(&file, 10, 1),
            Err(Refusal::Status(StatusCode::Eof))
        ));
        assert!(read_at(&file, u64::MAX, 4).is_err());
    }

    #[test]
    fn handles_are_bounded() {
        let mut server = Server::default();
        for n in 0..=MAX_HANDLES {
            let entries = fs::read_dir("/").unwrap();
            let kept = server.keep(
                1,
                Handle::Folder {
                    path: "/".into(),
                    entries,
                },
            );
            assert_eq!(kept.is_ok(), n < MAX_HANDLES);
        }
    }
}
