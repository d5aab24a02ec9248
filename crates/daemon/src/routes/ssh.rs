//! SSH to VMs: what clients must know, and connections to the server in the agent over a WebSocket.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{Message, WebSocket};
use axum::response::Response;
use futures::{SinkExt as _, StreamExt as _};
use offshoot_agent_proto::client::SshConnection;
use offshoot_api::ssh::{MAX_MESSAGE, SshHost, SshHosts, SshHostsQuery, SshQuery};
use offshoot_api::vm::VmPath;
use offshoot_engine::capabilities::ssh_port;
use offshoot_engine::owner::VmHandle;
use offshoot_engine::ssh_keys::{HostKey, check_keys};
use offshoot_model::VmName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::vms::live;
use crate::app::Shared;
use crate::blocking::blocking;
use crate::error::Answer;
use crate::extract::{Named, Query, Upgrade};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(hosts)).routes(routes!(ssh))
}

#[utoipa::path(get, path = "/v1/ssh", params(SshHostsQuery), responses((status = 200, body = SshHosts)))]
async fn hosts(State(app): State<Shared>, Query(query): Query<SshHostsQuery>) -> Answer<Json<SshHosts>> {
    let vms = match query.vm {
        Some(vm) => {
            let vm: VmName = vm.parse()?;
            vec![app.engine.find(vm.as_str())?]
        }
        None => app.engine.list(),
    };
    let domain = app.config.dns_domain.clone();
    let within = domain.clone();
    // A small file each.
    let read = blocking("reading host keys", move || {
        Ok(vms.iter().map(|vm| host(vm, &within)).collect())
    });
    let vms = read.await?;
    Ok(Json(SshHosts { domain, vms }))
}

fn host(handle: &VmHandle, domain: &str) -> SshHost {
    let vm = handle.view.borrow().clone();
    let attachment = vm.definition.attachment.as_ref();
    let host_key = HostKey::read(&handle.paths.ssh_host_key());
    if let Err(error) = &host_key {
        tracing::warn!(vm = %vm.name, %error, "cannot tell a VM's SSH host key");
    }
    SshHost {
        id: vm.id.clone(),
        name: vm.name.clone(),
        domain_name: format!("{}.{domain}", vm.name.as_str().to_ascii_lowercase()),
        state: vm.life.state,
        ipv4: attachment.map(|attachment| attachment.ipv4),
        ipv6: attachment.map(|attachment| attachment.ipv6),
        port: attachment.and(ssh_port(&vm.definition.config.ssh)),
        host_key: host_key.ok().flatten().and_then(|key| key.public_line().ok()),
    }
}

#[utoipa::path(get, path = "/v1/vms/{vm}/ssh", params(VmPath, SshQuery), responses((status = 101)))]
async fn ssh(
    State(app): State<Shared>,
    Named(name): Named<VmName>,
    Query(query): Query<SshQuery>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    let keys: Vec<String> = query
        .key
        .iter()
        .flat_map(|keys| keys.lines())
        .filter(|line| !line.trim().is_empty())
        .map(str::to_owned)
        .collect();
    check_keys(&keys)?;
    let handle = app.engine.find(name.as_str())?;
    let connection = live(&handle)?.agent.ssh(keys).await?;
    let upgrade = upgrade
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE)
        .write_buffer_size(0);
    Ok(upgrade.on_upgrade(|socket| relay(socket, connection)))
}

/// Passes bytes in both directions until either side ends the connection.
async fn relay(socket: WebSocket, connection: SshConnection) {
    let (mut from_guest, mut to_guest) = tokio::io::split(connection);
    let (mut sending, mut receiving) = socket.split();
    let up = async {
        while let Some(Ok(message)) = receiving.next().await {
            match message {
                Message::Binary(bytes) => {
                    if to_guest.write_all(&bytes).await.is_err() {
                        // The guest is gone; what it said last may still be on its way to the client.
                        return std::future::pending().await;
                    }
                }
                Message::Close(_) => break,
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    };
    let down = async {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            match from_guest.read(&mut buffer).await {
                Ok(0) => break,
                Ok(n) => {
                    let message = Message::Binary(Bytes::copy_from_slice(&buffer[..n]));
                    if sending.send(message).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "an SSH connection broke");
                    break;
                }
            }
        }
        let _ = sending.send(Message::Close(None)).await;
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}
