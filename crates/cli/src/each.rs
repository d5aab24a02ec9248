//! Commands that take several names: the same for each, an answer for each, and a status for all.

use futures::{StreamExt as _, stream};
use offshoot_api::client::ClientError;

use crate::error::{ERROR, Failure, report_and_go_on};
use crate::output::line;

/// How many are asked for at once.
const AT_ONCE: usize = 16;

/// Does the same to each, prints the names of those it worked for, in order, and goes on after errors.
pub(crate) async fn each<'a, F>(names: &'a [String], act: impl Fn(&'a str) -> F) -> Result<u8, Failure>
where
    F: Future<Output = Result<(), ClientError>>,
{
    let mut done = stream::iter(names)
        .map(|name| (name, act(name)))
        .map(|(name, act)| async move { (name, act.await) })
        .buffered(AT_ONCE);
    let mut status = 0;
    while let Some((name, result)) = done.next().await {
        match result {
            Ok(()) => line(name)?,
            Err(e @ ClientError::Unreachable { .. }) => return Err(e.into()),
            Err(e) => {
                report_and_go_on(e.into());
                status = ERROR;
            }
        }
    }
    Ok(status)
}
