//! Asking upstreams: in the namespace, for a bounded time, for a bounded number of clients at once.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{DnsRequest, DnsRequestOptions, Edns, Message, ResponseCode};
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverOpts};
use hickory_resolver::net::xfer::{DnsHandle as _, FirstAnswer as _, RetryDnsHandle};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::{NameServerPool, PoolContext, TlsConfig};

use super::cache::Cache;
use super::measure;
use super::question::Question;
use super::reply::Reply;
use super::sockets::InNamespace;
use super::upstream::{Stamp, UpstreamSource};
use super::{UpstreamAddress, Zone};
use crate::Namespace;

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long all of them may take: a client asks again after five seconds (resolv.conf(5)).
const PATIENCE: Duration = Duration::from_secs(4);
/// How often it is looked whether the file with the upstreams changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

type Pool = RetryDnsHandle<NameServerPool<InNamespace>>;

/// Asks upstreams, and remembers what they said.
pub(crate) struct Forwarder {
    namespace: Namespace,
    source: UpstreamSource,
    cache: Cache,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    looked: Option<Instant>,
    stamp: Option<Stamp>,
    servers: Vec<SocketAddr>,
    pool: Option<Pool>,
}

impl Forwarder {
    pub(crate) fn new(namespace: Namespace, configured: &[UpstreamAddress]) -> Self {
        Self {
            source: UpstreamSource::of(configured, &namespace),
            namespace,
            cache: Cache::new(),
            state: Mutex::default(),
        }
    }

    /// Where the upstreams are named.
    pub(crate) fn source(&self) -> &UpstreamSource {
        &self.source
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who is asked now. Our own addresses never are.
    pub(crate) fn servers(&self, zone: &dyn Zone) -> Vec<SocketAddr> {
        self.refresh(zone).servers.clone()
    }

    /// Whether the host itself may have its questions passed on. Not where that leads back to the host's own resolver,
    /// which may have asked us: the question would go round.
    pub(crate) fn serves_the_host(&self, zone: &dyn Zone) -> bool {
        let state = self.refresh(zone);
        state.servers.iter().all(|server| !server.ip().is_loopback())
    }

    /// What is known already.
    pub(crate) fn known(&self, question: &Question, zone: &dyn Zone) -> Option<Reply> {
        // A change of upstreams forgets.
        drop(self.refresh(zone));
        self.cache.get(question)
    }

    /// Asks. Never fails: whoever cannot be asked makes a SERVFAIL.
    pub(crate) async fn ask(&self, question: &Question, zone: &dyn Zone) -> Reply {
        let Some(pool) = self.refresh(zone).pool.clone() else {
            return Reply::empty(ResponseCode::ServFail);
        };
        let began = Instant::now();
        let answer = tokio::time::timeout(PATIENCE, pool.send(request(question)).first_answer()).await;
        measure::forwarded(began.elapsed());
        let (reply, nothing_s) = match answer {
            Ok(Ok(response)) => {
                let message = response.into_message();
                let nothing = (message.response_code == ResponseCode::NXDomain).then_some(u32::MAX);
                let reply = Reply {
                    code: message.response_code,
                    authoritative: false,
                    answers: message.answers,
                    authorities: message.authorities,
                };
                (reply, nothing)
            }
            Ok(Err(NetError::Dns(DnsError::NoRecordsFound(nothing)))) => {
                let reply = Reply {
                    authorities: nothing.authorities.map(|a| a.to_vec()).unwrap_or_default(),
                    ..Reply::empty(nothing.response_code)
                };
                (reply, nothing.negative_ttl)
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "an upstream does not answer");
                return Reply::empty(ResponseCode::ServFail);
            }
            Err(_) => return Reply::empty(ResponseCode::ServFail),
        };
        self.cache.put(question, &reply, nothing_s);
        reply
    }

    /// The state, read again where the file changed.
    fn refresh(&self, zone: &dyn Zone) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if state.looked.is_some_and(|looked| looked.elapsed() < LOOK_EVERY) {
            return state;
        }
        let (first, stamp) = (state.looked.is_none(), self.source.stamp());
        state.looked = Some(Instant::now());
        if !first && stamp == state.stamp && !state.servers.is_empty() {
            return state;
        }
        state.stamp = stamp;
        let own: Vec<IpAddr> = zone
            .networks()
            .iter()
            .flat_map(|network| [network.gateway4().into(), network.gateway6().into()])
            .collect();
        let mut servers = self.source.read(&self.namespace);
        servers.retain(|server| !own.contains(&server.ip()));
        if first || servers != state.servers {
            if !first {
                tracing::info!(upstreams = ?servers, source = %self.source, "other upstreams for names");
            }
            state.pool = self.pool(&servers);
            state.servers = servers;
            self.cache.clear();
        }
        state
    }

    fn pool(&self, servers: &[SocketAddr]) -> Option<Pool> {
        if servers.is_empty() {
            return None;
        }
        let mut options = ResolverOpts::default();
        options.timeout = ATTEMPT;
        let configs = servers.iter().map(|server| {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                connection.port = server.port();
                connection
            });
            NameServerConfig::new(server.ip(), true, connections.to_vec())
        });
        let tls = TlsConfig::new().ok()?;
        let context = Arc::new(PoolContext::new(options, tls));
        let pool = NameServerPool::from_config(configs, context, InNamespace::new(self.namespace.clone()));
        Some(RetryDnsHandle::new(pool, 1))
    }
}

/// The question as an upstream gets it.
fn request(question: &Question) -> DnsRequest {
    let options = DnsRequestOptions::default();
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = question.checking_disabled;
    message.add_query(question.query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(options.edns_payload_len)
        .set_dnssec_ok(question.edns.is_some_and(|edns| edns.dnssec_ok));
    message.set_edns(edns);
    DnsRequest::new(message, options)
}
