//! Faults of connections and of the server, each of them an event of the history: what was in flight on a connection
//! that was hit may come twice, and nothing else.

mod address;
mod apart;
mod http;
#[cfg(test)]
mod http_tests;
mod plan;
mod proxy;
mod pump;
mod schedule;
#[cfg(test)]
mod tests;
mod trial;
#[cfg(test)]
mod trial_tests;
mod watched;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anybroker_core::{Error, ErrorKind};
use async_trait::async_trait;
use parking_lot::Mutex;

use crate::case::{Breach, Proof};
use crate::client::Client;
use crate::env::Env;
use crate::history::What;
use crate::{Harness, HttpService, sweep};
pub use address::{routes_of, url_through};
pub(crate) use http::Answers;
use http::HttpProxy;
pub(crate) use plan::{Kind, Planned, plan};
use proxy::Way;
pub(crate) use proxy::{End, Proxy};
pub(crate) use schedule::{Schedule, Shrinking};
pub use schedule::{ScheduleReport, Shrunk};
pub(crate) use trial::{
    Disturbance, HEALED_TIMEOUT, HELD_BACK, Trial, is_publishing_in_a_fault, is_settling_in_a_fault,
};
pub(crate) use watched::Watched;

/// An address of the server that a proxy can stand in front of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where the proxy has to listen, because the server tells its clients to come there (Kafka's and Pulsar's advertised
    /// listeners). `None`: anywhere; each client then has a proxy of its own.
    pub listen: Option<SocketAddr>,
    /// The server's own `host:port`.
    pub upstream: String,
}

impl Route {
    /// A proxy may listen anywhere.
    pub fn to(upstream: impl Into<String>) -> Self {
        Self { listen: None, upstream: upstream.into() }
    }

    /// The server advertises `listen`, and listens on `upstream`.
    pub fn advertised(listen: SocketAddr, upstream: impl Into<String>) -> Self {
        Self { listen: Some(listen), upstream: upstream.into() }
    }
}

impl std::str::FromStr for Route {
    type Err = String;

    /// `LISTEN=UPSTREAM` for an advertised address, `UPSTREAM` otherwise.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None => Ok(Self::to(text)),
            Some((listen, upstream)) => {
                let listen = listen.parse().map_err(|_| format!("`{listen}` is no address and port to listen on"))?;
                Ok(Self::advertised(listen, upstream))
            }
        }
    }
}

/// The process of the server, where a harness has it in its hands. Each call returns when it is done; an error is the
/// text of what went wrong.
#[async_trait]
pub trait ServerControl: Send + Sync {
    /// Ends it without a warning (SIGKILL). Its data stay.
    async fn kill(&self) -> Result<(), String>;

    /// Starts it again on the same ports with the same data, and waits until it serves clients.
    async fn restart(&self) -> Result<(), String>;

    /// Freezes it (SIGSTOP): connections stay open and nothing is answered.
    async fn pause(&self) -> Result<(), String>;

    /// Lets it go on.
    async fn resume(&self) -> Result<(), String>;

    /// Takes from it the room for new messages, as a full disk or a quota that is used up does. It goes on serving clients.
    /// Returns when new messages are refused or held.
    async fn fill(&self) -> Result<(), String> {
        Err("the server cannot be told to have no room".into())
    }

    /// Gives the room back. A server that has room stays as it is.
    async fn relieve(&self) -> Result<(), String> {
        Err("the server cannot be told to have no room".into())
    }

    /// Takes back what lets the suite's clients in (a password, a permission), also from those that are connected.
    async fn lock_out(&self) -> Result<(), String> {
        Err("the server cannot be told to lock clients out".into())
    }

    /// Lets them in again. A server that has locked out nobody stays as it is.
    async fn let_in(&self) -> Result<(), String> {
        Err("the server cannot be told to lock clients out".into())
    }

    /// How many nodes its cluster has, which can be disturbed one by one; they are numbered from 1. One is no cluster, and of two no
    /// majority is left without one.
    ///
    /// # Errors
    /// Why there are none.
    fn nodes(&self) -> Result<u32, String> {
        Err(NO_CLUSTER.into())
    }

    /// Ends that node without a warning (SIGKILL). Its data stay.
    async fn kill_node(&self, node: u32) -> Result<(), String> {
        let _ = node;
        Err(NO_CLUSTER.into())
    }

    /// Starts a node that was killed again with its data, or ends one that runs in an orderly way and starts it again. Returns when this
    /// node serves clients. Several may be told so at once: some serve only when there is a majority of them.
    async fn restart_node(&self, node: u32) -> Result<(), String> {
        let _ = node;
        Err(NO_CLUSTER.into())
    }

    /// Freezes that node (SIGSTOP).
    async fn pause_node(&self, node: u32) -> Result<(), String> {
        let _ = node;
        Err(NO_CLUSTER.into())
    }

