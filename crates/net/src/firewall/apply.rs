//! The one owner of our tables and switches: what is there is what was last applied.

use std::io;
use std::sync::Arc;

use offshoot_model::{ErrorKind, Explain, Network};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::forwarding::{self, Forwarding, Host, SwitchError};
use super::nft::{self, NftError};
use super::ruleset::Ruleset;
use super::state::{FirewallState, Guarded, TableName};
use super::{Facts, foreign, plan};
use crate::Namespace;

/// Why the firewall is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// The namespace.
    #[error("cannot enter the network namespace")]
    Namespace(#[source] io::Error),
    /// The rules.
    #[error("cannot change the rules of the table {table}")]
    Rules {
        /// Its name.
        table: TableName,
        /// Why.
        #[source]
        source: NftError,
    },
    /// The switches.
    #[error("cannot let packets of VMs pass")]
    Switch(#[from] SwitchError),
}

impl Explain for FirewallError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Namespace(_) => ErrorKind::Internal,
            Self::Rules { source, .. } => source.kind(),
            Self::Switch(_) => ErrorKind::NotPossible,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Namespace(_) => vec!["see whether it is still there with `ip netns list`".into()],
            Self::Rules { source, .. } => source.hints(),
            Self::Switch(_) => vec![
                "is /proc/sys read-only, as in a container? turn on `net.ipv4.ip_forward` there, or run offshootd on the host"
                    .into(),
            ],
        }
    }
}

/// The firewall of one daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Firewall {
    namespace: Namespace,
    table: TableName,
    live: Arc<Mutex<Live>>,
}

#[derive(Debug, Default)]
struct Live {
    state: FirewallState,
    /// What the kernel has; nothing when that is not known.
    applied: Option<Ruleset>,
    /// Which switches are ours; nothing until they were asked for.
    forwarding: Option<Forwarding>,
    /// What was found when switches were turned last.
    seen: Option<Seen>,
}

/// A look at the host and at what others need of it.
#[derive(Debug)]
struct Seen {
    host: Host,
    others: Forwarding,
}

impl Seen {
    /// The host as it is with our own switches turned.
    fn after_ours(others: Forwarding) -> Self {
        Self {
            host: forwarding::look(),
            others,
        }
    }
}

impl Firewall {
    /// One that has changed nothing yet.
    pub fn new(namespace: Namespace, table: TableName) -> Self {
        Self {
            namespace,
            table,
            live: Arc::default(),
        }
    }

    /// The name of its tables.
    pub fn table(&self) -> &TableName {
        &self.table
    }

    /// Puts VMs behind the firewall, in place of those with the same TAPs, with one transaction. Their bridges exist.
    /// Dropping the future between beginning and end changes nothing of what is done.
    pub async fn insert(&self, vms: Vec<(Network, Guarded)>) -> Result<(), FirewallError> {
        self.work(move |this, live| {
            let mut state = live.state.clone();
            for (network, vm) in vms {
                state.insert(&network, vm);
            }
            // Nothing was asked of the kernel yet, or it was not done: what is there is not known.
            if state == live.state && live.applied.is_some() {
                return Ok(());
            }
            this.bring(live, &state)?;
            live.state = state;
            Ok(())
        })
        .await
    }

    /// Takes a VM out. When it was the last one, tables and switches go.
    pub async fn remove(&self, tap: String) -> Result<(), FirewallError> {
        self.work(move |this, live| {
            if !live.state.remove(&tap) {
                return Ok(());
            }
            // It is out whatever comes: its TAP is gone. What fails now is done with the next change.
            let state = live.state.clone();
            this.bring(live, &state)
        })
        .await
    }

    /// Follows routes that moved and switches that others turned, and makes our tables anew when somebody took them away.
    /// Whether that was so.
    pub async fn refresh(&self) -> Result<bool, FirewallError> {
        self.work(|this, live| {
            if live.state.is_empty() {
                return Ok(false);
            }
            let there = this.tables().map_err(|source| this.rules_failed(source))?;
            let whole = there == 2;
            if !whole {
                live.applied = None;
            }
            let state = live.state.clone();
            this.bring(live, &state)?;
            Ok(!whole)
        })
        .await
    }

