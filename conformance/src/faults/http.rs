//! A proxy in front of a server that is spoken to over HTTP. It passes requests and answers on one by one, and can be told to
//! answer in the server's place. It stands behind the [`Proxy`](super::Proxy) that counts and disturbs the bytes.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Request, Response, client, server};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex as SyncMutex;
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use super::apart::Listening;
use crate::{HttpAnswer, HttpService};

/// Who answers a request, and whether it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Answers {
    /// The server.
    #[default]
    OfTheServer,
    /// A load balancer says 503 to every request that comes, and the server sees none of them.
    Unavailable,
    /// The server does what is asked for; a load balancer says 503 where its answer comes.
    DoneButUnavailable,
    /// The service's own throttle answer to every request that comes; it has done none of them.
    Throttled,
}

/// A listener in front of one address of the server. It ends with all its connections when it is dropped.
pub(crate) struct HttpProxy {
    listening: Listening,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: String,
    service: Arc<dyn HttpService>,
    answers: SyncMutex<Answers>,
    answered: Arc<AtomicU64>,
}

type Body = BoxBody<Bytes, hyper::Error>;

impl HttpProxy {
    /// Listens on any free port of the loopback interface. `answered` counts the requests that are answered in the server's place.
    pub(crate) fn start(upstream: String, service: Arc<dyn HttpService>, answered: Arc<AtomicU64>) -> io::Result<Self> {
        let shared = Arc::new(Shared { upstream, service, answers: SyncMutex::default(), answered });
        let serving = Arc::clone(&shared);
        let anywhere = (Ipv4Addr::LOCALHOST, 0).into();
        let listening = Listening::start(anywhere, move |client| serve(client, Arc::clone(&serving)))?;
        Ok(Self { listening, shared })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.listening.address()
    }

    /// Who answers from now on.
    pub(crate) fn set(&self, answers: Answers) {
        *self.shared.answers.lock() = answers;
    }
}

/// Whether the service's own answer can be given at all.
///
/// # Errors
/// What is wrong with its status or its headers.
pub(super) fn check(service: &dyn HttpService) -> Result<(), String> {
    let checked = response(service.throttled(""));
    checked.map(drop).map_err(|error| format!("the harness's answer of a throttled service is none of HTTP: {error}"))
}

/// One connection of a client has one to the server, which lasts as long.
async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let Ok(upstream) = TcpStream::connect(&shared.upstream).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
    let handshake = client::conn::http1::Builder::new().preserve_header_case(true).handshake(TokioIo::new(upstream));
    let Ok((requests, upstream)) = handshake.await else { return };
    let requests = Arc::new(Mutex::new(requests));
    let service = service_fn(move |request| {
        let (requests, shared) = (Arc::clone(&requests), Arc::clone(&shared));
        async move { shared.answer(request, &mut *requests.lock().await).await }
    });
    let downstream = server::conn::http1::Builder::new()
        .preserve_header_case(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(client), service);
    tokio::pin!(downstream);
    tokio::select! {
        _ = downstream.as_mut() => {}
        // The server has ended it: so does the proxy, behind the answer that is on its way.
        _ = upstream => {
            downstream.as_mut().graceful_shutdown();
            let _ = downstream.await;
        }
    }
}

impl Shared {
    /// An error ends the connection without an answer.
    async fn answer(
        &self,
        request: Request<Incoming>,
        requests: &mut SendRequest<Incoming>,
    ) -> Result<Response<Body>, hyper::Error> {
        let answers = *self.answers.lock();
        if matches!(answers, Answers::Unavailable | Answers::Throttled) {
            let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
            let answer = match answers {
                Answers::Throttled => self.service.throttled(content_type.unwrap_or_default()),
                _ => unavailable(),
            };
            // Read to its end, so that the connection can go on.
            read_to_its_end(request.into_body()).await?;
            return Ok(self.instead(answer));
        }
        requests.ready().await?;
        let response = requests.send_request(request).await?;
        if *self.answers.lock() == Answers::DoneButUnavailable {
            read_to_its_end(response.into_body()).await?;
            return Ok(self.instead(unavailable()));
        }
        Ok(response.map(BodyExt::boxed))
    }

    fn instead(&self, answer: HttpAnswer) -> Response<Body> {
        self.answered.fetch_add(1, Ordering::Relaxed);
        response(answer).expect("checked before the proxy was started")
    }
}

/// What stands between the client and the service says so, in words that are not the service's.
fn unavailable() -> HttpAnswer {
    HttpAnswer {
        status: 503,
        headers: vec![("Content-Type".into(), "text/html".into())],
        body: "<html><body><h1>503 Service Unavailable</h1></body></html>".into(),
    }
}

fn response(answer: HttpAnswer) -> Result<Response<Body>, String> {
    let mut response = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        response = response.header(name, value);
    }
    let body = Full::new(Bytes::from(answer.body)).map_err(|never: Infallible| match never {});
    response.body(body.boxed()).map_err(|error| error.to_string())
}

async fn read_to_its_end(mut body: Incoming) -> Result<(), hyper::Error> {
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(())
}
