//! Hands transactions to nft(8), which runs in the network namespace of the thread that starts it.

use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use nftables::schema::Nftables;
use offshoot_model::{ErrorKind, Explain};
use offshoot_sys::programs;

/// How much of nft's words is kept: it repeats each line that it does not like.
const MAX_WORDS: usize = 2000;

/// Why nft did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// It is not installed.
    #[error("nft is not installed")]
    Missing,
    /// It could not be run.
    #[error("cannot run nft")]
    Run(#[source] io::Error),
    /// It refused, or the kernel did.
    #[error("nft refused: {words}")]
    Refused {
        /// Its words.
        words: String,
    },
    /// Its answer is not what it should be.
    #[error("nft gave no sense")]
    Answer(#[source] serde_json::Error),
}

impl Explain for NftError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing => ErrorKind::NotPossible,
            Self::Run(_) | Self::Refused { .. } | Self::Answer(_) => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Missing => vec!["apt install nftables".into()],
            Self::Run(_) | Self::Refused { .. } | Self::Answer(_) => {
                vec!["see what this host lacks with `offshoot doctor`".into()]
            }
        }
    }
}

/// Does a whole transaction or nothing of it.
pub(super) fn commit(transaction: &Nftables<'_>) -> Result<(), NftError> {
    feed(&["-j", "-f", "-"], transaction)
}

/// Asks the kernel whether it would do a transaction; changes nothing.
pub(super) fn rehearse(transaction: &Nftables<'_>) -> Result<(), NftError> {
    feed(&["-c", "-j", "-f", "-"], transaction)
}

/// What nft lists, as JSON: an object with a list `nftables`.
pub(super) fn list(what: &[&str]) -> Result<serde_json::Value, NftError> {
    let child = command()?
        .arg("-j")
        .arg("list")
        .args(what)
        .stdin(Stdio::null())
        .spawn()
        .map_err(NftError::Run)?;
    let output = well(child.wait_with_output().map_err(NftError::Run)?)?;
    serde_json::from_slice(&output.stdout).map_err(NftError::Answer)
}

/// The objects of a listing that are of this kind (`table`, `chain`, `set`).
pub(super) fn objects<'a>(
    listing: &'a serde_json::Value,
    kind: &'a str,
) -> impl Iterator<Item = &'a serde_json::Value> {
    let all = listing["nftables"].as_array().map_or(&[][..], Vec::as_slice);
    all.iter().filter_map(move |object| object.get(kind))
}

fn feed(words: &[&str], transaction: &Nftables<'_>) -> Result<(), NftError> {
    let text = serde_json::to_vec(transaction).map_err(NftError::Answer)?;
    let mut child = command()?
        .args(words)
        .stdin(Stdio::piped())
        .spawn()
        .map_err(NftError::Run)?;
    // It reads to the end before it says a word. One that ends before that says why.
    let fed = child.stdin.take().map(|mut stdin| stdin.write_all(&text));
    well(child.wait_with_output().map_err(NftError::Run)?)?;
    match fed {
        Some(Err(error)) => Err(NftError::Run(error)),
        _ => Ok(()),
    }
}

fn command() -> Result<Command, NftError> {
    let mut command = Command::new(programs::find("nft").ok_or(NftError::Missing)?);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("LC_ALL", "C");
    Ok(command)
}

fn well(output: Output) -> Result<Output, NftError> {
    if output.status.success() {
        return Ok(output);
    }
    let words: String = String::from_utf8_lossy(&output.stderr)
        .chars()
        .take(MAX_WORDS)
        .collect();
    Err(NftError::Refused {
        words: words.trim().to_owned(),
    })
}
