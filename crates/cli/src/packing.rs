//! Tars that are written by a thread while they are sent.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use futures::stream;
use offshoot_api::client::Upload;
use tokio::sync::mpsc;

/// How much is handed over at once.
const CHUNK: usize = 256 << 10;
/// How many chunks wait to be sent.
const QUEUE: usize = 4;

/// A tar writer whose bytes go into an upload.
pub(crate) type Tar = tar::Builder<Pipe>;

/// The tar that `write` writes. When it fails, the upload fails.
pub(crate) fn tar_upload(write: impl FnOnce(&mut Tar) -> io::Result<()> + Send + 'static) -> Upload {
    Upload::from_stream(stream::unfold(tar_chunks(write), |mut chunks| async {
        chunks.recv().await.map(|chunk| (chunk, chunks))
    }))
}

fn tar_chunks(
    write: impl FnOnce(&mut Tar) -> io::Result<()> + Send + 'static,
) -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    std::thread::spawn(move || {
        let pipe = Pipe {
            sender: sender.clone(),
            buffer: BytesMut::with_capacity(CHUNK),
            closed: false,
        };
        let mut tar = tar::Builder::new(pipe);
        let written = write(&mut tar)
            .and_then(|()| tar.finish())
            .and_then(|()| tar.get_mut().flush());
        // Dropping the builder would end the archive as if it were whole.
        tar.get_mut().closed = true;
        drop(tar);
        if let Err(e) = written {
            // Nobody waits for it when the upload was given up.
            let _ = sender.blocking_send(Err(e));
        }
    });
    receiver
}

/// Bytes on their way to an upload.
#[derive(Debug)]
pub(crate) struct Pipe {
    sender: mpsc::Sender<io::Result<Bytes>>,
    buffer: BytesMut,
    closed: bool,
}

impl Write for Pipe {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.closed {
            return Ok(data.len());
        }
        self.buffer.extend_from_slice(data);
        if self.buffer.len() >= CHUNK {
            self.flush()?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() || self.closed {
            return Ok(());
        }
        let chunk = self.buffer.split().freeze();
        self.sender
            .blocking_send(Ok(chunk))
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

/// Whose files they become where they are unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Root's.
    Root,
    /// The owners they have here, by number.
    Same,
}

/// Appends the file or folder at `source` under `name`; with an empty name, what the folder holds.
///
/// Symlinks are kept as they are. Sockets, pipes and devices are left out: they mean something here only.
pub(crate) fn append_tree<W: Write>(
    tar: &mut tar::Builder<W>,
    source: &Path,
    name: &Path,
    owner: Owner,
) -> io::Result<()> {
    let mut left = vec![(source.to_owned(), name.to_owned())];
    while let Some((path, name)) = left.pop() {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let metadata = fs::symlink_metadata(&path).map_err(named)?;
        if metadata.is_dir() {
            if !name.as_os_str().is_empty() {
                let mut header = header(&metadata, owner, tar::EntryType::Directory, 0);
                tar.append_data(&mut header, &name, io::empty()).map_err(named)?;
            }
            let mut entries = fs::read_dir(&path)
                .map_err(named)?
                .collect::<io::Result<Vec<_>>>()
                .map_err(named)?;
            entries.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
            left.extend(
                entries
                    .into_iter()
                    .map(|entry| (entry.path(), name.join(entry.file_name()))),
            );
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path).map_err(named)?;
            let mut header = header(&metadata, owner, tar::EntryType::Symlink, 0);
            tar.append_link(&mut header, &name, &target).map_err(named)?;
        } else if metadata.is_file() {
            let file = File::open(&path).map_err(named)?;
            let mut header = header(&metadata, owner, tar::EntryType::Regular, metadata.len());
            tar.append_data(
                &mut header,
                &name,
                Exactly {
                    inner: file,
                    left: metadata.len(),
                },
            )
            .map_err(named)?;
        }
    }
    Ok(())
}

fn header(metadata: &fs::Metadata, owner: Owner, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(metadata.mode() & 0o7777);
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header.set_size(size);
    let (uid, gid) = match owner {
        Owner::Root => (0, 0),
        Owner::Same => (metadata.uid(), metadata.gid()),
    };
    header.set_uid(uid.into());
    header.set_gid(gid.into());
    header
}

/// Exactly as many bytes as were promised: a file may grow or shrink while it is read, an entry may not.
struct Exactly<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file shrank while it was read",
            ));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tar: &[u8]) -> Vec<(String, tar::EntryType, u64)> {
        let mut archive = tar::Archive::new(tar);
        let entries = archive.entries().unwrap().map(Result::unwrap);
        entries
            .map(|e| {
                (
                    e.path().unwrap().display().to_string(),
                    e.header().entry_type(),
                    e.header().uid().unwrap(),
                )
            })
            .collect()
    }

    #[test]
    fn a_tree_is_packed_in_order_and_as_root() {
        use tar::EntryType::*;
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("b")).unwrap();
        fs::write(dir.path().join("b/x"), "x").unwrap();
        fs::write(dir.path().join("a".repeat(150)), "long").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("l")).unwrap();
        let pack = |name: &str| {
            let mut tar = tar::Builder::new(Vec::new());
            append_tree(&mut tar, dir.path(), Path::new(name), Owner::Root).unwrap();
            names(&tar.into_inner().unwrap())
        };
        let long = "a".repeat(150);
        assert_eq!(
            pack(""),
            [
                (long.clone(), Regular, 0),
                ("b".into(), Directory, 0),
                ("b/x".into(), Regular, 0),
                ("l".into(), Symlink, 0)
            ]
        );
        let named: Vec<String> = pack("n").into_iter().map(|(name, ..)| name).collect();
        assert_eq!(named, ["n", &format!("n/{long}"), "n/b", "n/b/x", "n/l"]);
    }

    #[test]
    fn an_upload_that_fails_does_not_look_whole() {
        let mut chunks = tar_chunks(|tar| {
            append_tree(tar, Path::new("/proc/self/status"), Path::new("s"), Owner::Root)?;
            Err(io::Error::other("no more"))
        });
        let mut received = Vec::new();
        let error = loop {
            match chunks.blocking_recv() {
                Some(Ok(chunk)) => received.extend_from_slice(&chunk),
                Some(Err(e)) => break e,
                None => panic!("the upload ended as if it were whole"),
            }
        };
        assert_eq!(error.to_string(), "no more");
        assert!(!received.ends_with(&[0; 1024]));
        assert!(chunks.blocking_recv().is_none());
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let mut reader = Exactly {
            inner: &b"abc"[..],
            left: 5,
        };
        assert!(reader.read_to_end(&mut Vec::new()).is_err());
        let mut all = Vec::new();
        Exactly {
            inner: &b"abcdef"[..],
            left: 5,
        }
        .read_to_end(&mut all)
        .unwrap();
        assert_eq!(all, b"abcde");
    }
}
