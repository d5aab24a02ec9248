//! How large things may be, with the reason for each.

/// The most bytes of output, input or tar in one message. Large enough that framing costs nothing, small enough that
/// one session cannot keep the others waiting.
pub const MAX_CHUNK: usize = 63 << 10;

/// The most bytes of one message from a guest: a chunk and what surrounds it. The host refuses more, so a hostile
/// guest cannot make it allocate.
pub const MAX_REPLY: usize = 64 << 10;

/// The most bytes of one message to a guest: the argument list and the environment of a process travel in one
/// message, and Linux itself takes no single string above 128 KiB.
pub const MAX_REQUEST: usize = 1 << 20;

/// What one stream may have under way without the receiver having read it. Bounds what a reader that sleeps costs.
pub const STREAM_WINDOW: u32 = 512 << 10;

/// What one connection may have under way. Much more than a stream's, so that sessions nobody reads don't hold up
/// the others; the host opens the streams, so it also decides how much of this can be used.
pub const CONNECTION_WINDOW: u32 = 64 << 20;

/// The largest HTTP/2 frame: one message fits into one frame.
pub const MAX_HTTP_FRAME: u32 = 128 << 10;

/// Header lists from a guest are a few hundred bytes; a status message adds at most a path.
pub const MAX_HEADER_LIST: u32 = 16 << 10;

/// The most calls open at once on one connection.
pub const MAX_STREAMS: u32 = 1024;

/// The most characters kept of a message that a guest sends to explain a failure.
pub const MAX_MESSAGE_CHARS: usize = 1024;

/// The most timed steps kept of a guest's answer to `Configure`.
pub const MAX_STAGES: usize = 256;

/// The vsock port on which an agent without a virtio-serial port listens.
pub const VSOCK_PORT: u32 = 1024;

/// The name of the agent's virtio-serial port, as in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "offshoot.agent";
