//! TAP devices: the host's ends of guests' network devices.
//!
//! None is persistent: a TAP lives as long as somebody has its file open, which is the VMM once it is launched.

use std::os::fd::OwnedFd;

use super::{LinkError, Links, RequestError};

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
        let file = made.and_then(|made| made).map_err(|source| LinkError::Tap {
            name: name.to_owned(),
            source,
        })?;
        Ok(Tap {
            name: name.to_owned(),
            file,
        })
    }
}
