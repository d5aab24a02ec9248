//! Files into a guest and out of it, as tar streams.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use offshoot_model::{ErrorKind, Explain};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::error::{CallError, printable};
use super::{AgentClient, in_time, v1};
use crate::limits::MAX_CHUNK;

/// How many chunks of tar wait for the connection.
const COPY_QUEUE: usize = 4;

/// Why nothing, or only a part, was copied into a guest.
#[derive(Debug, thiserror::Error)]
pub enum CopyInError {
    /// The tar stream of this side failed; the guest was told to stop.
    #[error("cannot read what to copy into the VM")]
    Source {
        /// What reading said.
        #[source]
        source: io::Error,
    },
    /// The agent refused or is gone.
    #[error("cannot copy into the VM")]
    Call {
        /// Why.
        #[source]
        source: CallError,
    },
}

impl Explain for CopyInError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Source { .. } => ErrorKind::InvalidRequest,
            Self::Call { source } => source.kind(),
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Source { .. } => Vec::new(),
            Self::Call { source } => source.hints(),
        }
    }
}

/// A path of a guest on its way out.
pub struct CopiedOut {
    /// What the path is.
    pub stat: v1::PathStat,
    /// The tar.
    pub tar: CopyOutStream,
}

/// The bytes of a tar stream from a guest, in order. The end of the stream is the end of the tar.
pub struct CopyOutStream {
    stream: Streaming<v1::CopyOutReply>,
    over: bool,
}

impl CopyOutStream {
    /// The next bytes; nothing at the end. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<Bytes, CallError>> {
        std::future::poll_fn(|cx| futures::Stream::poll_next(Pin::new(self), cx)).await
    }
}

impl futures::Stream for CopyOutStream {
    type Item = Result<Bytes, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        let item = match ready!(Pin::new(&mut self.stream).poll_next(cx)) {
            None => None,
            Some(Ok(v1::CopyOutReply {
                what: Some(v1::copy_out_reply::What::Tar(bytes)),
            })) => Some(Ok(bytes)),
            Some(Ok(_)) => Some(Err(CallError::BadReply {
                call: "copy_out",
                what: "something that is no tar",
            })),
            Some(Err(status)) => Some(Err(CallError::of("copy_out", &status))),
        };
        self.over = !matches!(item, Some(Ok(_)));
        Poll::Ready(item)
    }
}

impl AgentClient {
    /// Unpacks a tar stream below an existing folder of the guest; returns how many entries it had.
    ///
    /// # Errors
    /// When `directory` is no folder of the guest, the tar is broken or cannot be read, or the agent is gone. What was
    /// unpacked before stays.
    pub async fn copy_in<R>(&self, directory: &str, tar: R) -> Result<u64, CopyInError>
    where
        R: AsyncRead + Send + Unpin,
    {
        // The answer comes when everything is unpacked, whenever that is: whether anybody listens is asked before.
        self.hello()
            .await
            .map_err(|source| CopyInError::Call { source })?;
        let (sender, receiver) = mpsc::channel(COPY_QUEUE);
        let mut stub = self.stub.clone();
        let call = stub.copy_in(ReceiverStream::new(receiver));
        let feed = feed(directory, tar, sender);
        tokio::pin!(call, feed);
        let reply = tokio::select! {
            // Dropping the call tells the guest that the tar is not whole.
            fed = &mut feed => match fed {
                Err(source) => return Err(CopyInError::Source { source }),
                Ok(()) => call.await,
            },
            // An answer before the end is a refusal.
            reply = &mut call => reply,
        };
        let reply = reply.map_err(|status| CopyInError::Call {
            source: CallError::of("copy_in", &status),
        })?;
        Ok(reply.into_inner().files)
    }

    /// Packs a path of the guest.
    ///
    /// # Errors
    /// `Refused` with kind `NotFound` when the guest has no such path.
    pub async fn copy_out(&self, path: &str) -> Result<CopiedOut, CallError> {
        const CALL: &str = "copy_out";
        let path = path.to_owned();
        let mut stub = self.stub.clone();
        let first = async {
            let mut stream = stub.copy_out(v1::CopyOutRequest { path }).await?.into_inner();
            let first = stream.message().await?;
            Ok((stream, first))
        };
        let (stream, first) = in_time(CALL, first).await?;
        match first {
            Some(v1::CopyOutReply {
                what: Some(v1::copy_out_reply::What::Stat(mut stat)),
            }) => {
                stat.name = printable(&stat.name);
                stat.link_target = printable(&stat.link_target);
                Ok(CopiedOut {
                    stat,
                    tar: CopyOutStream { stream, over: false },
                })
            }
            _ => Err(CallError::BadReply {
                call: CALL,
                what: "no description of the path",
            }),
        }
    }
}

/// Sends the request's messages; a receiver that is gone is the call's to explain.
async fn feed<R>(directory: &str, mut tar: R, sender: mpsc::Sender<v1::CopyInRequest>) -> io::Result<()>
where
    R: AsyncRead + Send + Unpin,
{
    let mut what = v1::copy_in_request::What::Directory(directory.to_owned());
    let mut buffer = BytesMut::new();
    loop {
        if sender.send(v1::CopyInRequest { what: Some(what) }).await.is_err() {
            return Ok(());
        }
        buffer.reserve(MAX_CHUNK);
        while buffer.len() < MAX_CHUNK {
            if (&mut tar)
                .take((MAX_CHUNK - buffer.len()) as u64)
                .read_buf(&mut buffer)
                .await?
                == 0
            {
                break;
            }
        }
        if buffer.is_empty() {
            return Ok(());
        }
        what = v1::copy_in_request::What::Tar(buffer.split().freeze());
    }
}
