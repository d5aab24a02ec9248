//! OpenSSH's extensions (its `PROTOCOL` file, section 4).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use russh_sftp::extensions::{
    EXPAND_PATH, ExpandPathExtension, FSYNC, FsyncExtension, HARDLINK, HardlinkExtension, LIMITS,
    LimitsExtension, STATVFS, Statvfs, StatvfsExtension,
};
use russh_sftp::protocol::{ExtendedReply, FileAttributes, StatusCode};
use russh_sftp::{de, ser};
use rustix::fs::AtFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::MAX_PACKET;
use super::server::{
    Answer, MAX_DATA, MAX_HANDLES, Refusal, Server, fine, name, path, real_path, set_attributes,
};

const POSIX_RENAME: &str = "posix-rename@openssh.com";
const FSTATVFS: &str = "fstatvfs@openssh.com";
const LSETSTAT: &str = "lsetstat@openssh.com";

/// What clients are told that there is, with the version of each.
pub(super) fn offered() -> HashMap<String, String> {
    [
        (POSIX_RENAME, "1"),
        (STATVFS, "2"),
        (FSTATVFS, "2"),
        (HARDLINK, "1"),
        (FSYNC, "1"),
        (LSETSTAT, "1"),
        (LIMITS, "1"),
        (EXPAND_PATH, "1"),
    ]
    .into_iter()
    .map(|(name, version)| (name.to_owned(), version.to_owned()))
    .collect()
}

fn read<T: DeserializeOwned>(data: &[u8]) -> Result<T, Refusal> {
    de::from_bytes(&mut Bytes::copy_from_slice(data)).map_err(|_| Refusal::Status(StatusCode::BadMessage))
}

fn reply(id: u32, value: &impl Serialize) -> Answer {
    let data = ser::to_bytes(value).map_err(|_| Refusal::Status(StatusCode::Failure))?;
    Ok(ExtendedReply {
        id,
        data: data.to_vec(),
    }
    .into())
}

fn statvfs(about: &rustix::fs::StatVfs) -> Statvfs {
    /// The protocol's own bits for a read-only file system and one without set-user-id.
    const RDONLY: u64 = 1;
    const NOSUID: u64 = 2;
    let flags = about.f_flag;
    let bit = |flag, value| if flags.contains(flag) { value } else { 0 };
    Statvfs {
        block_size: about.f_bsize,
        fragment_size: about.f_frsize,
        blocks: about.f_blocks,
        blocks_free: about.f_bfree,
        blocks_avail: about.f_bavail,
        inodes: about.f_files,
        inodes_free: about.f_ffree,
        inodes_avail: about.f_favail,
        fs_id: about.f_fsid,
        flags: bit(rustix::fs::StatVfsMountFlags::RDONLY, RDONLY)
            | bit(rustix::fs::StatVfsMountFlags::NOSUID, NOSUID),
        name_max: about.f_namemax,
    }
}

/// Serves one.
pub(super) fn serve(server: &Server, id: u32, request: &str, data: &[u8]) -> Answer {
    match request {
        POSIX_RENAME => {
            // Two paths, as a hard link has them.
            let HardlinkExtension { oldpath, newpath } = read(data)?;
            fs::rename(path(&oldpath), path(&newpath))?;
            fine(id)
        }
        HARDLINK => {
            let HardlinkExtension { oldpath, newpath } = read(data)?;
            fs::hard_link(path(&oldpath), path(&newpath))?;
            fine(id)
        }
        FSYNC => {
            let FsyncExtension { handle } = read(data)?;
            server.file(&handle)?.0.sync_all()?;
            fine(id)
        }
        STATVFS => {
            let asked: StatvfsExtension = read(data)?;
            reply(id, &statvfs(&rustix::fs::statvfs(path(&asked.path))?))
        }
        FSTATVFS => {
            let FsyncExtension { handle } = read(data)?;
            reply(id, &statvfs(&rustix::fs::fstatvfs(server.file(&handle)?.0)?))
        }
        LSETSTAT => {
            let (asked, attrs): (String, FileAttributes) = read(data)?;
            set_attributes(path(&asked), &attrs, AtFlags::SYMLINK_NOFOLLOW)?;
            fine(id)
        }
        LIMITS => reply(
            id,
            &LimitsExtension {
                max_packet_len: MAX_PACKET as u64,
                max_read_len: MAX_DATA as u64,
                max_write_len: MAX_DATA as u64,
                max_open_handles: MAX_HANDLES as u64,
            },
        ),
        EXPAND_PATH => {
            let asked: ExpandPathExtension = read(data)?;
            Ok(name(id, &real_path(&expand(&asked.path)?)?))
        }
        _ => Err(Refusal::Status(StatusCode::OpUnsupported)),
    }
}

/// `~` and `~/...`: the client's own home, which it started in.
fn expand(text: &str) -> Result<PathBuf, Refusal> {
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("/"), PathBuf::from);
    match text.strip_prefix('~') {
        None => Ok(path(text).to_owned()),
        Some("") => Ok(home()),
        Some(rest) => match rest.strip_prefix('/') {
            Some(rest) => Ok(home().join(Path::new(rest))),
            // Another user's.
            None => Err(Refusal::Status(StatusCode::NoSuchFile)),
        },
    }
}

#[cfg(test)]
mod tests {
    use russh_sftp::protocol::Packet;

    use super::*;

    fn status(answer: Answer) -> Option<StatusCode> {
        match answer {
            Ok(Packet::Status(status)) => Some(status.status_code),
            Ok(_) => None,
            Err(Refusal::Status(code)) => Some(code),
            Err(Refusal::Io(error)) => panic!("{error}"),
        }
    }

    #[test]
    fn limits_and_space_are_told() {
        let server = Server::default();
        let Ok(Packet::ExtendedReply(limits)) = serve(&server, 1, LIMITS, &[]) else {
            panic!("no limits")
        };
        assert_eq!(limits.data.len(), 32);
        let Ok(Packet::ExtendedReply(space)) = serve(&server, 1, STATVFS, b"\0\0\0\x01/") else {
            panic!("no statvfs")
        };
        assert_eq!(space.data.len(), 88);
    }

    #[test]
    fn paths_are_renamed_over_others() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        fs::write(at("a"), "a").unwrap();
        fs::write(at("b"), "b").unwrap();
        let both = ser::to_bytes(&HardlinkExtension {
            oldpath: at("a"),
            newpath: at("b"),
        })
        .unwrap();
        let server = Server::default();
        assert_eq!(
            status(serve(&server, 1, POSIX_RENAME, &both)),
            Some(StatusCode::Ok)
        );
        assert_eq!(fs::read(at("b")).unwrap(), b"a");
        assert_eq!(
            status(serve(&server, 1, HARDLINK, b"\0\0\0\x09x")),
            Some(StatusCode::BadMessage)
        );
        assert_eq!(
            status(serve(&server, 1, "other", &both)),
            Some(StatusCode::OpUnsupported)
        );
    }

    #[test]
    fn homes_are_found() {
        assert_eq!(expand("/x/~").unwrap(), Path::new("/x/~"));
        assert!(expand("~").unwrap().is_absolute());
        assert!(expand("~/x").unwrap().ends_with("x"));
        assert!(expand("~bob").is_err());
    }
}