    /// Lets it go on, and waits until it serves clients again.
    async fn resume_node(&self, node: u32) -> Result<(), String> {
        let _ = node;
        Err(NO_CLUSTER.into())
    }
}

const NO_CLUSTER: &str = "the server is not known to be a cluster";

/// The proxies of one client, or of all where the server advertises one address.
pub(crate) struct Line {
    proxies: Vec<Proxy>,
    /// Behind them, where requests are to be answered in the server's place.
    answerers: Vec<HttpProxy>,
    clients: Mutex<Vec<u32>>,
}

impl Line {
    fn start(routes: &[Route], answering: Option<&Answering>) -> Proof<Arc<Self>> {
        let (mut proxies, mut answerers) = (Vec::new(), Vec::new());
        for Route { listen, upstream } in routes {
            let no_proxy = |error| Breach::NotRun(format!("no proxy can listen in front of {upstream}: {error}"));
            let mut behind = upstream.clone();
            if let Some(Answering { service, count }) = answering {
                let started = HttpProxy::start(behind, Arc::clone(service), Arc::clone(count));
                let answerer = started.map_err(no_proxy)?;
                behind = answerer.address().to_string();
                answerers.push(answerer);
            }
            proxies.push(Proxy::start(*listen, behind).map_err(no_proxy)?);
        }
        Ok(Arc::new(Self { proxies, answerers, clients: Mutex::default() }))
    }

    /// A client whose connections go through it.
    pub(crate) async fn client<'e>(&self, env: &'e Env) -> Proof<Client<'e>> {
        let addresses: Vec<_> = self.proxies.iter().map(Proxy::address).collect();
        let bus = env.bounded("connect", env.harness.connect_through(&addresses)).await??;
        let client = env.wrap(bus);
        self.clients.lock().push(client.number());
        Ok(client)
    }

    fn sum(&self, of: impl Fn(&Proxy) -> u64) -> u64 {
        self.proxies.iter().map(of).sum()
    }

    fn set(&self, up: Way, down: Way) {
        self.proxies.iter().for_each(|proxy| proxy.set(up, down));
    }

    fn end(&self, how: End) {
        self.proxies.iter().for_each(|proxy| proxy.end(how));
    }

    fn answer(&self, answers: Answers) {
        self.answerers.iter().for_each(|answerer| answerer.set(answers));
    }

    fn refuse(&self, refuses: bool) {
        self.proxies.iter().for_each(|proxy| proxy.refuse(refuses));
    }

    /// Everything that goes through it meets this fault, from now until it is over.
    pub(crate) async fn suffer(&self, env: &Env, planned: &Planned) {
        // The fault is that time goes by.
        self.suffer_during(env, planned.kind, tokio::time::sleep(planned.lasts)).await;
    }

    /// The same for as long as that goes on.
    pub(crate) async fn suffer_during<T>(&self, env: &Env, kind: Kind, meanwhile: impl Future<Output = T>) -> T {
        let clients = self.clients.lock().clone();
        let open = self.proxies.iter().map(Proxy::open).sum::<usize>() as u64;
        let (accepted, bytes) = (self.sum(Proxy::accepted), self.sum(Proxy::bytes));
        let fault = env.history.number();
        env.history.record(0, What::FaultBegin { fault, kind: kind.to_string(), clients, connections: open });
        self.begin(kind);
        let seen = meanwhile.await;
        self.over(kind);
        let connections = open + self.sum(Proxy::accepted) - accepted;
        let bytes = self.sum(Proxy::bytes) - bytes;
        env.history.record(0, What::FaultEnd { fault, connections, bytes });
        seen
    }

    fn begin(&self, kind: Kind) {
        match kind {
            Kind::Cut => {
                self.refuse(true);
                self.end(End::Reset);
            }
            Kind::Finish => {
                self.refuse(true);
                self.end(End::Finish);
            }
            Kind::HalfOpen => self.end(End::HalfOpen),
            Kind::BlackHole => self.set(Way::Hold, Way::Hold),
            Kind::DeafServer => self.set(Way::Hold, Way::Pass),
            Kind::DropAnswers => self.set(Way::Pass, Way::Lose),
            Kind::DropRequests => self.set(Way::Lose, Way::Pass),
            Kind::Slow { delay, bytes_per_second } => {
                let way = Way::Slow { delay, bytes_per_second };
                self.set(way, way);
            }
            Kind::CutAfter { bytes, answers } => match answers {
                false => self.set(Way::CutAfter(bytes), Way::Pass),
                true => self.set(Way::Pass, Way::CutAfter(bytes)),
            },
            Kind::Answered(answers) => self.answer(answers),
        }
    }

    fn over(&self, kind: Kind) {
        match kind {
            Kind::Cut | Kind::Finish => self.refuse(false),
            Kind::Answered(_) => self.answer(Answers::OfTheServer),
            _ => self.set(Way::Pass, Way::Pass),
        }
    }
}

