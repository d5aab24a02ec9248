//! TAP devices: the host's ends of guests' network devices.
//!
//! One that a VM has is not persistent: it lives as long as somebody has its file open, which is the VMM once it is
//! launched. One that is idle is persistent, on a bridge and switched off; whoever takes it ends that first.

use std::os::fd::{AsFd as _, OwnedFd};

use rtnetlink::LinkUnspec;
use rustix::io::Errno;

use super::{Link, LinkError, Links, RequestError};

/// A TAP that we hold.
#[derive(Debug)]
pub struct Tap {
    /// The interface.
    pub name: String,
    /// Its `/dev/net/tun` file, with headers of virtio-net (`IFF_VNET_HDR`) in front of each packet.
    pub file: OwnedFd,
}

impl Links {
    /// Whether TAPs can be made here.
    pub fn probe_tun(&self) -> Result<(), LinkError> {
        let opened = self.namespace.run(offshoot_sys::tap::probe);
        opened
            .and_then(|opened| opened)
            .map_err(|source| LinkError::Request {
                doing: "open /dev/net/tun".into(),
                source: RequestError::Refused(source),
            })
    }

    /// Makes a TAP that is switched off and on no bridge. Fails when the name is taken.
    pub fn create_tap(&self, name: &str) -> Result<Tap, LinkError> {
        let made = self.namespace.run(|| offshoot_sys::tap::create(name));
        let file = made
            .and_then(|made| made)
            .map_err(|source| failed(name, source))?;
        Ok(Tap {
            name: name.to_owned(),
            file,
        })
    }

    /// Makes a TAP that is switched off and on a bridge. It is not idle before [`keep_tap`](Self::keep_tap).
    pub async fn create_tap_on(&self, name: &str, bridge: &Link) -> Result<Tap, LinkError> {
        let tap = self.create_tap(name)?;
        let link = self.there(name).await?;
        let change = LinkUnspec::new_with_index(link.index)
            .mtu(bridge.mtu)
            .controller(bridge.index)
            .build();
        self.change(change, &format!("put {name} onto {}", bridge.name))
            .await?;
        Ok(tap)
    }

    /// Lets a TAP go, which stays: from now on it is idle, and outlives this process.
    pub fn keep_tap(tap: Tap) -> Result<(), LinkError> {
        let Tap { name, file } = tap;
        offshoot_sys::tap::set_persistent(file.as_fd(), true).map_err(|source| failed(&name, source))
    }

    /// Takes an idle TAP: from now on it ends with its file. `None` when somebody else has it.
    pub fn take_tap(&self, name: &str) -> Result<Option<Tap>, LinkError> {
        let opened = self.namespace.run(|| {
            let file = offshoot_sys::tap::open(name)?;
            offshoot_sys::tap::set_persistent(file.as_fd(), false)?;
            Ok(file)
        });
        match opened.and_then(|opened: std::io::Result<_>| opened) {
            Ok(file) => Ok(Some(Tap {
                name: name.to_owned(),
                file,
            })),
            Err(source) if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => Ok(None),
            Err(source) => Err(failed(name, source)),
        }
    }

    /// Gives a TAP that was taken another name, puts it onto a bridge and switches it on, in one request.
    pub async fn rename_tap(&self, tap: Tap, name: &str, bridge: &Link) -> Result<Tap, LinkError> {
        let link = self.there(&tap.name).await?;
        let change = LinkUnspec::new_with_index(link.index)
            .name(name)
            .mtu(bridge.mtu)
            .controller(bridge.index)
            .up()
            .build();
        self.change(change, &format!("rename {} to {name}", tap.name))
            .await?;
        Ok(Tap {
            name: name.to_owned(),
            file: tap.file,
        })
    }

    async fn there(&self, name: &str) -> Result<Link, LinkError> {
        self.find(name).await?.ok_or_else(|| LinkError::Gone {
            name: name.to_owned(),
        })
    }
}

fn failed(name: &str, source: std::io::Error) -> LinkError {
    LinkError::Tap {
        name: name.to_owned(),
        source,
    }
}
