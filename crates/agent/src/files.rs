//! Files in and out, as tar streams. Runs in threads that see what the guest sees; the guest's symlinks are its own
//! business.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use bytes::{Buf, Bytes, BytesMut};
use offshoot_agent_proto::limits::MAX_CHUNK;
use offshoot_agent_proto::v1;
use tokio::sync::mpsc;
use tonic::Status;

/// The longest path the kernel takes.
const MAX_PATH: usize = 4096;

/// Tar from the host, as a thread reads it.
pub(crate) struct TarSource {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl TarSource {
    /// Reads what the channel brings; its end is the end of the tar.
    pub(crate) fn new(chunks: mpsc::Receiver<io::Result<Bytes>>) -> Self {
        Self {
            chunks,
            current: Bytes::new(),
        }
    }
}

impl Read for TarSource {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.current = chunk?,
                None => return Ok(0),
            }
        }
        let count = out.len().min(self.current.len());
        self.current.copy_to_slice(&mut out[..count]);
        Ok(count)
    }
}

/// Tar for the host, as a thread writes it.
struct TarSink {
    chunks: mpsc::Sender<Result<v1::CopyOutReply, Status>>,
    buffer: BytesMut,
}

impl TarSink {
    fn send(&mut self) -> io::Result<()> {
        let what = Some(v1::copy_out_reply::What::Tar(self.buffer.split().freeze()));
        self.chunks
            .blocking_send(Ok(v1::CopyOutReply { what }))
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for TarSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.buffer.capacity() == 0 {
            self.buffer.reserve(MAX_CHUNK);
        }
        let count = data.len().min(MAX_CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&data[..count]);
        if self.buffer.len() == MAX_CHUNK {
            self.send()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            Ok(())
        } else {
            self.send()
        }
    }
}

fn absolute(path: &str) -> Result<&Path, Status> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > MAX_PATH {
        return Err(Status::invalid_argument(format!(
            "{path:?} is not an absolute path"
        )));
    }
    Ok(Path::new(path))
}

fn status(what: &str, path: &Path, error: &io::Error) -> Status {
    let message = format!("cannot {what} {}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::NotFound => {
            Status::not_found(format!("no such file or directory in the VM: {}", path.display()))
        }
        io::ErrorKind::NotADirectory => {
            Status::failed_precondition(format!("not a directory in the VM: {}", path.display()))
        }
        io::ErrorKind::StorageFull => Status::resource_exhausted(message),
        io::ErrorKind::ReadOnlyFilesystem => Status::failed_precondition(message),
        _ => Status::internal(message),
    }
}

/// An error with its causes: the tar crate says only where it was.
fn chain(error: &io::Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    let mut text = error.to_string();
    for cause in causes.map(ToString::to_string).filter(|cause| !cause.is_empty()) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Unpacks a tar stream below an existing folder; returns how many entries it had.
pub(crate) fn unpack(directory: &str, source: impl Read) -> Result<u64, Status> {
    let directory = absolute(directory)?;
    let metadata = fs::metadata(directory).map_err(|error| status("open", directory, &error))?;
    if !metadata.is_dir() {
        return Err(status("open", directory, &io::ErrorKind::NotADirectory.into()));
    }
    let failed = |error: io::Error| match error.kind() {
        // Only a broken stream from the host has this kind.
        io::ErrorKind::ConnectionAborted => Status::cancelled("the tar stream ended early"),
        io::ErrorKind::StorageFull => {
            Status::resource_exhausted(format!("the VM's disk is full: {}", chain(&error)))
        }
        _ => Status::internal(format!(
            "cannot unpack into {}: {}",
            directory.display(),
            chain(&error)
        )),
    };
    let mut archive = tar::Archive::new(source);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    archive.set_overwrite(true);
    let mut count = 0;
    // Folders last, so that their times and modes are what the tar says after everything in them is there.
    let mut folders = Vec::new();
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        count += 1;
        if entry.header().entry_type().is_dir() {
            folders.push(entry);
        } else {
            entry.unpack_in(directory).map_err(failed)?;
        }
    }
    folders.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut folder in folders {
        folder.unpack_in(directory).map_err(failed)?;
    }
    Ok(count)
}

/// What a path is.
fn stat(path: &Path, metadata: &fs::Metadata) -> v1::PathStat {
    let target = if metadata.is_symlink() {
        fs::read_link(path).unwrap_or_default()
    } else {
        PathBuf::new()
    };
    v1::PathStat {
        name: root_name(path).to_string_lossy().into_owned(),
        mode: metadata.mode(),
        size: metadata.len(),
        link_target: target.to_string_lossy().into_owned(),
    }
}

/// The last component, under which the path travels; `.` for the root and for what ends in dots.
fn root_name(path: &Path) -> PathBuf {
    match path.components().next_back() {
        Some(Component::Normal(name)) => PathBuf::from(name),
        _ => PathBuf::from("."),
    }
}

/// Packs a path: first its description, then the tar. Errors go the same way.
pub(crate) fn pack(path: &str, chunks: &mpsc::Sender<Result<v1::CopyOutReply, Status>>) {
    if let Err(error) = try_pack(path, chunks) {
        // A host that is gone needs no error.
        drop(chunks.blocking_send(Err(error)));
    }
}

fn try_pack(path: &str, chunks: &mpsc::Sender<Result<v1::CopyOutReply, Status>>) -> Result<(), Status> {
    let path = absolute(path)?;
    let metadata = fs::symlink_metadata(path).map_err(|error| status("read", path, &error))?;
    let what = Some(v1::copy_out_reply::What::Stat(stat(path, &metadata)));
    if chunks.blocking_send(Ok(v1::CopyOutReply { what })).is_err() {
        return Ok(());
    }
    let sink = TarSink {
        chunks: chunks.clone(),
        buffer: BytesMut::new(),
    };
    let mut builder = tar::Builder::new(sink);
    builder.follow_symlinks(false);
    let packed = append_tree(&mut builder, path, &root_name(path));
    match packed
        .and_then(|()| builder.into_inner())
        .and_then(|mut sink| sink.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(status("pack", path, &error)),
        _ => Ok(()),
    }
}

