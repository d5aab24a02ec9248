//! The server of one network: who may ask, and how the answer gets back.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use offshoot_model::Network;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::forward::Forwarder;
use super::limits::{Place, Quota};
use super::measure::{self, Kind};
use super::ours::{Authority, Decision};
use super::question::{Judged, MAX_QUESTION, Question, judge};
use super::reply::{Reply, encode, udp_limit};
use super::sockets::{Bound, ListenError, listen};
use super::{Domain, PORT, Sight, Zone};
use crate::Namespace;

/// Questions that wait for upstreams: of one client, and of all networks. Each is a socket and, at worst, a message of
/// 64 KiB.
const WAITING_EACH: usize = 32;
const WAITING_ALL: usize = 128;
/// Connections: of one client, and of all networks.
const CONNECTIONS_EACH: usize = 8;
const CONNECTIONS_ALL: usize = 256;
/// How long a connection may stand still between two questions, and within one (RFC 7766 wants seconds).
const IDLE: Duration = Duration::from_secs(10);
/// How long a client may take to read its answer.
const WRITE: Duration = Duration::from_secs(5);
/// What a socket that fails is left alone for.
const PAUSE: Duration = Duration::from_millis(100);

/// What the servers of all networks share.
pub(crate) struct Common {
    pub(crate) domain: Domain,
    pub(crate) zone: Arc<dyn Zone>,
    pub(crate) forwarder: Forwarder,
    waiting: Arc<Quota>,
    connections: Arc<Quota>,
}

impl Common {
    pub(crate) fn new(domain: Domain, zone: Arc<dyn Zone>, forwarder: Forwarder) -> Self {
        Self {
            domain,
            zone,
            forwarder,
            waiting: Quota::new(WAITING_EACH, WAITING_ALL),
            connections: Quota::new(CONNECTIONS_EACH, CONNECTIONS_ALL),
        }
    }
}

/// A server that listens; ends when dropped.
pub(crate) struct Server {
    pub(crate) network: Arc<Network>,
    pub(crate) addresses: Vec<SocketAddr>,
    over: CancellationToken,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

impl Server {
    /// Listens on the network's gateway addresses.
    pub(crate) fn start(
        common: &Arc<Common>,
        namespace: &Namespace,
        network: Arc<Network>,
    ) -> Result<Self, ListenError> {
        let addresses = [IpAddr::V4(network.gateway4()), IpAddr::V6(network.gateway6())];
        let bound = addresses
            .map(|ip| listen(namespace, SocketAddr::new(ip, PORT)))
            .into_iter()
            .collect::<Result<Vec<Bound>, _>>()?;
        let over = CancellationToken::new();
        let mut addresses = Vec::new();
        for Bound { address, udp, tcp } in bound {
            addresses.push(address);
            let desk = Desk {
                common: Arc::clone(common),
                network: Arc::clone(&network),
                over: over.clone(),
            };
            tokio::spawn(desk.clone().serve_udp(Arc::new(udp)));
            tokio::spawn(desk.serve_tcp(tcp));
        }
        Ok(Self {
            network,
            addresses,
            over,
        })
    }
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    /// A machine of the network.
    Guest,
    /// The host itself.
    Host,
}

/// What becomes of a client's bytes.
enum Fate {
    Silence,
    Answer(Vec<u8>),
    /// Somebody else has to be asked.
    Wait(Box<Question>, Place),
}

/// Where questions of one network are answered.
#[derive(Clone)]
struct Desk {
    common: Arc<Common>,
    network: Arc<Network>,
    over: CancellationToken,
}

impl Desk {
    /// Who asks from this address; nobody who may, where it is neither the network's nor the host's.
    fn client(&self, from: IpAddr) -> Option<Client> {
        let of_host = |network: &Network| {
            from == IpAddr::V4(network.gateway4()) || from == IpAddr::V6(network.gateway6())
        };
        if from.is_loopback() || of_host(&self.network) {
            return Some(Client::Host);
        }
        let of_network = match from {
            IpAddr::V4(v4) => self.network.ipv4.contains(&v4),
            IpAddr::V6(v6) => self.network.ipv6.contains(&v6),
        };
        if of_network {
            return Some(Client::Guest);
        }
        let networks = self.common.zone.networks();
        networks
            .iter()
            .any(|network| of_host(network))
            .then_some(Client::Host)
    }

