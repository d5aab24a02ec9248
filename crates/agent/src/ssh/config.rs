//! Keys and algorithms: what the host asked for, checked, and what the library is told.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use offshoot_agent_proto::v1;
use russh::keys::ssh_key::AuthorizedKeys;
use russh::keys::{Algorithm, EcdsaCurve, HashAlg, PrivateKey, PublicKey};
use russh::{MethodKind, MethodSet, Preferred, SshId, cipher, compression, kex, mac};

use super::inbox::WINDOW;
use crate::log;

/// More keys than this are not looked at; nobody has so many.
const MAX_KEYS: usize = 1024;

/// Keys that a client may offer before it is sent away. An SSH agent offers all it has, one after the other.
const MAX_ATTEMPTS: usize = 16;

/// The largest packet that a client may send (RFC 4253 asks for 32 KiB of payload; OpenSSH uses that).
const MAX_PACKET: u32 = 32 << 10;

/// Messages on their way from processes to a connection; a packet each.
const EVENTS: usize = 32;

/// Messages of the client that wait for the library's own channel reader, which nobody uses.
const CHANNEL_BUFFER: usize = 8;

/// The first that clients have in common with us is taken, so old ones are not here. With a hybrid of ML-KEM where the
/// client has it, because what is recorded today may be read in twenty years.
const KEX: [kex::Name; 7] = [
    kex::MLKEM768X25519_SHA256,
    kex::CURVE25519,
    kex::CURVE25519_PRE_RFC_8731,
    kex::EXTENSION_SUPPORT_AS_CLIENT,
    kex::EXTENSION_SUPPORT_AS_SERVER,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
];

const CIPHERS: [cipher::Name; 5] = [
    cipher::CHACHA20_POLY1305,
    cipher::AES_256_GCM,
    cipher::AES_128_GCM,
    // Clients without either of them (libraries, mostly) have these.
    cipher::AES_256_CTR,
    cipher::AES_128_CTR,
];

const MACS: [mac::Name; 4] = [
    mac::HMAC_SHA256_ETM,
    mac::HMAC_SHA512_ETM,
    mac::HMAC_SHA256,
    mac::HMAC_SHA512,
];

/// Of the host key, which is Ed25519, and of the signatures that clients may make. No SHA-1.
const SIGNATURES: [Algorithm; 6] = [
    Algorithm::Ed25519,
    Algorithm::Ecdsa {
        curve: EcdsaCurve::NistP256,
    },
    Algorithm::Ecdsa {
        curve: EcdsaCurve::NistP384,
    },
    Algorithm::Ecdsa {
        curve: EcdsaCurve::NistP521,
    },
    Algorithm::Rsa {
        hash: Some(HashAlg::Sha512),
    },
    Algorithm::Rsa {
        hash: Some(HashAlg::Sha256),
    },
];

/// Why there can be no server as it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SshPlanError {
    /// The host key cannot be read.
    #[error("the SSH host key is no Ed25519 key in OpenSSH's format")]
    HostKey,
    /// No TCP port.
    #[error("{port} is no port for SSH")]
    Port {
        /// What was asked for.
        port: u32,
    },
}

/// What a server is asked to be.
#[derive(Clone)]
pub(crate) struct SshPlan {
    /// For the library.
    pub(super) config: Arc<russh::server::Config>,
    /// Whose keys let in.
    pub(super) keys: Vec<PublicKey>,
    /// The environment that every process of the VM gets.
    pub(super) environment: Vec<String>,
    /// Where to listen; nowhere when there is none.
    pub(crate) port: Option<u16>,
    /// Not when the image's own server does.
    pub(crate) yield_to_sshd: bool,
}

impl std::fmt::Debug for SshPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the key.
        f.debug_struct("SshPlan")
            .field("port", &self.port)
            .field("keys", &self.keys.len())
            .finish_non_exhaustive()
    }
}

