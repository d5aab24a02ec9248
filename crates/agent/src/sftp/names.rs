//! How files are shown: their attributes, and the line that `ls -l` of a client prints.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use russh_sftp::protocol::{File, FileAttributes};

use crate::spawn::user_files;

/// Names of users and groups by number.
pub(super) struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

/// The first and the third field of each line.
fn by_number(text: &str) -> HashMap<u32, String> {
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(Ok(id))) = (fields.next(), fields.nth(1).map(str::parse)) {
            names.entry(id).or_insert_with(|| name.to_owned());
        }
    }
    names
}

impl Names {
    /// As the guest's files have them.
    pub(super) fn read() -> Self {
        let (passwd, group) = user_files();
        Self {
            users: by_number(&passwd),
            groups: by_number(&group),
        }
    }

    /// One entry of a folder.
    pub(super) fn entry(&self, name: String, metadata: &Metadata) -> File {
        let shown =
            |names: &HashMap<u32, String>, id: u32| names.get(&id).cloned().unwrap_or_else(|| id.to_string());
        let (user, group) = (
            shown(&self.users, metadata.uid()),
            shown(&self.groups, metadata.gid()),
        );
        let mut file = File::new(name, attributes(metadata));
        // The library's line knows files and folders alone, and no number of links; its date is good.
        let date: Vec<&str> = file.longname.split(' ').skip(5).take(4).collect();
        file.longname = format!(
            "{} {:>4} {user:<8} {group:<8} {:>8} {} {}",
            mode_text(metadata.mode()),
            metadata.nlink(),
            metadata.len(),
            date.join(" "),
            file.filename,
        );
        file
    }
}

/// As stat(2) has them.
pub(super) fn attributes(metadata: &Metadata) -> FileAttributes {
    // The protocol counts seconds in 32 bits.
    let seconds = |time: i64| u32::try_from(time.max(0)).unwrap_or(u32::MAX);
    FileAttributes {
        size: Some(metadata.len()),
        uid: Some(metadata.uid()),
        user: None,
        gid: Some(metadata.gid()),
        group: None,
        permissions: Some(metadata.mode()),
        atime: Some(seconds(metadata.atime())),
        mtime: Some(seconds(metadata.mtime())),
    }
}

/// As `ls -l` shows a mode.
fn mode_text(mode: u32) -> String {
    let kind = match mode & libc::S_IFMT {
        libc::S_IFDIR => 'd',
        libc::S_IFLNK => 'l',
        libc::S_IFCHR => 'c',
        libc::S_IFBLK => 'b',
        libc::S_IFIFO => 'p',
        libc::S_IFSOCK => 's',
        _ => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, set, unset) in [
        (6, 0o4000, 's', 'S'),
        (3, 0o2000, 's', 'S'),
        (0, 0o1000, 't', 'T'),
    ] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => set,
            (true, false) => unset,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_shown_as_ls_shows_them() {
        for (mode, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o120_777, "lrwxrwxrwx"),
            (0o104_755, "-rwsr-xr-x"),
            (0o102_644, "-rw-r-Sr--"),
            (0o041_777, "drwxrwxrwt"),
            (0o010_600, "prw-------"),
        ] {
            assert_eq!(mode_text(mode), text);
        }
    }

    #[test]
    fn an_entry_says_whose_it_is() {
        let names = Names {
            users: by_number("root:x:0:0::/:\nbroken\ntoor:x:0:"),
            groups: HashMap::new(),
        };
        let entry = names.entry("n".to_owned(), &std::fs::symlink_metadata("/").unwrap());
        assert!(entry.longname.starts_with("drwx"), "{}", entry.longname);
        assert!(entry.longname.contains(" root "), "{}", entry.longname);
        assert!(entry.longname.ends_with(" n"), "{}", entry.longname);
        assert_eq!(entry.attrs.permissions.unwrap() & libc::S_IFMT, libc::S_IFDIR);
    }
}
