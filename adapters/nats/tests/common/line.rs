//! A connection to the server that can stand still, be slow, or be cut.

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{routes_of, url_through};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Passes everything on until it is told to stand still; nobody is told.
pub(crate) struct Line {
    /// The server, through this line.
    pub(crate) url: String,
    stands: Arc<watch::Sender<bool>>,
    late: Arc<watch::Sender<Duration>>,
    cuts: Arc<watch::Sender<u32>>,
}

impl Line {
    pub(crate) async fn to(url: &str) -> Self {
        let upstream = routes_of(url).unwrap().remove(0).upstream;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = url_through(url, &[listener.local_addr().unwrap()]);
        let stands = Arc::new(watch::Sender::new(false));
        let late = Arc::new(watch::Sender::new(Duration::ZERO));
        let cuts = Arc::new(watch::Sender::new(0));
        let (told, lateness, cut) = (Arc::clone(&stands), Arc::clone(&late), Arc::clone(&cuts));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&upstream).await.unwrap();
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                let prompt = watch::Sender::new(Duration::ZERO).subscribe();
                for passing in [
                    tokio::spawn(pass(from_client, to_server, told.subscribe(), prompt)),
                    tokio::spawn(pass(from_server, to_client, told.subscribe(), lateness.subscribe())),
                ] {
                    let mut cut = cut.subscribe();
                    tokio::spawn(async move {
                        if cut.changed().await.is_ok() {
                            passing.abort();
                        }
                    });
                }
            }
        });
        Self { url, stands, late, cuts }
    }

    /// Each piece that the server says is late by that from now on.
    pub(crate) fn answer_late(&self, by: Duration) {
        self.late.send_replace(by);
    }

    pub(crate) fn stand_still(&self) {
        self.stands.send_replace(true);
    }

    pub(crate) fn go_on(&self) {
        self.stands.send_replace(false);
    }

    /// Ends all connections, with what is in them; new ones are passed on.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
        self.go_on();
    }
}

async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut stands: watch::Receiver<bool>,
    late: watch::Receiver<Duration>,
) {
    let mut piece = vec![0; 16_384];
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        // That it is late is what the line is for.
        let by = *late.borrow();
        tokio::time::sleep(by).await;
        // An error is the end of the test.
        if stands.wait_for(|stands| !stands).await.is_err() || to.write_all(&piece[..count]).await.is_err() {
            return;
        }
    }
}
