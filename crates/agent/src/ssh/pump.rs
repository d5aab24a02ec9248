//! Bytes between a channel and a socket of the guest, until both sides have sent their last.

use std::pin::pin;
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt;
use futures::future::FusedFuture;
use russh::ChannelWriteHalf;
use russh::server::Msg;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::inbox::Inbox;

/// A packet's worth.
const PIECE: usize = 32 << 10;

/// How long a socket may take what was sent before the channel was closed.
const DRAIN: Duration = Duration::from_secs(10);

/// Carries until both directions have ended or the channel is closed.
pub(super) async fn pump<S>(socket: S, inbox: &Inbox, out: &ChannelWriteHalf<Msg>)
where
    S: AsyncRead + AsyncWrite,
{
    let (mut from_socket, mut to_socket) = tokio::io::split(socket);
    let inwards = async {
        let mut takes = true;
        while let Some(data) = inbox.next().await {
            // What a socket does not take any more is dropped, so that it does not pile up.
            takes = takes && to_socket.write_all(&data).await.is_ok();
        }
        // A socket that is gone needs no end.
        let _ = to_socket.shutdown().await;
    };
    let outwards = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE);
            match from_socket.read_buf(&mut buffer).await {
                Ok(1..) if out.data_bytes(buffer.split().freeze()).await.is_ok() => {}
                _ => break,
            }
        }
        // A client that is gone needs no end.
        let _ = out.eof().await;
    };
    let closed = inbox.closed();
    let mut inwards = pin!(inwards.fuse());
    tokio::select! {
        _ = futures::future::join(&mut inwards, outwards) => {}
        () = closed.cancelled() => {}
    }
    if !inwards.is_terminated() {
        // A socket that takes nothing any more loses the rest.
        let _ = tokio::time::timeout(DRAIN, inwards).await;
    }
    let _ = out.close().await;
}