/// How the clients of a case come to be behind proxies.
pub(crate) struct Network<'e> {
    env: &'e Env,
    routes: Vec<Route>,
    answering: Option<Answering>,
    /// The only line, where the server advertises its address.
    shared: Option<Arc<Line>>,
}

/// How requests are answered in the place of the server, and how many were.
struct Answering {
    service: Arc<dyn HttpService>,
    count: Arc<AtomicU64>,
}

impl<'e> Network<'e> {
    /// Finds out how, and that no client walks round it.
    pub(crate) async fn open(env: &'e Env) -> Proof<Self> {
        Self::open_with(env, None).await
    }

    /// The same, where requests can be answered in the place of the server; not run where the endpoint is not spoken to so.
    pub(crate) async fn open_to_answer(env: &'e Env) -> Proof<Self> {
        let service = env.harness.http().map_err(Breach::NotRun)?;
        http::check(service.as_ref()).map_err(Breach::Failed)?;
        Self::open_with(env, Some(Answering { service, count: Arc::default() })).await
    }

    async fn open_with(env: &'e Env, answering: Option<Answering>) -> Proof<Self> {
        let routes = env.harness.routes().map_err(Breach::NotRun)?;
        let shared = match routes.iter().any(|route| route.listen.is_some()) {
            true => Some(Line::start(&routes, answering.as_ref())?),
            false => None,
        };
        let network = Self { env, routes, answering, shared };
        network.is_on_the_way().await?;
        Ok(network)
    }

    /// A line for one client.
    pub(crate) fn line(&self) -> Proof<Arc<Line>> {
        match &self.shared {
            Some(line) => Ok(Arc::clone(line)),
            None => Line::start(&self.routes, self.answering.as_ref()),
        }
    }

    /// How many requests were answered in the place of the server so far.
    pub(crate) fn answered(&self) -> u64 {
        self.answering.as_ref().map_or(0, |answering| answering.count.load(Ordering::Relaxed))
    }

    /// With everything held back nothing can be published: otherwise the endpoint has told the client of another address.
    async fn is_on_the_way(&self) -> Proof {
        let line = self.line()?;
        let client = line.client(self.env).await?;
        let destination = self.env.destination("probe");
        let spec = self.env.spec(&destination, &self.env.group("probe"));
        client.subscribe(spec).await?.close().await?;
        line.set(Way::Hold, Way::Hold);
        let held = client.publish_within(vec![client.message(&destination, "k")], PROBE).await?.remove(0);
        line.set(Way::Pass, Way::Pass);
        if held.is_ok() {
            return Err(Breach::NotRun(
                "the endpoint advertises addresses of its own, so that its clients walk round the proxy: name an advertised \
                 address that the proxy can listen on"
                    .into(),
            ));
        }
        client.close().await
    }
}

/// Whether a harness's clients can be led through proxies, as the cases find out for themselves. It creates a destination of its
/// own, and deletes it.
///
/// # Errors
/// `Unsupported` with the reason why they cannot; what connecting without a proxy says.
pub async fn check_proxies(harness: Arc<dyn Harness>) -> anybroker_core::Result<()> {
    let bus = harness.connect().await?;
    let record = Arc::new(bus.capabilities().clone());
    bus.close(harness.patience()).await?;
    let env = Env::new(harness, record, format!("{}.0", sweep::run_id()), 0);
    let found = Network::open(&env).await.map(drop);
    let cleaned = env.clean_up(false).await;
    match found {
        Ok(()) => cleaned,
        Err(Breach::NotRun(why) | Breach::Failed(why) | Breach::Inconclusive(why)) => {
            Err(Error::new(ErrorKind::Unsupported, "conform", format!("behind a proxy: {why}")))
        }
    }
}

/// How long the probe waits for a confirm that cannot come.
const PROBE: Duration = Duration::from_millis(1_000);

/// The fault by which the server's process ends, with what it has not written.
pub(crate) const KILLED: &str = "server killed";

/// How the faults of some nodes of a cluster begin, such as `nodes 1 and 3 killed`. Others lead then what those led.
pub(crate) const NODES: &str = "node";

/// A fault of the server, which hits every client and lasts as long as what goes on meanwhile. It is over also when that fails.
pub(crate) async fn of_server(
    env: &Env,
    kind: &str,
    begin: impl Future<Output = Result<(), String>>,
    meanwhile: impl Future<Output = Proof>,
    over: impl Future<Output = Result<(), String>>,
) -> Proof {
    let fault = env.history.number();
    let clients = (0..env.clients()).collect();
    env.history.record(0, What::FaultBegin { fault, kind: kind.to_owned(), clients, connections: 0 });
    begin.await.map_err(Breach::NotRun)?;
    let seen = meanwhile.await;
    over.await.map_err(Breach::Failed)?;
    env.history.record(0, What::FaultEnd { fault, connections: 0, bytes: 0 });
    seen
}
