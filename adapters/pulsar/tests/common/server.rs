//! A broker of a test's own, by the project's own commands, and a proxy before it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anybroker_testing::OwnServer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub(crate) struct Server {
    own: OwnServer,
    proxy: SocketAddr,
    pub(crate) url: String,
}

impl Server {
    /// `None` after saying why there is no server.
    pub(crate) fn start(name: &str, proxy: &Proxy) -> Option<Self> {
        super::common::url()?;
        let own = OwnServer::start("pulsar", name)?;
        let url = own.url.clone();
        Some(Self { own, proxy: proxy.address, url })
    }

    pub(crate) async fn does(&self, verb: &'static str) {
        self.own.does(verb).await;
    }

    /// Where clients connect to.
    pub(crate) fn address(&self) -> &str {
        self.url.split("://").nth(1).unwrap().split('?').next().unwrap()
    }

    /// For clients whose connections go through the proxy: a standalone broker sends them through the address that they came
    /// by, whatever it advertises (`proxy_through_service_url`, TopicLookupBase.java).
    pub(crate) fn proxied_url(&self) -> String {
        self.url.replacen(self.address(), &self.proxy.to_string(), 1)
    }
}

/// A TCP proxy whose connections can be cut.
pub(crate) struct Proxy {
    address: SocketAddr,
    target: watch::Sender<Option<String>>,
    cuts: watch::Sender<u64>,
    cut: Arc<AtomicUsize>,
}

impl Proxy {
    /// Passes connections on once there is a target.
    pub(crate) async fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (target, cuts, cut) = (watch::Sender::new(None), watch::Sender::new(0), Arc::new(AtomicUsize::new(0)));
        let (targets, watched, count) = (target.subscribe(), cuts.subscribe(), Arc::clone(&cut));
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (mut targets, mut watched, count) = (targets.clone(), watched.clone(), Arc::clone(&count));
                watched.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(target) = targets.wait_for(Option::is_some).await.map(|found| found.clone()) else { return };
                    let Ok(mut server) = TcpStream::connect(target.unwrap_or_default()).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = watched.changed() => drop(count.fetch_add(1, Ordering::Relaxed)),
                    }
                });
            }
        });
        Self { address, target, cuts, cut }
    }

    /// Where it listens.
    #[allow(dead_code, reason = "each test binary uses its share")]
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn to(&self, target: &str) {
        self.target.send_replace(Some(target.to_owned()));
    }

    /// Cuts every connection that is open.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|number| *number += 1);
    }

    /// How many connections were cut.
    pub(crate) fn connections_cut(&self) -> usize {
        self.cut.load(Ordering::Relaxed)
    }
}
