//! Whether a VM's SSH server answers, as a client of SSH sees it: banner, keys, login, `true`.
//!
//! Over the daemon's own way to it (`GET /v1/vms/{vm}/ssh`), which is what `offshoot ssh` takes as well. No program is
//! started, so what is measured is the daemon, the channel and the guest.

use std::sync::Arc;

use offshoot_api::client::{Client, SshTunnel};
use offshoot_api::ssh::{SshHostsQuery, SshQuery};
use russh::ChannelMsg;
use russh::client::{self, Handler};
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::task::JoinSet;

use crate::error::Failure;
use crate::ssh::keys::{Places, own_key};

/// Bytes that wait between the tunnel and the client's side of SSH.
const WAITING: usize = 64 << 10;
/// Who logs in: every image has this user.
const USER: &str = "root";

/// The key that lets this user in.
#[derive(Debug)]
pub(super) struct Key {
    private: Arc<PrivateKey>,
    public: String,
}

impl Key {
    pub(super) fn of_this_user() -> Result<Self, Failure> {
        let own = own_key(&Places::of_this_user())?;
        let text = std::fs::read_to_string(&own.path)
            .map_err(|e| Failure::io(format!("cannot read {}", own.path.display()), &e))?;
        let private = PrivateKey::from_openssh(&text).map_err(|e| {
            Failure::invalid(format!("{} holds no SSH key", own.path.display())).caused_by(&e)
        })?;
        Ok(Self {
            private: Arc::new(private),
            public: own.public,
        })
    }
}

/// Takes the one server that the daemon knows.
struct Known(String);

impl Handler for Known {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        let PublicKeyOrCertificate::PublicKey { key, .. } = key else {
            return Ok(false);
        };
        let shown = key.to_openssh()?;
        // Algorithm and key; what follows is a comment.
        Ok(shown
            .split_whitespace()
            .take(2)
            .eq(self.0.split_whitespace().take(2)))
    }
}

/// Logs in and runs `true`.
pub(super) async fn answers(client: &Client, vm: &str, key: &Key) -> Result<(), Failure> {
    let hosts = client
        .ssh_hosts(&SshHostsQuery {
            vm: Some(vm.to_owned()),
        })
        .await?;
    let host_key = hosts.vms.into_iter().next().and_then(|host| host.host_key);
    let host_key = host_key.ok_or_else(|| Failure::internal("the VM has no SSH host key"))?;
    let query = SshQuery {
        key: Some(key.public.clone()),
    };
    let (ours, theirs) = tokio::io::duplex(WAITING);
    // Ends with this function.
    let _pumps = pump(client.ssh(vm, &query).await?, theirs);
    let ran = run_true(ours, Known(host_key), key).await;
    match ran.map_err(|e| Failure::internal("SSH failed").caused_by(&e))? {
        Some(0) => Ok(()),
        status => Err(Failure::internal(format!(
            "`true` over SSH ended with {status:?}"
        ))),
    }
}

async fn run_true(stream: DuplexStream, known: Known, key: &Key) -> Result<Option<u32>, russh::Error> {
    let mut session = client::connect_stream(Arc::default(), stream, known).await?;
    let private = PrivateKeyWithHashAlg::new(Arc::clone(&key.private), None);
    if !session.authenticate_publickey(USER, private).await?.success() {
        return Err(russh::Error::NotAuthenticated);
    }
    let mut channel = session.channel_open_session().await?;
    channel.exec(true, "true").await?;
    while let Some(message) = channel.wait().await {
        if let ChannelMsg::ExitStatus { exit_status } = message {
            return Ok(Some(exit_status));
        }
    }
    Ok(None)
}

/// Joins a tunnel with a stream of bytes, until it is dropped.
fn pump(tunnel: SshTunnel, stream: DuplexStream) -> JoinSet<()> {
    let (mut sink, mut messages) = tunnel.split();
    let (mut from, mut to) = tokio::io::split(stream);
    let mut pumps = JoinSet::new();
    pumps.spawn(async move {
        let mut buffer = vec![0; WAITING];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            if sink
                .send(bytes::Bytes::copy_from_slice(&buffer[..read]))
                .await
                .is_err()
            {
                return;
            }
        }
    });
    pumps.spawn(async move {
        while let Ok(Some(bytes)) = messages.next().await {
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        // The client's side hears of the end.
        let _ = to.shutdown().await;
    });
    pumps
}
