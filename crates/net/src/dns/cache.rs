//! What upstreams said, for as long as they said that it holds.
//!
//! Kept as the bytes of messages, by weight: names that a guest makes up push out each other, and take no more than
//! [`MAX_BYTES`] whatever it asks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, OpCode};
use hickory_proto::rr::{Name, RecordType};
use moka::Expiry;
use moka::sync::Cache as Moka;

use super::question::Question;
use super::reply::Reply;

/// All that is kept together.
const MAX_BYTES: u64 = 8 << 20;
/// What an entry takes besides its bytes: its key, the cache's own account of it, and the allocator's.
const OVERHEAD_BYTES: usize = 512;
/// The longest that something is kept: an hour, or five minutes where it is that there is nothing.
const LONGEST: Duration = Duration::from_secs(3600);
const LONGEST_NOTHING: Duration = Duration::from_secs(300);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// Compared without regard to case.
    name: Name,
    kind: RecordType,
    dnssec_ok: bool,
    checking_disabled: bool,
}

impl Key {
    fn of(question: &Question) -> Self {
        Self {
            name: question.query.name().clone(),
            kind: question.query.query_type(),
            dnssec_ok: question.edns.is_some_and(|edns| edns.dnssec_ok),
            checking_disabled: question.checking_disabled,
        }
    }
}

/// A message, since when it is here, and for how long it holds.
#[derive(Clone, Debug)]
struct Kept {
    bytes: Arc<[u8]>,
    since: Instant,
    lives: Duration,
}

struct UntilItsEnd;

impl Expiry<Key, Kept> for UntilItsEnd {
    fn expire_after_create(&self, _: &Key, kept: &Kept, _: Instant) -> Option<Duration> {
        Some(kept.lives)
    }

    fn expire_after_update(&self, _: &Key, kept: &Kept, _: Instant, _: Option<Duration>) -> Option<Duration> {
        Some(kept.lives)
    }
}

/// What upstreams said.
pub(crate) struct Cache(Moka<Key, Kept>);

impl Cache {
    pub(crate) fn new() -> Self {
        let cache = Moka::builder()
            .weigher(|_: &Key, kept: &Kept| {
                u32::try_from(kept.bytes.len() + OVERHEAD_BYTES).unwrap_or(u32::MAX)
            })
            .max_capacity(MAX_BYTES)
            .expire_after(UntilItsEnd)
            .build();
        Self(cache)
    }

    /// Keeps an answer for as long as its records live, or this long where it has none.
    pub(crate) fn put(&self, question: &Question, reply: &Reply, nothing_s: Option<u32>) {
        let least = reply.answers.iter().map(|record| record.ttl).min();
        let lives = match (least, nothing_s) {
            (Some(seconds), None) => Duration::from_secs(seconds.into()).min(LONGEST),
            (None, Some(seconds)) => Duration::from_secs(seconds.into()).min(LONGEST_NOTHING),
            (Some(least), Some(nothing)) => {
                Duration::from_secs(least.min(nothing).into()).min(LONGEST_NOTHING)
            }
            (None, None) => return,
        };
        if lives.is_zero() {
            return;
        }
        let mut message = Message::response(0, OpCode::Query);
        message.metadata.response_code = reply.code;
        message.answers.clone_from(&reply.answers);
        message.authorities.clone_from(&reply.authorities);
        let Ok(bytes) = message.to_vec() else { return };
        let kept = Kept {
            bytes: bytes.into(),
            since: Instant::now(),
            lives,
        };
        self.0.insert(Key::of(question), kept);
    }

    /// What is known, with what is left of its life.
    pub(crate) fn get(&self, question: &Question) -> Option<Reply> {
        let kept = self.0.get(&Key::of(question))?;
        let mut message = Message::from_vec(&kept.bytes).ok()?;
        let elapsed = u32::try_from(kept.since.elapsed().as_secs()).unwrap_or(u32::MAX);
        let records = message.answers.iter_mut().chain(&mut message.authorities);
        for record in records {
            record.decrement_ttl(elapsed);
        }
        Some(Reply {
            code: message.response_code,
            authoritative: false,
            answers: message.answers,
            authorities: message.authorities,
        })
    }

    /// Forgets all of it.
    pub(crate) fn clear(&self) {
        self.0.invalidate_all();
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::op::ResponseCode;
    use hickory_proto::rr::{RData, Record};

    use super::*;
    use crate::dns::question::tests::asked;
    use crate::dns::question::{Judged, judge};

    fn question(name: &str) -> Question {
        match judge(&asked(name, RecordType::A).to_vec().unwrap()) {
            Judged::Question(question) => *question,
            other => panic!("{other:?}"),
        }
    }

    fn reply(ttl: Option<u32>) -> Reply {
        let record = |ttl| {
            Record::from_rdata(
                "a.example.".parse().unwrap(),
                ttl,
                RData::from(Ipv4Addr::LOCALHOST),
            )
        };
        Reply {
            code: ResponseCode::NoError,
            authoritative: false,
            answers: ttl.map(record).into_iter().collect(),
            authorities: Vec::new(),
        }
    }

    #[test]
    fn what_holds_is_known_and_nothing_else() {
        let cache = Cache::new();
        for (name, ttl, nothing, known) in [
            ("positive.example.", Some(60), None, true),
            ("at-once.example.", Some(0), None, false),
            ("negative.example.", None, Some(60), true),
            ("unlimited.example.", None, None, false),
        ] {
            cache.put(&question(name), &reply(ttl), nothing);
            assert_eq!(cache.get(&question(name)).is_some(), known, "{name}");
        }
        assert!(cache.get(&question("POSITIVE.example.")).is_some());
        assert!(cache.get(&question("other.example.")).is_none());
        cache.clear();
        assert!(cache.get(&question("positive.example.")).is_none());
    }

    #[test]
    fn names_that_are_made_up_push_out_each_other() {
        let cache = Cache::new();
        for n in 0..30_000 {
            cache.put(&question(&format!("{n}.example.")), &reply(Some(3600)), None);
        }
        cache.0.run_pending_tasks();
        assert!(cache.0.weighted_size() <= MAX_BYTES);
        assert!(cache.0.entry_count() > 1000);
    }
}
