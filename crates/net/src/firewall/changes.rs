//! Wakes up when routes or switches of the host change, by rtnetlink(7).

use std::io;
use std::time::Duration;

use futures::StreamExt as _;
use futures::channel::mpsc::UnboundedReceiver;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::SocketAddr;
use tokio::task::JoinHandle;

use crate::Namespace;

/// A new uplink comes with several changes. They are taken for one when they follow each other so closely.
const SETTLE: Duration = Duration::from_millis(100);
/// Something that changes all the time does not put it off for longer.
const SETTLE_AT_MOST: Duration = Duration::from_secs(2);

/// Changes of one namespace, as they come.
#[derive(Debug)]
pub struct Changes {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl Changes {
    /// Begins to listen. Called within a Tokio runtime.
    pub fn listen(namespace: &Namespace) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let opened = namespace.run(|| {
            let _entered = runtime.enter();
            rtnetlink::new_multicast_connection(&[
                MulticastGroup::Ipv4Route,
                MulticastGroup::Ipv6Route,
                MulticastGroup::Ipv4Netconf,
                MulticastGroup::Ipv6Netconf,
            ])
        });
        let (connection, _handle, messages) = opened??;
        Ok(Self {
            messages,
            task: tokio::spawn(connection),
        })
    }

    /// Waits until something changed and came to rest. False when nothing will be heard any more.
    pub async fn next(&mut self) -> bool {
        if self.messages.next().await.is_none() {
            return false;
        }
        let latest = tokio::time::Instant::now() + SETTLE_AT_MOST;
        while tokio::time::Instant::now() < latest {
            match tokio::time::timeout(SETTLE, self.messages.next()).await {
                Ok(Some(_)) => {}
                // It is at rest, or over: the next call says so.
                Ok(None) | Err(_) => break,
            }
        }
        true
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.task.abort();
    }
}
