//! What clients sent and nobody has taken yet, one inbox for each channel.
//!
//! The library gives a client more room as soon as bytes arrive, whoever takes them, and stops the whole connection when
//! somebody keeps it waiting, also the way out. So nothing here ever waits: bytes are kept, and the room is what is
//! controlled. While a channel has enough, its client gets [`TRICKLE`] bytes of room at a time instead of [`WINDOW`]; each
//! of those asks anew, so that the stream goes on when the bytes are taken.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use russh::ChannelId;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What a client may send on a channel before it hears from us.
pub(super) const WINDOW: u32 = 1 << 20;

/// The least that the library can be told to give: it asks again when half of it is used.
pub(super) const TRICKLE: u32 = 2;

/// From here on, a channel gets no more than a trickle.
const ENOUGH: usize = 256 << 10;

/// From here on, no channel of the connection gets more.
const MUCH: usize = 16 << 20;

/// Whoever has sent this much without room for it does not follow the rules.
const TOO_MUCH: usize = 32 << 20;

/// How long the connection sits after a trickle, so that it costs no processor: a little at first, longer the more there is.
const PAUSE: Duration = Duration::from_millis(2);
const LONG_PAUSE: Duration = Duration::from_millis(50);

/// Small pieces are gathered up to this size.
const GATHERED: usize = 8 << 10;

#[derive(Default)]
struct State {
    pieces: VecDeque<BytesMut>,
    bytes: usize,
    ended: bool,
}

struct Shared {
    state: Mutex<State>,
    news: Notify,
    /// The channel is closed: nothing comes, and nobody reads what goes out.
    closed: CancellationToken,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The taking end of a channel's bytes.
pub(super) struct Inbox {
    shared: Arc<Shared>,
}

impl Inbox {
    /// The next bytes; `None` when the client has sent its last, or the channel is closed and all was taken. Dropping the
    /// future loses nothing.
    pub(super) async fn next(&self) -> Option<Bytes> {
        loop {
            // Before the look, so that nothing is missed.
            let news = self.shared.news.notified();
            {
                let mut state = self.shared.state();
                if let Some(piece) = state.pieces.pop_front() {
                    state.bytes -= piece.len();
                    return Some(piece.freeze());
                }
                if state.ended || self.shared.closed.is_cancelled() {
                    return None;
                }
            }
            tokio::select! {
                () = news => {}
                () = self.shared.closed.cancelled() => {}
            }
        }
    }

    /// What ends with the channel.
    pub(super) fn closed(&self) -> CancellationToken {
        self.shared.closed.clone()
    }
}

/// All channels of one connection.
#[derive(Default)]
pub(super) struct Inboxes {
    open: Mutex<HashMap<ChannelId, Arc<Shared>>>,
}

impl Inboxes {
    fn open(&self) -> MutexGuard<'_, HashMap<ChannelId, Arc<Shared>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, channel: ChannelId) -> Option<Arc<Shared>> {
        self.open().get(&channel).cloned()
    }

    /// Opens one.
    pub(super) fn insert(&self, channel: ChannelId) {
        let shared = Shared {
            state: Mutex::default(),
            news: Notify::new(),
            closed: CancellationToken::new(),
        };
        self.open().insert(channel, Arc::new(shared));
    }

    /// The taking end of an open one.
    pub(super) fn inbox(&self, channel: ChannelId) -> Option<Inbox> {
        self.of(channel).map(|shared| Inbox { shared })
    }

    /// Keeps what the client sent. Says whether there is room for it.
    pub(super) fn put(&self, channel: ChannelId, data: &[u8]) -> bool {
        let Some(shared) = self.of(channel) else {
            return true;
        };
        let mut state = shared.state();
        state.bytes += data.len();
        match state.pieces.back_mut() {
            Some(last) if last.len() + data.len() <= GATHERED => last.extend_from_slice(data),
            _ => state.pieces.push_back(BytesMut::from(data)),
        }
        let fits = state.bytes <= TOO_MUCH;
        drop(state);
        shared.news.notify_one();
        fits
    }

