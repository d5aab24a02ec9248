//! `cp`: files between a VM and this machine, with Docker's rules about where they go.

mod place;
mod unpack;

use std::fs;
use std::io::{self, IsTerminal, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use clap::Args;
use offshoot_api::client::{AnswerBody, Client, ClientError, Upload};
use offshoot_api::vm::PathStat;
use offshoot_model::{ErrorKind, Explain};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use crate::error::Failure;
use crate::output::note;
use crate::packing::{Owner, append_tree, tar_upload};
use place::{Ending, GuestPath, Refusal, Root, Side, Source, There, clean, ending, place, side};

/// File type bits of `st_mode`, and two of their values (inode(7)).
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;
/// How many symlinks in a row are followed, as Linux does it.
const MAX_SYMLINKS: usize = 40;
/// How many pieces of a tar wait to be unpacked.
const QUEUE: usize = 8;

#[derive(Clone, Debug, Args)]
#[command(after_help = "`SRC/.` copies what a folder holds; a tar goes to or comes from `-`.")]
pub(crate) struct CpArgs {
    /// Keep owners, by number
    #[arg(short, long)]
    archive: bool,
    /// Copy what a symlink at SRC leads to
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// What to copy: PATH, VM:PATH, or - for a tar
    #[arg(value_name = "SRC", value_parser = side)]
    source: Side,
    /// Where to: PATH, VM:PATH, or - for a tar
    #[arg(value_name = "DST", value_parser = side)]
    destination: Side,
}

pub(crate) async fn cp(client: &Client, args: &CpArgs) -> Result<u8, Failure> {
    match (&args.source, &args.destination) {
        (Side::Guest { vm, path }, Side::Stream) => to_stream(client, vm, path, args).await?,
        (Side::Guest { vm, path }, Side::Here(here)) => from_guest(client, vm, path, here, args).await?,
        (Side::Stream, Side::Guest { vm, path }) => from_stream(client, vm, path).await?,
        (Side::Here(here), Side::Guest { vm, path }) => to_guest(client, here, vm, path, args).await?,
        (Side::Guest { .. }, Side::Guest { .. }) => {
            return Err(Failure::invalid("cannot copy from one VM to another")
                .hint("pipe it: `offshoot cp VM1:PATH - | offshoot cp - VM2:FOLDER`"));
        }
        _ => {
            return Err(Failure::invalid("cannot copy: neither side is in a VM")
                .hint("write `offshoot cp VM:PATH PATH` or `offshoot cp PATH VM:PATH`"));
        }
    }
    Ok(0)
}

async fn to_stream(client: &Client, vm: &str, path: &GuestPath, args: &CpArgs) -> Result<(), Failure> {
    if io::stdout().is_terminal() {
        return Err(Failure::invalid("cannot write a tar to a terminal")
            .hint("pipe it into `tar -x`, or name a folder"));
    }
    let (_, _, mut body) = open(client, vm, path, args.follow_link).await?;
    let mut stdout = tokio::io::stdout();
    while let Some(chunk) = body.chunk().await? {
        stdout.write_all(&chunk).await.map_err(|e| Failure::write(&e))?;
    }
    stdout.flush().await.map_err(|e| Failure::write(&e))
}

async fn from_stream(client: &Client, vm: &str, path: &GuestPath) -> Result<(), Failure> {
    if io::stdin().is_terminal() {
        return Err(Failure::invalid("cannot read a tar from a terminal")
            .hint("pipe one into it: `tar -c FILES | …`"));
    }
    client
        .unpack(
            vm,
            text(&path.path)?,
            Upload::from_reader(tokio::io::stdin(), None),
        )
        .await?;
    Ok(())
}

async fn from_guest(
    client: &Client,
    vm: &str,
    path: &GuestPath,
    here: &Path,
    args: &CpArgs,
) -> Result<(), Failure> {
    let (found, stat, body) = open(client, vm, path, args.follow_link).await?;
    let name = found
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let refused = |refusal| {
        refusal_of(
            &format!("{vm}:{}", path.path.display()),
            &here.display().to_string(),
            refusal,
        )
    };
    let source = Source {
        // The copy is named after what was asked for, also where a symlink led elsewhere.
        name: path
            .path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        is_dir: is_dir(&stat),
        ending: path.ending,
    };
    let (there, destination) = look_here(here)?;
    let (folder, root) = place(&source, &destination, ending_of(here), there).map_err(refused)?;
    // From here on no symlink of the user's is in the way: the folder's own path is resolved.
    let folder = fs::canonicalize(&folder)
        .map_err(|e| Failure::io(format!("cannot copy to the folder `{}`", folder.display()), &e))?;
    let unpacked = receive(body, name, folder, root, args.archive).await?;
    if unpacked.left_out > 0 {
        note(&format!(
            "left out {} devices, pipes or sockets",
            unpacked.left_out
        ));
    }
    Ok(())
}

async fn to_guest(
    client: &Client,
    here: &Path,
    vm: &str,
    path: &GuestPath,
    args: &CpArgs,
) -> Result<(), Failure> {
    let cannot = |e: &io::Error| Failure::io(format!("cannot read `{}`", here.display()), e);
    let ending = ending_of(here);
    let follow = args.follow_link || ending != Ending::Plain;
    let metadata = if follow {
        fs::metadata(here)
    } else {
        fs::symlink_metadata(here)
    };
    let is_dir = metadata.map_err(|e| cannot(&e))?.is_dir();
    let absolute = clean(&std::path::absolute(here).map_err(|e| cannot(&e))?);
    let name = absolute
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let source = Source { name, is_dir, ending };
    let refused = |refusal| {
        refusal_of(
            &here.display().to_string(),
            &format!("{vm}:{}", path.path.display()),
            refusal,
        )
    };
    let (there, destination) = look_in_guest(client, vm, &path.path).await?;
    let (folder, root) = place(&source, &destination, path.ending, there).map_err(refused)?;
    let from = if follow {
        fs::canonicalize(here).map_err(|e| cannot(&e))?
    } else {
        here.to_owned()
    };
    let owner = if args.archive { Owner::Same } else { Owner::Root };
    let upload = tar_upload(move |tar| {
        let name = match &root {
            Root::Named(name) => Path::new(name),
            Root::Contents => Path::new(""),
        };
        append_tree(tar, &from, name, owner)
    });
    client.unpack(vm, text(&folder)?, upload).await?;
    Ok(())
}

/// The tar of a path in the guest, with the path it has after following symlinks.
async fn open(
    client: &Client,
    vm: &str,
    path: &GuestPath,
    follow: bool,
) -> Result<(PathBuf, PathStat, AnswerBody), Failure> {
    let mut at = path.path.clone();
    for _ in 0..MAX_SYMLINKS {
        let (stat, body) = client.archive(vm, text(&at)?).await?;
        // `x/` and `x/.` mean the folder that a symlink leads to.
        if !is_symlink(&stat) || !(follow || path.ending != Ending::Plain) {
            return Ok((at, stat, body));
        }
        at = target(&at, &stat);
    }
    Err(too_many_symlinks(&path.path))
}

/// What stands at a path in the guest, and the path after following symlinks.
async fn look_in_guest(client: &Client, vm: &str, path: &Path) -> Result<(There, PathBuf), Failure> {
    let mut at = path.to_owned();
    for _ in 0..MAX_SYMLINKS {
        match client.archive(vm, text(&at)?).await {
            Ok((stat, _)) if is_symlink(&stat) => at = target(&at, &stat),
            Ok((stat, _)) => {
                return Ok((
                    if is_dir(&stat) {
                        There::Folder
                    } else {
                        There::Other
                    },
                    at,
                ));
            }
            // No VM looks the same as no path; the upload will tell them apart.
            Err(ClientError::Api(e)) if e.kind == ErrorKind::NotFound => return Ok((There::Nothing, at)),
            Err(e) => return Err(e.into()),
        }
    }
    Err(too_many_symlinks(path))
}

fn target(at: &Path, stat: &PathStat) -> PathBuf {
    clean(&at.parent().unwrap_or(Path::new("/")).join(&stat.link_target))
}

fn too_many_symlinks(path: &Path) -> Failure {
    Failure::invalid(format!("cannot copy `{}`: too many symlinks", path.display()))
        .hint("name the file that they lead to")
}

/// What stands at a path on this machine, and the path without `..`. A symlink that leads somewhere counts as that.
fn look_here(path: &Path) -> Result<(There, PathBuf), Failure> {
    let cannot = |e: &io::Error| Failure::io(format!("cannot look at `{}`", path.display()), e);
    match fs::metadata(path) {
        Ok(metadata) => {
            let there = if metadata.is_dir() {
                There::Folder
            } else {
                There::Other
            };
            Ok((there, fs::canonicalize(path).map_err(|e| cannot(&e))?))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Ok((There::Nothing, std::path::absolute(path).map_err(|e| cannot(&e))?))
        }
        Err(e) => Err(cannot(&e)),
    }
}

/// Unpacks a body in a thread of its own while it comes.
async fn receive(
    mut body: AnswerBody,
    name: String,
    folder: PathBuf,
    root: Root,
    same_owner: bool,
) -> Result<unpack::Unpacked, Failure> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let reader = Incoming {
        receiver,
        chunk: Bytes::new(),
    };
    let work = tokio::task::spawn_blocking(move || unpack::unpack(reader, &name, &folder, &root, same_owner));
    let pump = async {
        loop {
            match body.chunk().await {
                Ok(Some(chunk)) => {
                    if sender.send(Ok(chunk)).await.is_err() {
                        break Ok(());
                    }
                }
                Ok(None) => break Ok(()),
                Err(e) => {
                    let _ = sender.send(Err(io::Error::other("the connection broke"))).await;
                    break Err(e);
                }
            }
        }
    };
    let pumped = pump.await;
    drop(sender);
    let unpacked = work
        .await
        .map_err(|e| Failure::new(ErrorKind::Internal, "cannot unpack").caused_by(&e))?;
    pumped?;
    unpacked.map_err(|e| {
        let failure = Failure::new(e.kind(), e.to_string());
        let failure = std::error::Error::source(&e)
            .into_iter()
            .fold(failure, Failure::caused_by);
        e.hints().into_iter().fold(failure, Failure::hint)
    })
}

