//! QEMU's command line, read as far as the fake needs it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use offshoot_vmm::qemu::read_opts;

/// What the fake takes from its arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// The listening QMP socket.
    pub qmp: RawFd,
    /// The listening agent socket.
    pub agent: Option<RawFd>,
    /// The kernel, which must exist.
    pub kernel: PathBuf,
    /// Disks: node name and file.
    pub disks: HashMap<String, PathBuf>,
}

/// Why a command line is not one that the driver makes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentsError {
    /// Something that must be there is not.
    #[error("there is no {what}")]
    Missing {
        /// What.
        what: &'static str,
    },
}

impl Arguments {
    /// Reads arguments, without the program's name.
    pub fn read(args: &[OsString]) -> Result<Self, ArgumentsError> {
        let mut sockets = HashMap::new();
        let mut found = Self::default();
        for pair in args.windows(2) {
            let opts: HashMap<_, _> = read_opts(&pair[1])
                .into_iter()
                .map(|(key, value)| (key.unwrap_or_default(), value))
                .collect();
            let text = |key: &str| opts.get(key).and_then(|value| value.to_str());
            match pair[0].to_str() {
                Some("-chardev") => {
                    if let (Some(id), Some(Ok(fd))) = (text("id"), text("fd").map(str::parse)) {
                        sockets.insert(id.to_owned(), fd);
                    }
                }
                Some("-blockdev") => {
                    if let (Some(node), Some(file)) = (text("node-name"), opts.get("file.filename")) {
                        found.disks.insert(node.to_owned(), file.into());
                    }
                }
                Some("-kernel") => found.kernel = (&pair[1]).into(),
                _ => {}
            }
        }
        found.qmp = *sockets.get("qmp").ok_or(ArgumentsError::Missing {
            what: "chardev `qmp` with a descriptor",
        })?;
        found.agent = sockets.get("agent").copied();
        if found.kernel.as_os_str().is_empty() {
            return Err(ArgumentsError::Missing { what: "kernel" });
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fake_finds_its_sockets() {
        let args: Vec<OsString> = [
            "-nodefaults",
            "-chardev",
            "socket,id=qmp,fd=10,server=on",
            "-chardev",
            "socket,id=agent,fd=11",
            "-blockdev",
            "driver=raw,node-name=disk-a,file.filename=/a,,b",
            "-kernel",
            "/k",
        ]
        .map(Into::into)
        .into();
        let found = Arguments::read(&args).unwrap();
        assert_eq!(
            (found.qmp, found.agent, found.kernel),
            (10, Some(11), "/k".into())
        );
        assert_eq!(found.disks["disk-a"], PathBuf::from("/a,b"));
        assert!(Arguments::read(&args[..3]).is_err());
        assert!(Arguments::read(&args[3..]).is_err());
    }
}
