//! One blob, from the registry into the store: resumed, limited, checked.
//!
//! ```text
//! registry ──chunks──► async task ──bounded channel──► blocking thread: hash, write
//!                          └─ broken off? wait, ask again from where it stopped
//! ```

use std::io::{self, Write};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use oci_client::client::BlobResponse;
use offshoot_model::{Progress, ProgressUnit, TaskId};
use offshoot_store::blobs::{BlobDownload, BlobError, BlobStore};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::client::Client;
use super::error::PullError;
use crate::manifest::Blob;

/// How often one blob is asked for before its pull is given up.
const ATTEMPTS: u32 = 5;
/// The pause after the first broken attempt; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// How often it is looked whether another pull of the same blob is through.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
/// Chunks, of 8 to 16 KiB mostly, that wait for the disk.
const CHUNKS_WAITING: usize = 64;
/// How often progress is told.
const PROGRESS_STEP: u64 = 1 << 20;

/// Makes sure that the store has the blob. Dropping the future keeps what has come so far.
pub(super) async fn ensure(
    client: &Client,
    store: &BlobStore,
    blob: Blob,
    label: &str,
    progress: &Progress,
) -> Result<(), PullError> {
    let Some(mut download) = begin(store, blob).await? else {
        return Ok(());
    };
    let mut resumed = download.written() > 0;
    let task = progress.start(label, ProgressUnit::Bytes, Some(blob.size));
    progress.moved(task, download.written().min(blob.size));
    let mut attempt = 1;
    loop {
        if download.written() > blob.size {
            download.restart()?;
        }
        while download.written() < blob.size || blob.size == 0 {
            let result;
            (download, result) = receive(client, download, blob, task, progress).await;
            match result {
                Ok(()) => break,
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                    tracing::debug!(digest = %blob.digest, %error, attempt, "asking again for a blob");
                    tokio::time::sleep(FIRST_PAUSE * 2_u32.pow(attempt - 1)).await;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
        match blocking(move || download.commit()).await {
            Ok(_) => break,
            // The part from an earlier pull may be the bad one: once more, all of it.
            Err(BlobError::Mismatch { .. }) if resumed => match begin(store, blob).await? {
                Some(again) => (download, resumed) = (again, false),
                None => break,
            },
            Err(BlobError::Mismatch { expected, actual }) => {
                return Err(PullError::Digest { expected, actual });
            }
            Err(error) => return Err(error.into()),
        }
    }
    progress.moved(task, blob.size);
    progress.finish(task);
    Ok(())
}

fn is_stored(store: &BlobStore, blob: Blob) -> bool {
    store.size(&blob.digest).is_ok_and(|size| size == blob.size)
}

/// Takes hold of the blob's download, after any other pull of it; `None` once the store has it.
async fn begin(store: &BlobStore, blob: Blob) -> Result<Option<BlobDownload>, PullError> {
    loop {
        if is_stored(store, blob) {
            return Ok(None);
        }
        let thread_store = store.clone();
        match blocking(move || thread_store.download(&blob.digest)).await? {
            Some(download) if is_stored(store, blob) => {
                download.discard()?;
                return Ok(None);
            }
            Some(download) => return Ok(Some(download)),
            None => tokio::time::sleep(BUSY_PAUSE).await,
        }
    }
}

/// One request: goes on where `download` stands, and gives it back with what became of it.
async fn receive(
    client: &Client,
    mut download: BlobDownload,
    blob: Blob,
    task: TaskId,
    progress: &Progress,
) -> (BlobDownload, Result<(), PullError>) {
    let mut written = download.written();
    let mut stream = match client.blob(blob.digest, written).await {
        Ok(BlobResponse::Partial(stream)) => stream,
        Ok(BlobResponse::Full(stream)) => {
            if let Err(error) = download.restart() {
                return (download, Err(error.into()));
            }
            written = 0;
            stream
        }
        Err(error) => return (download, Err(error)),
    };
    let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
    let writer = spawn_blocking(move || write_all(download, receiver));
    let mut told = written;
    let mut broken = None;
    let mut too_long = false;
    while let Some(chunk) = stream.next().await {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                broken = Some(error);
                break;
            }
        };
        written += chunk.len() as u64;
        too_long = written > blob.size;
        // A writer that is gone has an error to tell.
        if too_long || sender.send(chunk).await.is_err() {
            break;
        }
        if written - told >= PROGRESS_STEP {
            told = written;
            progress.moved(task, told);
        }
    }
    drop(sender);
    let (download, result) = writer
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
    let Blob {
        digest,
        size: expected,
    } = blob;
    let actual = download.written();
    let result = match result {
        Err(error) => Err(error.into()),
        Ok(()) if too_long => Err(PullError::TooLong { digest, expected }),
        Ok(()) if actual < expected => Err(PullError::Truncated {
            digest,
            expected,
            actual,
            source: broken,
        }),
        Ok(()) => Ok(()),
    };
    (download, result)
}

fn write_all(
    mut download: BlobDownload,
    mut chunks: mpsc::Receiver<Bytes>,
) -> (BlobDownload, Result<(), BlobError>) {
    while let Some(chunk) = chunks.blocking_recv() {
        if let Err(source) = download.write_all(&chunk) {
            let error = write_error(&download, source);
            return (download, Err(error));
        }
    }
    (download, Ok(()))
}

fn write_error(download: &BlobDownload, source: io::Error) -> BlobError {
    BlobError::Io {
        action: "write",
        path: download.path().to_owned(),
        source,
    }
}

/// Runs file work where it may block. It is never cancelled, so a panic is the only way for it to be lost.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
