//! Conversations over a byte stream that has no connections, such as a virtio-serial port.
//!
//! When a host program dies in mid-frame, the rest of what it said is still on its way to the guest, and the guest's
//! half of the old conversation is still on its way to the next host program. The link finds its place again:
//!
//! ```text
//!   frame    COBS( kind u8 | session u64 LE | data ≤ 32000 bytes | crc32 u32 LE )  00
//!   kinds    1 HELLO (data: version)   2 READY (data: version)   3 DATA   4 BYE
//!
//!   host                                     guest
//!    │ 00 HELLO(s) ─────────────────────────►│  drops the old conversation, whatever state it is in
//!    │ … repeated until answered             │
//!    │◄───────────────────────────── READY(s)│
//!    │ everything before READY(s) is dropped │
//!    │◄──────────── DATA(s) ────────────────►│
//!    │◄──────────── BYE(s) ─────────────────►│  the stream ends
//! ```
//!
//! COBS leaves no zero byte inside a frame, so a zero byte always ends one. Frames of another session are dropped; a
//! damaged frame inside a conversation ends it, for a byte is missing. Both ends are plain `AsyncRead + AsyncWrite`
//! without tasks or locks of their own: back-pressure is the stream's, and memory is two fixed buffers.
//!
//! Transports which have connections of their own (vsock) don't need this. Format: `docs/formats/agent-link.md`.

mod cobs;
mod frame;
mod guest;
mod host;
mod pipe;

pub use guest::GuestLink;
pub use host::{HostLink, LinkError};

/// Version of the frame format, in every HELLO and READY.
pub const LINK_VERSION: u8 = 1;