    /// Whether there are tables of ours although there is no VM.
    pub async fn is_left_over(&self) -> Result<bool, FirewallError> {
        self.work(|this, live| {
            if !live.state.is_empty() {
                return Ok(false);
            }
            let there = this.tables().map_err(|source| this.rules_failed(source))?;
            Ok(there != 0)
        })
        .await
    }

    /// Removes tables and switches when there is no VM.
    pub async fn remove_left_over(&self) -> Result<(), FirewallError> {
        self.work(|this, live| {
            if !live.state.is_empty() {
                return Ok(());
            }
            this.bring(live, &FirewallState::default())
        })
        .await
    }

    /// What this host offers, and what of others would stop VMs. Changes nothing.
    pub async fn look(&self) -> Result<Facts, FirewallError> {
        self.work(|this, _| Ok(foreign::look(&this.table))).await
    }

    /// Which VMs are behind it.
    pub async fn state(&self) -> FirewallState {
        self.live.lock().await.state.clone()
    }

    /// Does something in the namespace, one at a time in the order that it was asked for. Once begun it is done, whether
    /// or not somebody waits for it.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self, &mut Live) -> Result<T, FirewallError> + Send + 'static,
    ) -> Result<T, FirewallError> {
        let mut live: OwnedMutexGuard<Live> = Arc::clone(&self.live).lock_owned().await;
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || {
            let done = this.namespace.run(|| work(&this, &mut live));
            done.map_err(FirewallError::Namespace).and_then(|done| done)
        });
        match done.await {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    fn rules_failed(&self, source: NftError) -> FirewallError {
        FirewallError::Rules {
            table: self.table.clone(),
            source,
        }
    }

    /// How many tables of ours there are.
    fn tables(&self) -> Result<usize, NftError> {
        let listing = nft::list(&["tables"])?;
        let ours = |table: &&serde_json::Value| {
            table["name"] == self.table.as_str() && (table["family"] == "inet" || table["family"] == "bridge")
        };
        Ok(nft::objects(&listing, "table").filter(ours).count())
    }

    /// Makes the kernel have what follows from `state`: first the rules that keep others out, then the switches.
    fn bring(&self, live: &mut Live, state: &FirewallState) -> Result<(), FirewallError> {
        let known = match &live.forwarding {
            Some(known) => known.clone(),
            None => Forwarding::read(&self.table),
        };
        let host = forwarding::look();
        let others = match &live.seen {
            // No switch was turned since, so others turned none; whoever asks for a VM need not wait for another look.
            Some(seen) if seen.host == host && !state.is_empty() => seen.others.clone(),
            _ => Forwarding::of_others(&self.table),
        };
        if state.is_empty() {
            return self.leave(live, &host, &known, others);
        }
        let next = forwarding::plan(&host, &known.with(&others));
        // The table says which switches are ours: they are off before it forgets them, and on after it knows them.
        forwarding::close(&host, &known.without(&others), &next)?;
        let ruleset = plan(&self.table, state, &next);
        let changed = match &live.applied {
            Some(before) => match ruleset.change(before) {
                None => Ok(()),
                // Somebody else changed our tables: then they are made anew.
                Some(change) => nft::commit(&change).or_else(|_| nft::commit(&ruleset.replace())),
            },
            None => nft::commit(&ruleset.replace()),
        };
        live.applied = None;
        changed.map_err(|source| self.rules_failed(source))?;
        forwarding::open(&next)?;
        for network in state.networks() {
            forwarding::open_bridge(&network.bridge)?;
        }
        live.applied = Some(ruleset);
        live.forwarding = Some(next);
        live.seen = Some(Seen::after_ours(others));
        Ok(())
    }

    /// Puts everything back: first the switches, then the rules that say which are ours.
    fn leave(
        &self,
        live: &mut Live,
        host: &Host,
        known: &Forwarding,
        others: Forwarding,
    ) -> Result<(), FirewallError> {
        forwarding::close(host, &known.without(&others), &Forwarding::default())?;
        live.applied = None;
        live.forwarding = None;
        live.seen = None;
        nft::commit(&Ruleset::remove(&self.table)).map_err(|source| self.rules_failed(source))?;
        live.forwarding = Some(Forwarding::default());
        live.seen = Some(Seen::after_ours(others));
        Ok(())
    }
}
