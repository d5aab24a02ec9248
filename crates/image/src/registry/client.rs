//! One repository of one registry, spoken to for one pull (distribution-spec, "Pull").
//!
//! oci-client does the authentication and streams the blobs. Manifests are fetched here, because it would read one of any size
//! into memory.

use std::sync::Once;
use std::time::Duration;

use oci_client::RegistryOperation;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_spec::distribution::Reference;
use offshoot_model::Digest;
use sha2::{Digest as _, Sha256};

use super::error::{Peer, PullError};
use super::{PullOptions, RegistryAuth};
use crate::manifest::{
    DOCKER_INDEX, DOCKER_MANIFEST, MANIFEST_LIMIT, ManifestError, OCI_INDEX, OCI_MANIFEST,
};
use crate::reference::ImageReference;

/// Long enough for a slow DNS server and three SYNs.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Silence of this length is a dead peer; slow registries send something now and then.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("offshoot/", env!("CARGO_PKG_VERSION"));
/// How much of an error page is read.
const ERROR_LIMIT: u64 = 64 << 10;

pub(super) struct Client {
    oci: oci_client::Client,
    http: reqwest::Client,
    reference: ImageReference,
    plain_http: bool,
    authorization: Authorization,
}

/// What goes with a request for a manifest.
enum Authorization {
    None,
    Basic(String, String),
    Bearer(String),
}

impl Client {
    /// Connects and authenticates.
    pub(super) async fn connect(
        reference: &ImageReference,
        options: &PullOptions,
    ) -> Result<Self, PullError> {
        install_tls_provider();
        let plain_http =
            reference.is_loopback() || options.plain_http.iter().any(|host| host == reference.registry());
        let config = ClientConfig {
            protocol: if plain_http {
                ClientProtocol::Http
            } else {
                ClientProtocol::Https
            },
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        };
        let oci = oci_client::Client::try_from(config).map_err(|e| PullError::Client { source: e.into() })?;
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(USER_AGENT)
            .build()
            .map_err(|e| PullError::Client { source: e.into() })?;
        let mut client = Self {
            oci,
            http,
            reference: reference.clone(),
            plain_http,
            authorization: Authorization::None,
        };
        client.authenticate(&options.auth).await?;
        Ok(client)
    }

    async fn authenticate(&mut self, auth: &RegistryAuth) -> Result<(), PullError> {
        use oci_client::secrets::RegistryAuth as Oci;
        let oci = match auth {
            RegistryAuth::Anonymous => Oci::Anonymous,
            RegistryAuth::Basic { user, password } => Oci::Basic(user.clone(), password.clone()),
            RegistryAuth::Bearer(token) => Oci::Bearer(token.clone()),
        };
        let token = self
            .oci
            .auth(self.reference.as_oci(), &oci, RegistryOperation::Pull)
            .await
            .map_err(|error| self.peer().client(error, None))?;
        self.authorization = match (token, auth) {
            (Some(token), _) => Authorization::Bearer(token),
            (None, RegistryAuth::Basic { user, password }) => {
                Authorization::Basic(user.clone(), password.clone())
            }
            _ => Authorization::None,
        };
        Ok(())
    }

    fn peer(&self) -> Peer<'_> {
        Peer {
            registry: self.reference.registry(),
            repository: self.reference.repository(),
            plain_http: self.plain_http,
        }
    }

    fn oci_reference(&self) -> &Reference {
        self.reference.as_oci()
    }

    /// Fetches the manifest or index that `digest` names, or else the reference itself; gives it with its digest, checked.
    pub(super) async fn manifest(&self, digest: Option<Digest>) -> Result<(Vec<u8>, Digest), PullError> {
        let expected = digest.or(self.reference.digest());
        let which = match (&expected, self.reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let scheme = if self.plain_http { "http" } else { "https" };
        let reference = self.oci_reference();
        let url = format!(
            "{scheme}://{}/v2/{}/manifests/{which}",
            reference.resolve_registry(),
            reference.repository()
        );
        let accept = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX].join(", ");
        let request = self.http.get(url).header("Accept", accept);
        let request = match &self.authorization {
            Authorization::None => request,
            Authorization::Basic(user, password) => request.basic_auth(user, Some(password)),
            Authorization::Bearer(token) => request.bearer_auth(token),
        };
        let broken = |error: reqwest::Error| self.peer().request(error.is_connect(), error);
        let response = request.send().await.map_err(broken)?;
        let status = response.status().as_u16();
        match status {
            200 => {}
            404 => {
                return Err(PullError::NotFound {
                    reference: self.reference.to_string(),
                });
            }
            _ => {
                let (body, _) = read(response, ERROR_LIMIT).await.map_err(broken)?;
                return Err(self.peer().status(status, &body));
            }
        }
        let (body, whole) = read(response, MANIFEST_LIMIT).await.map_err(broken)?;
        if !whole {
            let source = ManifestError::TooLarge {
                what: "manifest",
                limit: MANIFEST_LIMIT,
            };
            return Err(PullError::Manifest {
                reference: self.reference.to_string(),
                source: source.into(),
            });
        }
        let actual = Digest::from_bytes(Sha256::digest(&body).into());
        match expected {
            Some(expected) if expected != actual => Err(PullError::ManifestDigest { expected, actual }),
            _ => Ok((body, actual)),
        }
    }

    /// Asks for a blob from `offset` on. Where the registry cannot begin in the middle, all of it comes.
    pub(super) async fn blob(&self, digest: Digest, offset: u64) -> Result<BlobResponse, PullError> {
        // Also from the very beginning by range: a whole answer would be hashed by the client, and then by us.
        let text = digest.to_string();
        self.oci
            .pull_blob_stream_partial(self.oci_reference(), text.as_str(), offset, None)
            .await
            .map_err(|error| self.peer().client(error, Some(digest)))
    }
}

/// Reads at most `limit` bytes of an answer; says whether that was all of it.
async fn read(mut response: reqwest::Response, limit: u64) -> Result<(Vec<u8>, bool), reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        let room = usize::try_from(limit)
            .unwrap_or(usize::MAX)
            .saturating_sub(body.len());
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if chunk.len() > room {
            return Ok((body, false));
        }
    }
    Ok((body, true))
}

/// rustls is built without a provider of cryptography of its own; whoever comes first installs one for the process.
fn install_tls_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error means that the program has installed another one, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
