//! Idle TAPs that wait for VMs, so that a start finds one made.
//!
//! ```text
//! keeper:  make, put onto the bridge ─► keep (persistent, closed) ─► ready ─┐
//! start:   take (ends with its file) ─► rename to the VM's, switch on ◄─────┘     none ready: make one as ever
//! ```
//!
//! A bridge that is there has a pool; the first VM of a network makes the bridge, and while there are pools it stays. An idle
//! TAP is switched off and belongs to our user: nothing passes it, and nobody else opens it. The kernel has them, not this
//! process: the next daemon finds those that are there, whatever became of this one.
//!
//! Not here: which names idle TAPs have, and which are missing or too many ([`offshoot_net::tap_pool`]).

use std::collections::BTreeMap;
use std::sync::{Mutex as StdMutex, MutexGuard as StdMutexGuard, PoisonError};
use std::time::Duration;

use offshoot_net::links::{BridgePlan, Link, LinkError, Links, Tap};
use offshoot_net::tap_pool;
use tokio::sync::{Mutex, MutexGuard, Notify};

use crate::fail_point::{self, When};
use crate::measure;
use crate::networks::{Networks, bridge_plan};
use crate::owner::chain;

/// What fail points of the pool belong to.
const OPERATION: &str = "tap-pool";
/// Pools are filled when nobody asked for a TAP for so long: a start never waits for the making of one that it will not get.
const QUIET: Duration = Duration::from_millis(100);
/// Where somebody asks all the time, they are filled after so long all the same.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked whether somebody else took TAPs away.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// The pools of all bridges of one daemon, and the lock under which bridges are looked at and changed.
pub struct TapPool {
    links: Links,
    /// How many each bridge shall have.
    size: usize,
    bridges: Mutex<()>,
    state: StdMutex<State>,
    /// Somebody asked for a TAP.
    asked: Notify,
}

#[derive(Default)]
struct State {
    /// The idle TAPs of each bridge that is there.
    ready: BTreeMap<String, Vec<String>>,
    /// There are no pools any more: the daemon is about to end.
    drained: bool,
    /// Why a pool could not be filled, the last time.
    failure: Option<String>,
}

/// The right to look at bridges and to change them.
pub(crate) struct Bridges<'a> {
    _guard: MutexGuard<'a, ()>,
}

/// What there is of the pools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapPoolFacts {
    /// How many each bridge shall have; 0 where there are no pools.
    pub size: usize,
    /// How many are ready, of all bridges together.
    pub ready: usize,
    /// How many there should be, of all bridges together.
    pub wanted: usize,
    /// Why they could not be made, the last time.
    pub failure: Option<String>,
}

impl TapPool {
    /// Pools of so many TAPs, none of which is looked for yet.
    pub(crate) fn new(links: Links, size: usize) -> Self {
        Self {
            links,
            size: size.min(tap_pool::MOST),
            bridges: Mutex::default(),
            state: StdMutex::default(),
            asked: Notify::new(),
        }
    }

