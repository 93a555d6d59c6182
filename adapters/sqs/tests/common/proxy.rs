//! A TCP proxy whose connections can be cut.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub(crate) struct Proxy {
    address: SocketAddr,
    cuts: watch::Sender<u64>,
    cut: Arc<AtomicUsize>,
}

impl Proxy {
    /// Passes everything on to `target`.
    pub(crate) async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cuts, watched) = watch::channel(0);
        let cut = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&cut);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (target, mut watched, count) = (target.clone(), watched.clone(), Arc::clone(&count));
                watched.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(&target).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = watched.changed() => drop(count.fetch_add(1, Ordering::Relaxed)),
                    }
                });
            }
        });
        Self { address, cuts, cut }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
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
