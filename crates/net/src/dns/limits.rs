//! How much of something clients may hold at once: each, and all together.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places that clients take and give back.
pub(crate) struct Quota {
    each: usize,
    all: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    all: usize,
    /// Never longer than `all`: a client without a place has no entry.
    each: HashMap<IpAddr, usize>,
}

/// A place; given back when dropped.
pub(crate) struct Place {
    quota: Arc<Quota>,
    client: IpAddr,
}

impl Quota {
    /// So many for each client, and so many for all.
    pub(crate) fn new(each: usize, all: usize) -> Arc<Self> {
        Arc::new(Self {
            each,
            all,
            taken: Mutex::default(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for this client, if there is one.
    pub(crate) fn take(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let mut taken = self.taken();
        let of_client = taken.each.get(&client).copied().unwrap_or(0);
        if taken.all >= self.all || of_client >= self.each {
            return None;
        }
        taken.all += 1;
        taken.each.insert(client, of_client + 1);
        drop(taken);
        Some(Place {
            quota: Arc::clone(self),
            client,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.quota.taken();
        taken.all -= 1;
        if let Some(of_client) = taken.each.get_mut(&self.client) {
            *of_client -= 1;
            if *of_client == 0 {
                taken.each.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_run_out_and_come_back() {
        let quota = Quota::new(2, 3);
        let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap());
        let first = quota.take(a).unwrap();
        let _second = quota.take(a).unwrap();
        assert!(quota.take(a).is_none(), "a has its share");
        let _third = quota.take(b).unwrap();
        assert!(quota.take(b).is_none(), "all are taken");
        drop(first);
        let again = quota.take(a).unwrap();
        drop((again, _second, _third));
        assert_eq!(quota.taken().all, 0);
        assert!(quota.taken().each.is_empty());
    }
}
