//! Networks: list, create, look at, remove.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use ipnet::Ipv4Net;
use offshoot_api::network::{NetworkDetails, NetworkMember, NetworkPath, NetworkRequest, NetworkSummary};
use offshoot_engine::networks::NetworkError;
use offshoot_model::{ErrorKind, NetworkName};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{App, Shared};
use crate::error::{Answer, Failure};
use crate::extract::{JsonBody, Named};

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(inspect, remove))
}

/// The VMs on a network, running or not.
fn members(app: &App, name: &NetworkName) -> Vec<NetworkMember> {
    let vms = app.engine.records();
    let members = vms.iter().filter_map(|vm| {
        let attachment = vm.definition.attachment.as_ref()?;
        (attachment.network == *name).then(|| NetworkMember {
            id: vm.id.clone(),
            name: vm.name.clone(),
            state: vm.life.state,
            ipv4: attachment.ipv4,
            ipv6: attachment.ipv6,
            mac: attachment.mac,
        })
    });
    members.collect()
}

#[utoipa::path(get, path = "/v1/networks", responses((status = 200, body = [NetworkSummary])))]
async fn list(State(app): State<Shared>) -> Json<Vec<NetworkSummary>> {
    let networks = app.engine.networks().list();
    let summaries = networks
        .iter()
        .map(|network| NetworkSummary::new(network, members(&app, &network.name).len() as u64));
    Json(summaries.collect())
}

#[utoipa::path(post, path = "/v1/networks", request_body = NetworkRequest,
    responses((status = 201, body = NetworkSummary)))]
async fn create(
    State(app): State<Shared>,
    JsonBody(request): JsonBody<NetworkRequest>,
) -> Answer<(StatusCode, Json<NetworkSummary>)> {
    let name: NetworkName = request.name.parse()?;
    let subnet = request.subnet.as_deref().map(parse_subnet).transpose()?;
    let network = app.engine.networks().create(name, subnet).await?;
    Ok((StatusCode::CREATED, Json(NetworkSummary::new(&network, 0))))
}

/// The IPv4 addresses that a text names.
fn parse_subnet(text: &str) -> Answer<Ipv4Net> {
    text.parse().map_err(|_| {
        let shown: String = text.chars().take(40).flat_map(char::escape_debug).collect();
        Failure::new(ErrorKind::InvalidRequest, format!("`{shown}` is no IPv4 subnet"))
            .hint("write ADDRESS/PREFIX, such as 10.90.0.0/24")
    })
}

#[utoipa::path(get, path = "/v1/networks/{name}", params(NetworkPath),
    responses((status = 200, body = NetworkDetails)))]
async fn inspect(State(app): State<Shared>, Named(name): Named<NetworkName>) -> Answer<Json<NetworkDetails>> {
    let network = app
        .engine
        .networks()
        .get(&name)
        .ok_or_else(|| NetworkError::NotFound { name: name.clone() })?;
    let members = members(&app, &name);
    Ok(Json(NetworkDetails {
        summary: NetworkSummary::new(&network, members.len() as u64),
        members,
    }))
}

#[utoipa::path(delete, path = "/v1/networks/{name}", params(NetworkPath),
    responses((status = 204)))]
async fn remove(State(app): State<Shared>, Named(name): Named<NetworkName>) -> Answer<StatusCode> {
    app.engine.networks().remove(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
