//! What the host and the agent in a guest say to each other, and how the bytes get across.
//!
//! ```text
//!   client::AgentClient                       the agent's implementation of v1::agent_server::Agent
//!        │ gRPC (v1, made from proto/agent.proto)                            │
//!        ▼                                                                   ▼
//!   tonic channel over one stream                                      serve::serve
//!        │ HTTP/2                                                            │
//!        ▼                                                                   ▼
//!   link::HostLink ── frames over virtio-serial, which knows no connections ── link::GuestLink
//!        (vsock has connections, and carries HTTP/2 without the link)
//! ```
//!
//! Not here: what the agent does with a request (crate `agent`), and who decides what to ask (crate `engine`).
//! Whatever comes from a guest is hostile until shown otherwise: every size is bounded in [`limits`].

pub mod byte_stream;
pub mod client;
pub mod limits;
pub mod link;
pub mod serve;

/// The messages and services of `proto/agent.proto`.
#[expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "made by prost and tonic; the contract is documented in proto/agent.proto"
)]
pub mod v1 {
    tonic::include_proto!("offshoot.agent.v1");
}
