//! Credentials for a registry out of Docker's `config.json`, in the file or from a credential helper.
//!
//! Looked up as Docker does it: `credHelpers` for that registry, else `credsStore`, else `auths`
//! (docker/cli, `cli/config/configfile`; docker/docker-credential-helpers for the helpers' protocol).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use offshoot_api::image::RegistryCredentials;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::error::Failure;
use crate::output::note;

/// The key of Docker Hub, which is older than registries' names.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// A larger `config.json` is something else.
const MAX_CONFIG: u64 = 1 << 20;
/// A larger answer of a helper is something else.
const MAX_HELPER_ANSWER: u64 = 64 << 10;
/// Helpers may unlock a key ring, but not wait for a user who is not there.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

/// Where to look.
#[derive(Debug, PartialEq, Eq)]
enum Source {
    Helper(String),
    Found(RegistryCredentials),
    /// What Docker stores after a login with an OAuth token, which only Docker itself can renew.
    Unusable,
    Nothing,
}

/// The user's credentials for the registry of `reference`; `None` to ask it as nobody.
pub(crate) async fn for_reference(reference: &str) -> Result<Option<RegistryCredentials>, Failure> {
    let Some(path) = config_path(
        std::env::var_os("DOCKER_CONFIG").map(PathBuf::from),
        std::env::home_dir(),
    ) else {
        return Ok(None);
    };
    let cannot = || format!("cannot read the registry credentials in `{}`", path.display());
    let text = match read_limited(&path) {
        Ok(text) => text,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(Failure::io(cannot(), &e)),
    };
    let config: DockerConfig = serde_json::from_str(&text).map_err(|e| {
        // The error names line and column, and not the text, which may be secret.
        Failure::invalid(cannot())
            .caused_by(&e)
            .hint(format!("repair or remove `{}`", path.display()))
    })?;
    let key = registry_key(reference);
    match lookup(&config, key) {
        Source::Found(credentials) => Ok(Some(credentials)),
        Source::Helper(name) => ask_helper(&name, key).await,
        Source::Unusable => {
            note(&format!(
                "the token that Docker stores for {key} cannot be used; trying without credentials"
            ));
            Ok(None)
        }
        Source::Nothing => Ok(None),
    }
}

fn config_path(docker_config: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    let folder = docker_config
        .filter(|path| !path.as_os_str().is_empty())
        .or_else(|| Some(home?.join(".docker")))?;
    Some(folder.join("config.json"))
}

fn read_limited(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_CONFIG + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(io::Error::other(format!("it has more than {MAX_CONFIG} bytes")));
    }
    Ok(text)
}

/// The key under which Docker keeps the credentials for a reference's registry.
///
/// The first component is a registry when it looks like a host (distribution/reference, "splitDockerDomain").
fn registry_key(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => {
            if matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io") {
                DOCKER_HUB
            } else {
                host
            }
        }
        _ => DOCKER_HUB,
    }
}

/// A host out of a key, which may be an address.
fn host(key: &str) -> &str {
    let key = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    key.split_once('/').map_or(key, |(host, _)| host)
}

fn lookup(config: &DockerConfig, key: &str) -> Source {
    if let Some(helper) = config
        .cred_helpers
        .get(key)
        .or_else(|| config.cred_helpers.get(host(key)))
    {
        return Source::Helper(helper.clone());
    }
    if !config.creds_store.is_empty() {
        return Source::Helper(config.creds_store.clone());
    }
    let same_host = || {
        config
            .auths
            .iter()
            .find(|(other, _)| host(other) == host(key))
            .map(|(_, auth)| auth)
    };
    config
        .auths
        .get(key)
        .or_else(same_host)
        .map_or(Source::Nothing, credentials)
}

fn credentials(auth: &Auth) -> Source {
    if !auth.registrytoken.is_empty() {
        return Source::Found(RegistryCredentials::Bearer {
            token: auth.registrytoken.clone(),
        });
    }
    if !auth.identitytoken.is_empty() {
        return Source::Unusable;
    }
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(auth.auth.trim())
        .ok();
    let text = decoded
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .unwrap_or_default();
    let (username, password) = match text.split_once(':') {
        // Docker pads old entries with NUL.
        Some((username, password)) => (username.to_owned(), password.trim_end_matches('\0').to_owned()),
        None => (auth.username.clone(), auth.password.clone()),
    };
    if username.is_empty() {
        return Source::Nothing;
    }
    Source::Found(RegistryCredentials::Basic { username, password })
}

