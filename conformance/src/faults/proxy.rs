//! A TCP proxy that can be told to lose, hold, slow down and cut what goes through it. It needs no privileges, and it is
//! the same for every broker that is spoken to over TCP.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::apart::Listening;
use super::pump::{self, Counted};

/// What becomes of the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Way {
    /// They are passed on.
    #[default]
    Pass,
    /// They are kept until it passes again, as a network that retransmits does.
    Hold,
    /// They are lost. The connection cannot go on after that, and ends with RST when bytes pass again.
    Lose,
    /// Each piece is late by so much, and no more goes through in a second than that.
    Slow {
        /// How late a piece is.
        delay: Duration,
        /// How many bytes go through in a second; 0 for as many as there are.
        bytes_per_second: u32,
    },
    /// So many bytes of each connection pass, then it is cut (RST).
    CutAfter(u64),
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both sides see a reset.
    Reset,
    /// Both sides see an orderly end.
    Finish,
    /// The server sees a reset; the client sees nothing, and whatever it sends is swallowed.
    HalfOpen,
}

/// What the proxy does now.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Weather {
    /// Counts its changes.
    pub(super) number: u64,
    /// From the client to the server.
    pub(super) up: Way,
    /// From the server to the client.
    pub(super) down: Way,
    /// New connections are reset.
    refuses: bool,
    /// How connections that are older than this number end, if they do.
    end: Option<(u64, End)>,
}

/// A listener in front of one address of the server. It ends with all its connections when it is dropped.
pub(crate) struct Proxy {
    listening: Listening,
    shared: Arc<Shared>,
}

struct Shared {
    weather: watch::Sender<Weather>,
    open: AtomicUsize,
    accepted: AtomicU64,
    /// Bytes that went through or were to, both directions.
    bytes: AtomicU64,
}

impl Proxy {
    /// Listens on `listen`, or on any free port of the loopback interface, and passes everything on to `upstream`.
    pub(crate) fn start(listen: Option<SocketAddr>, upstream: String) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            weather: watch::Sender::default(),
            open: AtomicUsize::new(0),
            accepted: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        let listening = Listening::start(listen.unwrap_or((Ipv4Addr::LOCALHOST, 0).into()), move |client| {
            accepting.accepted.fetch_add(1, Ordering::Relaxed);
            serve(client, upstream.clone(), Arc::clone(&accepting))
        })?;
        Ok(Self { listening, shared })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    /// How many connections are open through it.
    pub(crate) fn open(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// How many connections it has taken so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// How many bytes came to it so far, in both directions.
    pub(crate) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Changes what becomes of the bytes from now on, of old and new connections.
    pub(crate) fn set(&self, up: Way, down: Way) {
        self.shared.weather.send_modify(|weather| {
            weather.number += 1;
            (weather.up, weather.down) = (up, down);
        });
    }

    /// Whether new connections are reset.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.shared.weather.send_modify(|weather| weather.refuses = refuses);
    }

    /// Ends every connection that is open.
    pub(crate) fn end(&self, how: End) {
        self.shared.weather.send_modify(|weather| {
            weather.number += 1;
            weather.end = Some((weather.number, how));
        });
    }
}

/// One connection.
async fn serve(client: TcpStream, upstream: String, shared: Arc<Shared>) {
    let mut weather = shared.weather.subscribe();
    let (born, refuses) = {
        let now = weather.borrow_and_update();
        (now.number, now.refuses)
    };
    if refuses {
        return reset(&client);
    }
    shared.open.fetch_add(1, Ordering::Relaxed);
    let _open = Open(Arc::clone(&shared));
    let Ok(server) = TcpStream::connect(&upstream).await else {
        return reset(&client);
    };
    // Small frames must not wait for each other here.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    pass(client, server, weather, born, &shared).await;
}

async fn pass(
    mut client: TcpStream,
    mut server: TcpStream,
    weather: watch::Receiver<Weather>,
    born: u64,
    shared: &Shared,
) {
    let mut watched = weather.clone();
    let (since, how) = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        let up = pump::run(Counted::new(from_client, &shared.bytes), to_server, weather.clone(), |now| now.up);
        let down = pump::run(Counted::new(from_server, &shared.bytes), to_client, weather, |now| now.down);
        tokio::select! {
            passed = async { tokio::try_join!(up, down) } => match passed {
                Ok(_) => return,
                Err(pump::Broken) => (0, End::Reset),
            },
            told = told_to_end(&mut watched, born) => told,
        }
    };
    match how {
        End::Finish => {}
        End::Reset => {
            reset(&client);
            reset(&server);
        }
        End::HalfOpen => {
            reset(&server);
            drop(server);
            swallow(&mut client, &mut watched, since).await;
            reset(&client);
        }
    }
}

/// Waits until connections of this age are to end, and answers since which weather.
async fn told_to_end(weather: &mut watch::Receiver<Weather>, born: u64) -> (u64, End) {
    loop {
        if let Some((number, how)) = weather.borrow_and_update().end
            && number > born
        {
            return (number, how);
        }
        if weather.changed().await.is_err() {
            return (0, End::Reset);
        }
    }
}

/// Takes what the client sends and answers nothing, until the weather is another one or the client goes.
async fn swallow(client: &mut TcpStream, weather: &mut watch::Receiver<Weather>, since: u64) {
    let mut bytes = [0; 4_096];
    while weather.borrow_and_update().number == since {
        tokio::select! {
            read = tokio::io::AsyncReadExt::read(client, &mut bytes) => match read {
                Ok(count) if count > 0 => {}
                _ => return,
            },
            changed = weather.changed() => if changed.is_err() { return },
        }
    }
}

fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
