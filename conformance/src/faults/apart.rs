//! The threads of the proxies, which are not those of the clients that go through them.
//!
//! A client that blocks its thread, such as one of librdkafka that is closed by being dropped, waits for what a proxy has to pass on. On
//! the same threads both would stand still for ever, which no server is to blame for.

use std::io;
use std::net::SocketAddr;
use std::sync::{LazyLock, mpsc};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let built = Builder::new_multi_thread().worker_threads(2).thread_name("proxies").enable_all().build();
    built.expect("a process that runs tests may start two threads")
});

/// How long the end of a listener is waited for. Nothing blocks its threads, so that this is never used up.
const ENDS: Duration = Duration::from_secs(5);

/// A listener on those threads. Dropped, it ends with all its connections, and its address is free.
pub(super) struct Listening {
    address: SocketAddr,
    task: JoinHandle<()>,
    gone: Mutex<mpsc::Receiver<()>>,
}

impl Listening {
    /// Serves every connection that comes to `address`.
    pub(super) fn start<F>(address: SocketAddr, serve: impl FnMut(TcpStream) -> F + Send + 'static) -> io::Result<Self>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let _within = RUNTIME.enter();
        let listener = TcpListener::from_std(listener)?;
        let (end, gone) = mpsc::channel();
        let task = RUNTIME.spawn(async move {
            // Dropped after the listener, also when the task is aborted.
            let _end: mpsc::Sender<()> = end;
            listen(listener, serve).await;
        });
        Ok(Self { address, task, gone: Mutex::new(gone) })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
        // An error is what comes: the other end is dropped.
        let _ = self.gone.lock().recv_timeout(ENDS);
    }
}

/// Connections last as long as this is polled.
async fn listen<F>(listener: TcpListener, mut serve: impl FnMut(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(serve(client));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}
