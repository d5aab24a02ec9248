//! Where installed programs are, found without running them.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Where system tools are that not every account looks for.
const SYSTEM: [&str; 2] = ["/usr/sbin", "/sbin"];

/// The first executable file called `name` in the folders of `PATH`, then in those of system tools.
pub fn find(name: &str) -> Option<PathBuf> {
    find_in(&std::env::var_os("PATH").unwrap_or_default(), name)
}

fn find_in(path: &OsStr, name: &str) -> Option<PathBuf> {
    std::env::split_paths(path)
        .chain(SYSTEM.map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| is_executable(program))
}

/// Whether `program` is a file that somebody may execute.
pub fn is_executable(program: &Path) -> bool {
    std::fs::metadata(program).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_executed_is_a_program() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        for folder in [&one, &two] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("tool"), "#!/bin/sh\n").unwrap();
        }
        std::fs::create_dir(one.join("folder")).unwrap();
        let path = std::env::join_paths([&one, &two]).unwrap();
        assert_eq!(find_in(&path, "tool"), None);
        let set = |folder: &Path| {
            std::fs::set_permissions(folder.join("tool"), PermissionsExt::from_mode(0o755)).unwrap();
        };
        set(&two);
        assert_eq!(find_in(&path, "tool"), Some(two.join("tool")));
        set(&one);
        assert_eq!(find_in(&path, "tool"), Some(one.join("tool")));
        assert_eq!(find_in(&path, "folder"), None);
    }
}
