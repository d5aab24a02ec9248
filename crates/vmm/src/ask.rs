//! Asking an installed program what it is: it is started with a word or two, and what it says is returned.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::driver::ProbeError;

/// The longest answer, QEMU's list of devices, has some 20 KiB.
const MAX_ANSWER: u64 = 1 << 20;
/// Each question takes 50 ms; a host that is out of memory or whose disk sleeps may need longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `program` with `words` and nothing but `env` in its environment; returns its standard output.
///
/// `package` is what an error names when there is no such program. Dropping the future ends the program.
pub(crate) async fn ask(
    program: &Path,
    package: &'static str,
    env: &[(String, String)],
    words: &[&str],
) -> Result<String, ProbeError> {
    let failed = |source: std::io::Error| {
        if source.kind() == std::io::ErrorKind::NotFound {
            ProbeError::Missing {
                program: program.to_owned(),
                package,
            }
        } else {
            ProbeError::Run {
                program: program.to_owned(),
                source,
            }
        }
    };
    let mut child = Command::new(program)
        .args(words)
        .env_clear()
        .envs(env.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let mut said = Vec::new();
    let reading = async {
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_ANSWER).read_to_end(&mut said).await?;
        }
        child.wait().await
    };
    let status = tokio::time::timeout(PATIENCE, reading)
        .await
        .map_err(|_| ProbeError::Timeout {
            program: program.to_owned(),
            limit: PATIENCE,
        })?
        .map_err(failed)?;
    let said = String::from_utf8_lossy(&said).into_owned();
    if !status.success() {
        return Err(not_understood(program, &format!("{status}: {said}")));
    }
    Ok(said)
}

/// The error for an answer that is none, with its start.
pub(crate) fn not_understood(program: &Path, said: &str) -> ProbeError {
    ProbeError::Answer {
        program: program.to_owned(),
        said: said.chars().take(200).collect(),
    }
}

/// The first two numbers of a version such as `7.2.22` or `v51.1`.
pub(crate) fn version_numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.strip_prefix('v').unwrap_or(version).split('.');
    let mut number = || {
        let part = parts.next()?;
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..digits].parse().ok()
    };
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_two_numbers() {
        for (text, expected) in [
            ("7.2.22", Some((7, 2))),
            ("10.0", Some((10, 0))),
            ("v51.1", Some((51, 1))),
            ("1.14-dev", Some((1, 14))),
            ("7", None),
            ("x.1", None),
            ("", None),
        ] {
            assert_eq!(version_numbers(text), expected, "{text}");
        }
    }
}
