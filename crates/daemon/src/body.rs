//! Bodies of requests: how much, how many at once, and how slowly.
//!
//! Every body must keep moving (a layer of [`crate::routes`] sees to that). JSON is read whole before anybody looks at it,
//! so it is also limited in size, in time, and in how much of it lies in memory for all clients together. Uploads are read
//! piece by piece by a thread of their own, so they are limited in number.

use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::http::StatusCode;
use futures::StreamExt as _;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::refusal::Refusal;

/// The largest JSON body: a VM's request with a long environment.
const MAX_JSON: usize = 2 << 20;
/// How much of a JSON body is read without asking: all of any usual one.
const SMALL_JSON: usize = 16 << 10;
/// JSON bodies above that which lie in memory at once: 32 MiB of them.
static LARGE_JSON: Semaphore = Semaphore::const_new(16);
/// How long a whole JSON body may take. It is less than a second's work for the slowest honest client.
const JSON_PATIENCE: Duration = Duration::from_secs(30);
/// Uploads at once. Each has a thread while it lasts, of 512 that the whole daemon has for waiting on disks.
static UPLOADS: Semaphore = Semaphore::const_new(64);

/// Reads a JSON body whole.
pub async fn read_json(body: Body, announced: Option<u64>) -> Result<Bytes, Refusal> {
    if announced.is_some_and(|length| length > MAX_JSON as u64) {
        return Err(too_large());
    }
    collect_within(JSON_PATIENCE, body.into_data_stream()).await
}

async fn collect_within(patience: Duration, pieces: BodyDataStream) -> Result<Bytes, Refusal> {
    let read = tokio::time::timeout(patience, collect(pieces)).await;
    read.unwrap_or_else(|_| Err(too_slow()))
}

async fn collect(mut pieces: BodyDataStream) -> Result<Bytes, Refusal> {
    let mut whole = Vec::new();
    let mut permit = None;
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| broken_off(&error))?;
        let length = whole.len() + piece.len();
        if length > MAX_JSON {
            return Err(too_large());
        }
        if length > SMALL_JSON && permit.is_none() {
            // It cannot fail: nobody closes the semaphore.
            permit = LARGE_JSON.acquire().await.ok();
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.into())
}

/// A place among the uploads.
pub struct UploadPlace(#[expect(dead_code, reason = "held for its Drop")] SemaphorePermit<'static>);

/// Takes a place among the uploads, when there is one.
pub fn upload_place() -> Result<UploadPlace, Refusal> {
    UPLOADS.try_acquire().map(UploadPlace).map_err(|_| {
        Refusal::busy(
            "too many uploads at once",
            "try again when another `offshoot image import` or `offshoot kernel add` is done",
        )
    })
}

fn too_large() -> Refusal {
    Refusal::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "the request's body is longer than 2 MiB",
        "see GET /openapi.json; long input goes into a file of the guest",
    )
}

fn too_slow() -> Refusal {
    Refusal::new(
        StatusCode::REQUEST_TIMEOUT,
        "the request's body did not come in time",
        "send the body without pauses",
    )
}

/// A body that ended before its end.
fn broken_off(error: &axum::Error) -> Refusal {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(now) = cause {
        if now.is::<tower_http::timeout::TimeoutError>() {
            return too_slow();
        }
        cause = now.source();
    }
    Refusal::new(
        StatusCode::BAD_REQUEST,
        "the request's body broke off, or is not what its head says",
        "send as many bytes as `Content-Length` says, or valid chunks",
    )
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse as _;
    use futures::stream;

    use super::*;

    fn body(pieces: Vec<Result<&'static [u8], std::io::Error>>) -> Body {
        Body::from_stream(stream::iter(pieces))
    }

    /// Tests that take all places for large bodies do not run beside others that need one.
    static PLACES: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    #[tokio::test]
    async fn json_is_read_whole_up_to_its_limit() {
        static MIB: [u8; 1 << 20] = [b' '; 1 << 20];
        let _places = PLACES.lock().await;
        let status = |result: Result<Bytes, Refusal>| result.unwrap_err().into_response().status().as_u16();
        let read = read_json(body(vec![Ok(b"{\"a\""), Ok(b":1}")]), None).await;
        assert_eq!(read.unwrap(), "{\"a\":1}");
        let full = body(vec![Ok(&MIB), Ok(&MIB)]);
        assert_eq!(read_json(full, None).await.unwrap().len(), MAX_JSON);
        let over = body(vec![Ok(&MIB), Ok(&MIB), Ok(b" ")]);
        assert_eq!(status(read_json(over, None).await), 413);
        assert_eq!(status(read_json(Body::empty(), Some(1 << 40)).await), 413);
        let broken = body(vec![Ok(b"{"), Err(std::io::ErrorKind::UnexpectedEof.into())]);
        assert_eq!(status(read_json(broken, None).await), 400);
    }

    #[tokio::test]
    async fn a_large_body_waits_for_its_turn_and_no_longer_than_it_may() {
        static LARGE: [u8; SMALL_JSON + 1] = [b' '; SMALL_JSON + 1];
        let _places = PLACES.lock().await;
        let all = LARGE_JSON.acquire_many(16).await.unwrap();
        let small = read_json(body(vec![Ok(b"{}")]), None).await;
        assert_eq!(small.unwrap(), "{}");
        let large = || body(vec![Ok(&LARGE)]).into_data_stream();
        let refused = collect_within(Duration::from_millis(50), large())
            .await
            .unwrap_err();
        assert_eq!(refused.into_response().status().as_u16(), 408);
        drop(all);
        assert!(collect(large()).await.is_ok());
    }
}
