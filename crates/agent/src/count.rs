//! How many sessions are open, for whoever wants to know at once.

use std::sync::Arc;

use offshoot_agent_proto::v1;
use tokio::sync::watch;

/// The number of open sessions.
#[derive(Debug)]
pub(crate) struct Count(watch::Sender<v1::SessionsReply>);

/// What kind of session.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// An SSH connection that was authenticated.
    Ssh,
    /// A process that the host asked for, while whoever asked is there.
    Exec,
}

impl Count {
    /// None is open yet.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(watch::Sender::new(v1::SessionsReply { ssh: 0, exec: 0 })))
    }

    /// Counts one more until the answer is dropped.
    pub(crate) fn open(self: &Arc<Self>, kind: Kind) -> Open {
        self.change(kind, |number| number.saturating_add(1));
        Open {
            count: Arc::clone(self),
            kind,
        }
    }

    /// The numbers now, and news of each change.
    pub(crate) fn watch(&self) -> watch::Receiver<v1::SessionsReply> {
        self.0.subscribe()
    }

    fn change(&self, kind: Kind, change: fn(u32) -> u32) {
        self.0.send_modify(|numbers| match kind {
            Kind::Ssh => numbers.ssh = change(numbers.ssh),
            Kind::Exec => numbers.exec = change(numbers.exec),
        });
    }
}

/// One open session.
#[derive(Debug)]
pub(crate) struct Open {
    count: Arc<Count>,
    kind: Kind,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.count.change(self.kind, |number| number.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_change_is_told() {
        let count = Count::new();
        let mut watch = count.watch();
        let now = |watch: &mut watch::Receiver<v1::SessionsReply>| {
            let numbers = *watch.borrow_and_update();
            (numbers.ssh, numbers.exec)
        };
        assert_eq!(now(&mut watch), (0, 0));
        let ssh = count.open(Kind::Ssh);
        let exec = [count.open(Kind::Exec), count.open(Kind::Exec)];
        watch.changed().await.unwrap();
        assert_eq!(now(&mut watch), (1, 2));
        drop((ssh, exec));
        watch.changed().await.unwrap();
        assert_eq!(now(&mut watch), (0, 0));
    }
}