/// Decides, or refuses.
pub(crate) fn plan(asked: &v1::SshServer) -> Result<SshPlan, SshPlanError> {
    let host_key = PrivateKey::from_openssh(&asked.host_key).map_err(|_| SshPlanError::HostKey)?;
    if host_key.algorithm() != Algorithm::Ed25519 || host_key.is_encrypted() {
        return Err(SshPlanError::HostKey);
    }
    let port = u16::try_from(asked.port).map_err(|_| SshPlanError::Port { port: asked.port })?;
    Ok(SshPlan {
        config: Arc::new(library_config(host_key)),
        keys: parse_keys(&asked.authorized_keys),
        environment: asked.env.clone(),
        port: Some(port).filter(|port| *port != 0),
        yield_to_sshd: asked.yield_to_sshd,
    })
}

/// The keys of some lines. A line that is none lets nobody in, and nor does one with options, which would restrict what
/// its key may do.
pub(crate) fn parse_keys(lines: &[String]) -> Vec<PublicKey> {
    let mut keys = Vec::new();
    for entry in lines
        .iter()
        .take(MAX_KEYS)
        .flat_map(|line| AuthorizedKeys::new(line))
    {
        match entry {
            Ok(entry) if entry.config_opts().is_empty() => keys.push(entry.public_key().clone()),
            Ok(_) => log::warning("an authorized key with options is left out"),
            Err(error) => log::warning(format_args!("an authorized key is left out: {error}")),
        }
    }
    keys
}

fn library_config(host_key: PrivateKey) -> russh::server::Config {
    russh::server::Config {
        server_id: SshId::Standard(Cow::Borrowed(concat!(
            "SSH-2.0-Offshoot_",
            env!("CARGO_PKG_VERSION")
        ))),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        // A key cannot be guessed, so a wrong one costs no wait; what a connection may try is bounded.
        auth_rejection_time: Duration::ZERO,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        window_size: WINDOW,
        maximum_packet_size: MAX_PACKET,
        channel_buffer_size: CHANNEL_BUFFER,
        event_buffer_size: EVENTS,
        preferred: Preferred {
            kex: Cow::Borrowed(&KEX),
            key: Cow::Borrowed(&SIGNATURES),
            host_key_certificates: Cow::Borrowed(&[]),
            cipher: Cow::Borrowed(&CIPHERS),
            mac: Cow::Borrowed(&MACS),
            compression: Cow::Borrowed(&[compression::NONE]),
        },
        max_auth_attempts: MAX_ATTEMPTS,
        // A shell may be idle for days; who is gone is noticed by TCP, or the call's end.
        inactivity_timeout: None,
        keepalive_interval: None,
        nodelay: true,
        ..russh::server::Config::default()
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    const ED25519: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti user@example.com";

    fn count(lines: &[&str]) -> usize {
        let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
        parse_keys(&lines).len()
    }

    #[test]
    fn only_whole_keys_without_options_let_in() {
        assert_eq!(count(&[ED25519]), 1);
        assert_eq!(count(&["", "# a comment", ED25519, "nonsense", ED25519]), 2);
        assert_eq!(count(&[&format!("from=\"10.0.0.1\" {ED25519}")]), 0);
        assert_eq!(count(&[&format!("{ED25519}\n{ED25519}\n")]), 2);
        assert_eq!(count(&[&ED25519[..40]]), 0);
    }

    #[test]
    fn a_server_needs_a_key_and_a_port() {
        let key = PrivateKey::random(&mut russh::keys::key::safe_rng(), Algorithm::Ed25519).unwrap();
        let host_key = key.to_openssh(Default::default()).unwrap().to_string();
        let server = |host_key: &str, port| v1::SshServer {
            host_key: host_key.to_owned(),
            port,
            ..v1::SshServer::default()
        };
        assert_eq!(plan(&server(&host_key, 22)).unwrap().port, Some(22));
        assert_eq!(plan(&server(&host_key, 0)).unwrap().port, None);
        assert!(matches!(
            plan(&server(&host_key, 70_000)),
            Err(SshPlanError::Port { port: 70_000 })
        ));
        assert!(matches!(plan(&server("", 22)), Err(SshPlanError::HostKey)));
    }
}
