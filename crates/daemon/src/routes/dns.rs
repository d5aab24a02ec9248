//! Who answers for the names of VMs.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use offshoot_api::dns::{DnsInfo, DnsServer};
use offshoot_net::dns::reverse_zones;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::Shared;

pub(super) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(info))
}

#[utoipa::path(get, path = "/v1/dns", responses((status = 200, body = DnsInfo)))]
async fn info(State(app): State<Shared>) -> Json<DnsInfo> {
    let networks = app.engine.networks();
    let listening = app.names.listening();
    let names = Arc::clone(&app.names);
    let server = |network: Arc<offshoot_model::Network>| DnsServer {
        network: network.name.to_string(),
        ipv4: network.gateway4().to_string(),
        ipv6: network.gateway6().to_string(),
        subnet: network.ipv4.to_string(),
        reverse: reverse_zones(&network),
        listening: listening.iter().any(|(name, _)| *name == network.name),
    };
    let (upstreams, upstream_source) = names.upstreams();
    Json(DnsInfo {
        domain: names.domain().to_string(),
        netns: networks.namespace().name().map(str::to_owned),
        servers: networks.list().into_iter().map(server).collect(),
        upstreams: upstreams.iter().map(ToString::to_string).collect(),
        upstream_source,
    })
}
