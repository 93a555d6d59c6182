//! A TCP proxy whose connections can be cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub(crate) struct Proxy {
    cuts: watch::Sender<u64>,
    cut: Arc<AtomicUsize>,
}

impl Proxy {
    /// Listens on one port of the loopback interface and passes everything on to another.
    pub(crate) async fn start(port: u16, target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let (cuts, watched) = watch::channel(0);
        let cut = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&cut);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (mut watched, count) = (watched.clone(), Arc::clone(&count));
                watched.mark_unchanged();
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = watched.changed() => drop(count.fetch_add(1, Ordering::Relaxed)),
                    }
                });
            }
        });
        Self { cuts, cut }
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