/// Appends a path and what is below it. What vanishes meanwhile is left out.
fn append_tree(builder: &mut tar::Builder<TarSink>, path: &Path, name: &Path) -> io::Result<()> {
    let mut waiting = vec![(path.to_owned(), name.to_owned())];
    while let Some((path, name)) = waiting.pop() {
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result?,
        };
        if metadata.is_file() {
            append_file(builder, &path, &name, &metadata)?;
        } else if !metadata.file_type().is_socket() {
            builder.append_path_with_name(&path, &name)?;
        }
        if metadata.is_dir() && !is_the_kernels(&path) {
            let mut entries = fs::read_dir(&path)?.collect::<io::Result<Vec<_>>>()?;
            // The last in is the first out.
            entries.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
            waiting.extend(
                entries
                    .into_iter()
                    .map(|entry| (entry.path(), name.join(entry.file_name()))),
            );
        }
    }
    Ok(())
}

/// Whether a folder is one of the kernel's own file systems, whose files are without end.
fn is_the_kernels(path: &Path) -> bool {
    const PROC: u64 = 0x9fa0;
    const SYSFS: u64 = 0x6265_6572;
    const CGROUP2: u64 = 0x6367_7270;
    rustix::fs::statfs(path)
        .is_ok_and(|about| [PROC, SYSFS, CGROUP2].contains(&u64::try_from(about.f_type).unwrap_or(0)))
}

/// Appends a regular file as long as its metadata says, even when it changes meanwhile.
fn append_file(
    builder: &mut tar::Builder<TarSink>,
    path: &Path,
    name: &Path,
    metadata: &fs::Metadata,
) -> io::Result<()> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    builder.append_data(&mut header, name, file.chain(io::repeat(0)).take(metadata.len()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn copy_out(path: &Path) -> Result<(v1::PathStat, Vec<u8>), Status> {
        let (sender, mut receiver) = mpsc::channel(2);
        let path = path.to_str().unwrap().to_owned();
        let packer = std::thread::spawn(move || pack(&path, &sender));
        let (mut stat, mut tar) = (None, Vec::new());
        while let Some(reply) = receiver.blocking_recv() {
            match reply?.what.unwrap() {
                v1::copy_out_reply::What::Stat(found) => stat = Some(found),
                v1::copy_out_reply::What::Tar(bytes) => {
                    assert!(bytes.len() <= MAX_CHUNK);
                    tar.extend_from_slice(&bytes);
                }
            }
        }
        packer.join().unwrap();
        Ok((stat.unwrap(), tar))
    }

    #[test]
    fn a_tree_comes_back_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        let large: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
        let long = "n".repeat(180);
        fs::write(tree.join("a/large"), &large).unwrap();
        fs::write(tree.join("a/b").join(&long), "long").unwrap();
        fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(tree.join("a/large"), fs::Permissions::from_mode(0o4755)).unwrap();
        symlink("/nowhere", tree.join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();

        let (stat, tar) = copy_out(&tree).unwrap();
        assert_eq!(stat.name, "tree");
        let target = folder.path().join("target");
        fs::create_dir(&target).unwrap();
        assert_eq!(unpack(target.to_str().unwrap(), &tar[..]).unwrap(), 6);
        let back = target.join("tree");
        assert_eq!(fs::read(back.join("a/large")).unwrap(), large);
        assert_eq!(fs::read(back.join("a/b").join(&long)).unwrap(), b"long");
        assert_eq!(fs::read_link(back.join("link")).unwrap(), Path::new("/nowhere"));
        assert!(!back.join("socket").exists());
        for path in ["a", "a/b", "a/large"] {
            let (old, new) = (
                fs::metadata(tree.join(path)).unwrap(),
                fs::metadata(back.join(path)).unwrap(),
            );
            assert_eq!((old.mode(), old.mtime()), (new.mode(), new.mtime()), "{path}");
        }
    }

    #[test]
    fn what_is_not_there_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let missing = folder.path().join("missing");
        assert_eq!(copy_out(&missing).unwrap_err().code(), tonic::Code::NotFound);
        assert_eq!(
            copy_out(&file.join("x")).unwrap_err().code(),
            tonic::Code::FailedPrecondition
        );
        let refused = |path: &Path| unpack(path.to_str().unwrap(), &[][..]).unwrap_err().code();
        assert_eq!(refused(&missing), tonic::Code::NotFound);
        assert_eq!(refused(&file), tonic::Code::FailedPrecondition);
        assert_eq!(
            unpack("relative", &[][..]).unwrap_err().code(),
            tonic::Code::InvalidArgument
        );
    }

    #[test]
    fn a_tar_cannot_leave_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        fs::create_dir(&target).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.as_mut_bytes()[..9].copy_from_slice(b"../escape");
        header.set_cksum();
        builder.append(&header, &b"x"[..]).unwrap();
        let tar = builder.into_inner().unwrap();
        drop(unpack(target.to_str().unwrap(), &tar[..]));
        assert!(!folder.path().join("escape").exists());
    }

    #[test]
    fn the_name_of_a_path_is_its_last_component() {
        for (path, name) in [
            ("/etc/passwd", "passwd"),
            ("/etc/", "etc"),
            ("/", "."),
            ("/etc/..", "."),
        ] {
            assert_eq!(root_name(Path::new(path)), Path::new(name), "{path}");
        }
    }
}
