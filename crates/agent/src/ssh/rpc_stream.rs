//! A connection that comes over the agent's channel, as the stream of bytes that it is.

use std::io;

use futures::StreamExt as _;
use offshoot_agent_proto::byte_stream::ByteStream;
use offshoot_agent_proto::v1;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

/// Both directions of one `Ssh` call.
pub(crate) type RpcStream = ByteStream<Result<v1::SshBytes, Status>>;

/// A stream that goes on where the messages are.
pub(crate) fn rpc_stream(
    from_host: Streaming<v1::SshRequest>,
    to_host: mpsc::Sender<Result<v1::SshBytes, Status>>,
) -> RpcStream {
    let received = from_host.map(|message| match message {
        Ok(v1::SshRequest {
            what: Some(v1::ssh_request::What::Data(data)),
        }) => Ok(data),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(_) => Err(io::ErrorKind::ConnectionAborted.into()),
    });
    ByteStream::new(received, to_host, |data| Ok(v1::SshBytes { data }))
}