/// The pieces of a body as a reader for a thread that may block.
struct Incoming {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    chunk: Bytes,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.receiver.blocking_recv() {
                Some(chunk) => self.chunk = chunk?,
                None => return Ok(0),
            }
        }
        let read = self.chunk.len().min(buffer.len());
        self.chunk.copy_to_slice(&mut buffer[..read]);
        Ok(read)
    }
}

fn is_dir(stat: &PathStat) -> bool {
    stat.mode & S_IFMT == S_IFDIR
}

fn is_symlink(stat: &PathStat) -> bool {
    stat.mode & S_IFMT == S_IFLNK
}

fn ending_of(path: &Path) -> Ending {
    ending(&String::from_utf8_lossy(path.as_os_str().as_bytes()))
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str()
        .ok_or_else(|| Failure::invalid(format!("`{}` is not UTF-8", path.display())))
}

fn refusal_of(source: &str, destination: &str, refusal: Refusal) -> Failure {
    Failure::invalid(format!(
        "cannot copy `{source}` to `{destination}`: {}",
        refusal.text()
    ))
    .hint(match refusal {
        Refusal::NoSuchFolder => "make the folder first, or leave out the `/` at the end",
        Refusal::SourceIsNoFolder => "leave out the `/` at the end of the source",
        Refusal::FolderOverFile | Refusal::DestinationIsNoFolder => "name a folder, or a name that is free",
    })
}