    /// The client has sent its last.
    pub(super) fn end(&self, channel: ChannelId) {
        if let Some(shared) = self.of(channel) {
            shared.state().ended = true;
            shared.news.notify_one();
        }
    }

    /// The channel is closed, by either side.
    pub(super) fn close(&self, channel: ChannelId) {
        if let Some(shared) = self.open().remove(&channel) {
            shared.closed.cancel();
        }
    }

    /// The connection is over.
    pub(super) fn close_all(&self) {
        for (_, shared) in self.open().drain() {
            shared.closed.cancel();
        }
    }

    /// How much room the library should give from now on, when it has just given some to `channel`.
    pub(super) fn room(&self, channel: ChannelId) -> u32 {
        let open = self.open();
        let waiting = |shared: &Arc<Shared>| shared.state().bytes;
        let here = open.get(&channel).map_or(0, waiting);
        if here > ENOUGH || open.values().map(waiting).sum::<usize>() > MUCH {
            TRICKLE
        } else {
            WINDOW
        }
    }

    /// How long the connection should sit before it takes more of a channel that gets a trickle.
    pub(super) fn pause(&self, channel: ChannelId) -> Duration {
        let waiting = self.of(channel).map_or(0, |shared| shared.state().bytes);
        // Beyond what the room allowed, only a trickle can have brought it.
        if waiting > ENOUGH + 3 * WINDOW as usize {
            LONG_PAUSE
        } else {
            PAUSE
        }
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    /// The library alone makes channel ids; it has them as numbers.
    fn channel(inboxes: &Inboxes) -> ChannelId {
        let id: ChannelId = russh::keys::ssh_encoding::Decode::decode(&mut &7_u32.to_be_bytes()[..]).unwrap();
        inboxes.insert(id);
        id
    }

    #[tokio::test]
    async fn bytes_are_taken_in_order_and_then_the_end() {
        let inboxes = Inboxes::default();
        let id = channel(&inboxes);
        let inbox = inboxes.inbox(id).unwrap();
        let large = vec![7; GATHERED];
        for data in [&b"ab"[..], b"c", &large] {
            assert!(inboxes.put(id, data));
        }
        inboxes.end(id);
        let mut all = Vec::new();
        while let Some(piece) = inbox.next().await {
            all.extend_from_slice(&piece);
        }
        assert_eq!(all, [b"abc", &large[..]].concat());
        assert!(!inbox.closed().is_cancelled());
        inboxes.close(id);
        assert!(inbox.closed().is_cancelled());
        assert!(inbox.next().await.is_none());
    }

    #[tokio::test]
    async fn who_waits_hears_of_bytes_and_of_the_end() {
        let inboxes = Arc::new(Inboxes::default());
        let id = channel(&inboxes);
        let inbox = inboxes.inbox(id).unwrap();
        let waiting = tokio::spawn(async move { (inbox.next().await, inbox.next().await) });
        tokio::task::yield_now().await;
        inboxes.put(id, b"x");
        tokio::task::yield_now().await;
        inboxes.close_all();
        assert_eq!(waiting.await.unwrap(), (Some(Bytes::from_static(b"x")), None));
    }

    #[tokio::test]
    async fn room_shrinks_while_nobody_takes() {
        let inboxes = Inboxes::default();
        let id = channel(&inboxes);
        let inbox = inboxes.inbox(id).unwrap();
        assert_eq!(inboxes.room(id), WINDOW);
        let piece = vec![0; 64 << 10];
        for _ in 0..8 {
            assert!(inboxes.put(id, &piece));
        }
        assert_eq!(inboxes.room(id), TRICKLE);
        assert_eq!(inboxes.pause(id), PAUSE);
        for _ in 0..5 {
            inbox.next().await;
        }
        assert_eq!(inboxes.room(id), WINDOW);
        let mut fits = true;
        for _ in 0..TOO_MUCH / piece.len() {
            fits = inboxes.put(id, &piece);
        }
        assert!(!fits);
        assert_eq!(inboxes.pause(id), LONG_PAUSE);
    }
}