    /// Answers at once, or says who has to wait.
    fn receive(&self, bytes: &[u8], client: Client, from: IpAddr, limit: impl Fn(&Question) -> u16) -> Fate {
        let question = match judge(bytes) {
            // Whoever hears nothing asks again, in a moment or two.
            Judged::Question(_) if !self.common.zone.is_ready() => return Fate::Silence,
            Judged::Question(question) => question,
            Judged::Refused(answer) => return Fate::Answer(answer),
            Judged::Silence => return Fate::Silence,
        };
        let answer = |reply: &Reply, kind| {
            measure::answered(kind, reply.code);
            encode(&question, reply, limit(&question)).map_or(Fate::Silence, Fate::Answer)
        };
        let (zone, forwarder) = (&*self.common.zone, &self.common.forwarder);
        let authority = Authority {
            domain: &self.common.domain,
            zone,
            network: &self.network,
            sight: match client {
                Client::Guest => Sight::Network(&self.network.name),
                Client::Host => Sight::Everything,
            },
        };
        if let Decision::Say(reply, kind) = authority.decide(&question.query) {
            return answer(&reply, kind);
        }
        if !question.recursion || (client == Client::Host && !forwarder.serves_the_host(zone)) {
            return answer(&Reply::empty(ResponseCode::Refused), Kind::Other);
        }
        if let Some(reply) = forwarder.known(&question, zone) {
            return answer(&reply, Kind::Cached);
        }
        match self.common.waiting.take(from) {
            Some(place) => Fate::Wait(question, place),
            None => answer(&Reply::empty(ResponseCode::ServFail), Kind::Forwarded),
        }
    }

    /// Asks an upstream; nothing when the server ended meanwhile.
    async fn wait(&self, question: &Question, limit: u16) -> Option<Vec<u8>> {
        let asking = self.common.forwarder.ask(question, &*self.common.zone);
        let reply = self.over.run_until_cancelled(asking).await?;
        measure::answered(Kind::Forwarded, reply.code);
        encode(question, &reply, limit)
    }

    async fn serve_udp(self, socket: Arc<UdpSocket>) {
        // One more than a question may have, so that a longer one is seen to be longer.
        let mut buffer = [0; MAX_QUESTION + 1];
        loop {
            let received = self.over.run_until_cancelled(socket.recv_from(&mut buffer)).await;
            let (length, from) = match received {
                None => return,
                Some(Ok(received)) => received,
                Some(Err(error)) => {
                    tracing::debug!(%error, "cannot receive questions");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Some(client) = self.client(from.ip()) else {
                measure::ignored();
                continue;
            };
            match self.receive(&buffer[..length], client, from.ip(), udp_limit) {
                Fate::Silence => {}
                Fate::Answer(answer) => send(&socket, &answer, from).await,
                Fate::Wait(question, place) => {
                    let (desk, socket) = (self.clone(), Arc::clone(&socket));
                    tokio::spawn(async move {
                        if let Some(answer) = desk.wait(&question, udp_limit(&question)).await {
                            send(&socket, &answer, from).await;
                        }
                        drop(place);
                    });
                }
            }
        }
    }

    async fn serve_tcp(self, listener: TcpListener) {
        loop {
            let accepted = self.over.run_until_cancelled(listener.accept()).await;
            let (stream, from) = match accepted {
                None => return,
                Some(Ok(accepted)) => accepted,
                Some(Err(error)) => {
                    tracing::debug!(%error, "cannot accept connections");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Some(client) = self.client(from.ip()) else {
                measure::ignored();
                continue;
            };
            // One too many is closed at once.
            let Some(place) = self.common.connections.take(from.ip()) else {
                measure::ignored();
                continue;
            };
            let desk = self.clone();
            tokio::spawn(async move {
                let over = desk.over.clone();
                let talk = desk.talk(stream, client, from.ip());
                if let Some(Err(error)) = over.run_until_cancelled(talk).await {
                    tracing::trace!(%error, "a connection ended");
                }
                drop(place);
            });
        }
    }

    /// One connection: a question after the other, each with its length before it (RFC 1035, 4.2.2).
    async fn talk(self, mut stream: TcpStream, client: Client, from: IpAddr) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let whole = |_: &Question| u16::MAX;
        loop {
            let length = usize::from(timeout(IDLE, stream.read_u16()).await??);
            if length > MAX_QUESTION {
                return Ok(());
            }
            let mut bytes = vec![0; length];
            timeout(IDLE, stream.read_exact(&mut bytes)).await??;
            let answer = match self.receive(&bytes, client, from, whole) {
                Fate::Silence => return Ok(()),
                Fate::Answer(answer) => answer,
                Fate::Wait(question, place) => {
                    let answer = self.wait(&question, u16::MAX).await;
                    drop(place);
                    match answer {
                        Some(answer) => answer,
                        None => return Ok(()),
                    }
                }
            };
            let Ok(length) = u16::try_from(answer.len()) else {
                return Ok(());
            };
            let message = [&length.to_be_bytes(), &answer[..]].concat();
            timeout(WRITE, stream.write_all(&message)).await??;
        }
    }
}

async fn send(socket: &UdpSocket, answer: &[u8], to: SocketAddr) {
    if let Err(error) = socket.send_to(answer, to).await {
        tracing::trace!(%error, %to, "cannot send an answer");
    }
}
