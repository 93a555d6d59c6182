//! All connections of one endpoint: one to each broker that serves a topic of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anybroker_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use pulsar::proto::{self, BaseCommand, base_command::Type, command_lookup_topic_response::LookupType};

use crate::config::Settings;
use crate::error::refused;
use crate::wire::{Conn, Hello, command};

/// A broker that only redirects is not followed further.
const REDIRECTS: usize = 20;

/// Where a connection goes: the address, and the broker behind it where it is a proxy.
type Way = (String, Option<String>);

pub(crate) struct Link {
    settings: Settings,
    open: tokio::sync::Mutex<HashMap<Way, Arc<Conn>>>,
    /// For closing: those that are open, whoever is opening another one.
    all: Mutex<Vec<Arc<Conn>>>,
    next_host: AtomicUsize,
    is_closed: AtomicBool,
}

impl Link {
    pub(crate) async fn connect(settings: &Settings) -> Result<(Arc<Self>, Hello)> {
        let link = Arc::new(Self {
            settings: settings.clone(),
            open: tokio::sync::Mutex::default(),
            all: Mutex::default(),
            next_host: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
        });
        settings.check_login().await?;
        let mut last = Error::new(ErrorKind::ConfigInvalid, "connect", "no host");
        for host in &settings.hosts {
            match Conn::open(settings, host, None).await {
                Ok((conn, hello)) => {
                    link.all.lock().push(Arc::clone(&conn));
                    link.open.lock().await.insert((host.clone(), None), conn);
                    return Ok((link, hello));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Whether that ends a subscription: nothing will change by itself.
    pub(crate) fn is_final(&self, kind: ErrorKind) -> bool {
        match kind {
            ErrorKind::Unauthenticated => !self.settings.may_be_let_in(),
            ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::AlreadyExists
            | ErrorKind::ConfigInvalid
            | ErrorKind::Unsupported
            | ErrorKind::Closed => true,
            _ => false,
        }
    }

    /// A connection to any of the configured hosts.
    async fn base(&self) -> Result<Arc<Conn>> {
        let hosts = &self.settings.hosts;
        let mut last = None;
        for _ in 0..hosts.len() {
            let at = self.next_host.load(Ordering::Relaxed) % hosts.len();
            match self.to((hosts[at].clone(), None)).await {
                Ok(conn) => return Ok(conn),
                Err(error) => {
                    self.next_host.store(at + 1, Ordering::Relaxed);
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::new(ErrorKind::Unavailable, "connect", "no host")))
    }

    async fn to(&self, way: Way) -> Result<Arc<Conn>> {
        let mut open = self.open.lock().await;
        if let Some(conn) = open.get(&way).filter(|conn| !conn.is_closed()) {
            return Ok(Arc::clone(conn));
        }
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::closed("connect"));
        }
        let (conn, _) = Conn::open(&self.settings, &way.0, way.1.clone()).await?;
        open.insert(way, Arc::clone(&conn));
        let mut all = self.all.lock();
        all.retain(|conn| !conn.is_closed());
        all.push(Arc::clone(&conn));
        drop(all);
        if self.is_closed.load(Ordering::Acquire) {
            conn.close();
        }
        Ok(conn)
    }

    /// A connection to the broker that serves `topic`. The caller bounds the time.
    pub(crate) async fn serving(&self, operation: &'static str, topic: &str) -> Result<Arc<Conn>> {
        let mut conn = self.base().await?;
        let mut is_authoritative = false;
        for _ in 0..REDIRECTS {
            let look = |request_id| BaseCommand {
                lookup_topic: Some(proto::CommandLookupTopic {
                    topic: topic.to_owned(),
                    request_id,
                    authoritative: Some(is_authoritative),
                    ..Default::default()
                }),
                ..command(Type::Lookup)
            };
            let answer = conn.ask(operation, look).await?;
            let Some(found) = answer.lookup_topic_response else {
                return Err(Error::new(ErrorKind::Unexpected, operation, "a lookup was answered by something else"));
            };
            if let Some(code) = found.error {
                return Err(refused(operation, code, found.message()));
            }
            let url = if self.settings.tls { found.broker_service_url_tls() } else { found.broker_service_url() };
            let Some((_, address)) = url.split_once("://") else {
                let text = "the broker that serves the topic has no address of this kind (encrypted or not)";
                return Err(Error::new(ErrorKind::Unavailable, operation, text));
            };
            let address = address.trim_end_matches('/').to_owned();
            let way = if found.proxy_through_service_url() {
                let hosts = &self.settings.hosts;
                (hosts[self.next_host.load(Ordering::Relaxed) % hosts.len()].clone(), Some(address))
            } else {
                (address, None)
            };
            conn = self.to(way).await?;
            if found.response() != LookupType::Redirect {
                return Ok(conn);
            }
            is_authoritative = found.authoritative();
        }
        Err(Error::new(ErrorKind::Unavailable, operation, "the brokers redirect without an end"))
    }

    /// Ends all connections.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        for conn in self.all.lock().drain(..) {
            conn.close();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}