async fn ask_helper(name: &str, key: &str) -> Result<Option<RegistryCredentials>, Failure> {
    let program = format!("docker-credential-{name}");
    let cannot = || format!("cannot get the credentials for {key} from `{program}`");
    let hint = "log in again with `docker login`, or take the helper out of Docker's config.json";
    if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    {
        return Err(Failure::invalid(cannot()).hint(hint));
    }
    let answer = tokio::time::timeout(HELPER_TIMEOUT, run_helper(&program, key)).await;
    let (ok, text) = match answer {
        Ok(Ok(answer)) => answer,
        Ok(Err(e)) => return Err(Failure::io(cannot(), &e).hint(hint)),
        Err(_) => {
            let late = io::Error::from(io::ErrorKind::TimedOut);
            return Err(Failure::io(cannot(), &late).hint(hint));
        }
    };
    if !ok {
        // Helpers say so in words (docker-credential-helpers, `ErrCredentialsNotFound`).
        if text.contains("credentials not found") {
            return Ok(None);
        }
        let said = io::Error::other(text.trim().to_owned());
        return Err(Failure::io(cannot(), &said).hint(hint));
    }
    let answer: HelperAnswer =
        serde_json::from_str(&text).map_err(|e| Failure::invalid(cannot()).caused_by(&e).hint(hint))?;
    if answer.username == "<token>" {
        note(&format!(
            "the token that `{program}` has for {key} cannot be used; trying without credentials"
        ));
        return Ok(None);
    }
    Ok(Some(RegistryCredentials::Basic {
        username: answer.username,
        password: answer.secret,
    }))
}

/// Whether it ended well, and what it wrote.
async fn run_helper(program: &str, key: &str) -> io::Result<(bool, String)> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read its question answers with an error of its own.
        let _ = stdin.write_all(format!("{key}\n").as_bytes()).await;
    }
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_HELPER_ANSWER).read_to_string(&mut text).await?;
    }
    Ok((child.wait().await?.success(), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_its_registry() {
        for (reference, key) in [
            ("debian", DOCKER_HUB),
            ("debian:bookworm", DOCKER_HUB),
            ("library/debian", DOCKER_HUB),
            ("docker.io/library/debian", DOCKER_HUB),
            ("localhost/x", "localhost"),
            ("localhost:5000/x", "localhost:5000"),
            ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000"),
            ("ghcr.io/a/b@sha256:00", "ghcr.io"),
        ] {
            assert_eq!(registry_key(reference), key, "{reference}");
        }
    }

    #[test]
    fn credentials_are_found_as_docker_finds_them() {
        let basic = |username: &str, password: &str| {
            Source::Found(RegistryCredentials::Basic {
                username: username.into(),
                password: password.into(),
            })
        };
        let config: DockerConfig = serde_json::from_str(
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "bWU6YTpi"},
                "https://r.example/v2/": {"username": "u", "password": "p"},
                "localhost:5000": {"auth": "bWU6c2VjcmV0AAA="},
                "t.example": {"registrytoken": "tok"},
                "i.example": {"auth": "bWU6", "identitytoken": "x"},
                "broken.example": {"auth": "%%%"},
                "empty.example": {}
            }, "credHelpers": {"h.example": "gcloud"}, "HttpHeaders": {"X": "y"}}"#,
        )
        .unwrap();
        let check = |key: &str, expected: Source| assert_eq!(lookup(&config, key), expected, "{key}");
        check(DOCKER_HUB, basic("me", "a:b"));
        check("r.example", basic("u", "p"));
        check("localhost:5000", basic("me", "secret"));
        check(
            "t.example",
            Source::Found(RegistryCredentials::Bearer { token: "tok".into() }),
        );
        check("i.example", Source::Unusable);
        check("h.example", Source::Helper("gcloud".into()));
        check("broken.example", Source::Nothing);
        check("empty.example", Source::Nothing);
        check("other.example", Source::Nothing);
        let store: DockerConfig =
            serde_json::from_str(r#"{"credsStore": "pass", "auths": {"x.example": {}}}"#).unwrap();
        assert_eq!(lookup(&store, "x.example"), Source::Helper("pass".into()));
    }

    #[test]
    fn the_config_lies_where_docker_has_it() {
        let check = |docker: Option<&str>, home: Option<&str>, expected: Option<&str>| {
            assert_eq!(
                config_path(docker.map(Into::into), home.map(Into::into)),
                expected.map(PathBuf::from)
            );
        };
        check(None, Some("/home/me"), Some("/home/me/.docker/config.json"));
        check(Some(""), Some("/home/me"), Some("/home/me/.docker/config.json"));
        check(Some("/etc/d"), Some("/home/me"), Some("/etc/d/config.json"));
        check(None, None, None);
    }

    #[tokio::test]
    async fn helpers_with_hostile_names_are_not_run() {
        for name in ["../evil", "a b", "a/b", "a;b"] {
            assert!(ask_helper(name, "r.example").await.is_err(), "{name}");
        }
    }
}