    /// Waits until nobody else looks at bridges.
    pub(crate) async fn bridges(&self) -> Bridges<'_> {
        Bridges {
            _guard: self.bridges.lock().await,
        }
    }

    /// Whether a bridge stays when no VM is on it: its pool is there for the next one.
    pub(crate) fn keeps_bridges(&self) -> bool {
        self.size > 0 && !self.state().drained
    }

    /// What there is.
    pub fn facts(&self) -> TapPoolFacts {
        let size = if self.keeps_bridges() { self.size } else { 0 };
        let state = self.state();
        TapPoolFacts {
            size,
            ready: state.ready.values().map(Vec::len).sum(),
            wanted: size * state.ready.len(),
            failure: state.failure.clone(),
        }
    }

    /// A TAP for a VM, of this name, switched on, on a bridge that is there; it ends with its file.
    pub(crate) async fn tap(
        &self,
        _bridges: &Bridges<'_>,
        bridge: &Link,
        name: &str,
    ) -> Result<Tap, LinkError> {
        if self.keeps_bridges() {
            let taken = self.take(bridge, name).await;
            // A bridge that was not there has a pool from now on.
            self.state().ready.entry(bridge.name.clone()).or_default();
            measure::tap_claim(taken.is_some());
            self.asked.notify_one();
            if let Some(tap) = taken {
                return Ok(tap);
            }
        }
        let tap = self.links.create_tap(name)?;
        self.links.attach(name, bridge).await?;
        Ok(tap)
    }

    /// The first idle TAP that can be had.
    async fn take(&self, bridge: &Link, name: &str) -> Option<Tap> {
        loop {
            let idle = self.state().ready.get_mut(&bridge.name)?.pop()?;
            match self.take_one(&idle, bridge, name).await {
                Ok(Some(tap)) => return Some(tap),
                // It is looked at again with the next look, and goes.
                Ok(None) => tracing::warn!(tap = idle, "somebody else has an idle TAP open"),
                Err(error) => {
                    tracing::warn!(tap = idle, causes = ?chain(&error), "an idle TAP cannot be taken");
                }
            }
        }
    }

    async fn take_one(&self, idle: &str, bridge: &Link, name: &str) -> Result<Option<Tap>, LinkError> {
        fail_point::pass(OPERATION, "take", When::Before);
        let Some(tap) = self.links.take_tap(idle)? else {
            return Ok(None);
        };
        fail_point::pass(OPERATION, "take", When::After);
        let tap = self.links.rename_tap(tap, name, bridge).await?;
        fail_point::pass(OPERATION, "rename", When::After);
        Ok(Some(tap))
    }

    /// Removes the pool of a bridge, and the bridge unless a VM is on it.
    pub(crate) async fn clear(&self, plan: &BridgePlan) -> Result<(), LinkError> {
        let _bridges = self.bridges().await;
        self.state().ready.remove(&plan.name);
        let links = self.links.list().await?;
        for idle in tap_pool::plan(&links, &plan.name, 0).remove {
            self.remove(&idle).await?;
        }
        self.links.remove_idle_bridge(plan).await?;
        Ok(())
    }

    async fn remove(&self, idle: &Link) -> Result<(), LinkError> {
        fail_point::pass(OPERATION, "remove", When::Before);
        self.links.remove(idle).await?;
        fail_point::pass(OPERATION, "remove", When::After);
        Ok(())
    }

    /// Removes what is idle, for good: every pool, and bridges without VMs. Whatever cannot be removed does not keep the
    /// rest; the first error is told.
    pub(crate) async fn drain(&self, plans: Vec<BridgePlan>) -> Result<(), LinkError> {
        self.state().drained = true;
        let mut result = Ok(());
        for plan in plans {
            let cleared = self.clear(&plan).await;
            result = result.and(cleared);
        }
        result
    }

    /// Brings the pool of a bridge to its size, where the bridge is there. Starts come between any two of its steps.
    async fn fill(&self, plan: &BridgePlan) -> Result<(), LinkError> {
        if !self.keeps_bridges() {
            return self.clear(plan).await;
        }
        let found = {
            let _bridges = self.bridges().await;
            let links = self.links.list().await?;
            let mut found = tap_pool::plan(&links, &plan.name, self.size);
            let ready = std::mem::take(&mut found.ready);
            if links.iter().any(|link| plan.is(link)) {
                self.state().ready.insert(plan.name.clone(), ready);
            } else {
                self.state().ready.remove(&plan.name);
            }
            found
        };
        // Nobody takes them any more, and the kernel needs 20 ms for each.
        for odd in found.remove {
            tracing::debug!(tap = odd.name, "an idle TAP goes");
            self.remove(&odd).await?;
        }
        for name in found.missing {
            let _bridges = self.bridges().await;
            // The bridge may be gone by now, and so may the pools.
            let Some(bridge) = self.links.find_bridge(plan).await? else {
                return Ok(());
            };
            if !self.keeps_bridges() {
                return Ok(());
            }
            fail_point::pass(OPERATION, "make", When::Before);
            let tap = self.links.create_tap_on(&name, &bridge).await?;
            fail_point::pass(OPERATION, "make", When::After);
            Links::keep_tap(tap)?;
            fail_point::pass(OPERATION, "keep", When::After);
            self.state()
                .ready
                .entry(plan.name.clone())
                .or_default()
                .push(name);
        }
        Ok(())
    }

    /// Fills every pool.
    async fn fill_all(&self, networks: &Networks) {
        let mut failure = None;
        for network in networks.list() {
            if let Err(error) = self.fill(&bridge_plan(&network)).await {
                let causes = chain(&error);
                tracing::warn!(network = %network.name, ?causes, "cannot fill a pool of TAPs");
                failure = Some(causes.join(": "));
            }
        }
        self.state().failure = failure;
    }

    /// Waits until somebody asked for a TAP and nobody does any more, or a look is due.
    async fn wait(&self) {
        if tokio::time::timeout(LOOK_EVERY, self.asked.notified())
            .await
            .is_err()
        {
            return;
        }
        let quiet = async { while tokio::time::timeout(QUIET, self.asked.notified()).await.is_ok() {} };
        let _ = tokio::time::timeout(PATIENCE, quiet).await;
    }

    fn state(&self) -> StdMutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the pools of all networks filled. Never ends.
pub(crate) async fn keep(networks: Networks) {
    let taps = networks.taps();
    loop {
        taps.fill_all(&networks).await;
        taps.wait().await;
    }
}
