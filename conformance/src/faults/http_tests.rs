//! What stands in the place of a server that is spoken to over HTTP passes requests on, or answers them.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::service::service_fn;
use hyper::{Request, Response, server};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::http::{Answers, HttpProxy, check};
use super::proxy::{Proxy, Way};
use crate::{HttpAnswer, HttpService};

const SOON: Duration = Duration::from_secs(10);

/// It refuses in the form in which it is asked.
struct Service(u16);

impl HttpService for Service {
    fn throttled(&self, content_type: &str) -> HttpAnswer {
        let headers = vec![("Content-Type".into(), content_type.into()), ("X-Of".into(), "the service".into())];
        HttpAnswer { status: self.0, headers, body: "slower, please".into() }
    }
}

/// A server that answers with what it is sent, and the proxies before it.
struct Scene {
    bytes: Proxy,
    proxy: HttpProxy,
    /// How many requests came to the server, and on how many connections.
    requests: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
    /// The server has one request at `/slow` and answers it when it is told to.
    came: Arc<Notify>,
    goes: Arc<Notify>,
    answered: Arc<AtomicU64>,
}

impl Scene {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = listener.local_addr().unwrap().to_string();
        let (requests, connections) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (came, goes) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let shared = (Arc::clone(&requests), Arc::clone(&connections), Arc::clone(&came), Arc::clone(&goes));
        tokio::spawn(async move {
            let (requests, connections, came, goes) = shared;
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let (requests, came, goes) = (Arc::clone(&requests), Arc::clone(&came), Arc::clone(&goes));
                let service = service_fn(move |request: Request<Incoming>| {
                    requests.fetch_add(1, Ordering::Relaxed);
                    let (came, goes) = (Arc::clone(&came), Arc::clone(&goes));
                    async move {
                        if request.uri().path() == "/slow" {
                            came.notify_one();
                            goes.notified().await;
                        }
                        let echo = request.into_body().collect().await?.to_bytes();
                        let response = Response::builder().header("X-Of", "the server");
                        Ok::<_, hyper::Error>(response.body(Full::new(echo)).unwrap())
                    }
                });
                tokio::spawn(server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        let answered = Arc::new(AtomicU64::new(0));
        let proxy = HttpProxy::start(upstream, Arc::new(Service(429)), Arc::clone(&answered)).unwrap();
        let bytes = Proxy::start(None, proxy.address().to_string()).unwrap();
        Self { bytes, proxy, requests, connections, came, goes, answered }
    }

    async fn client(&self) -> Client {
        let stream = TcpStream::connect(self.bytes.address()).await.unwrap();
        let (requests, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Client(requests)
    }

    /// How many requests came to the server, on how many connections, and how many were answered in its place.
    fn counts(&self) -> (u64, u64, u64) {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        (count(&self.requests), count(&self.connections), count(&self.answered))
    }
}

/// One connection.
struct Client(SendRequest<Full<Bytes>>);

/// Status, who answers, and the body.
type Told = (u16, String, Bytes);

impl Client {
    async fn ask(&mut self, path: &str, body: impl Into<Bytes>) -> Told {
        self.try_ask(path, body).await.expect("there is an answer")
    }

    async fn try_ask(&mut self, path: &str, body: impl Into<Bytes>) -> hyper::Result<Told> {
        let request = Request::post(path).header("Host", "test").header("Content-Type", "text/x-asked");
        let asking = async {
            self.0.ready().await?;
            let response = self.0.send_request(request.body(Full::new(body.into())).unwrap()).await?;
            let of = response.headers().get("X-Of").map_or("nobody", |value| value.to_str().unwrap()).to_owned();
            Ok((response.status().as_u16(), of, response.into_body().collect().await?.to_bytes()))
        };
        timeout(SOON, asking).await.expect("it ends")
    }
}

fn of_the_server(body: &str) -> Told {
    (200, "the server".into(), Bytes::copy_from_slice(body.as_bytes()))
}

#[tokio::test]
async fn requests_of_a_connection_are_passed_on_one_by_one_on_one_connection_to_the_server() {
    let scene = Scene::new().await;
    let mut client = scene.client().await;
    for body in ["one", "", "three"] {
        assert_eq!(client.ask("/", body).await, of_the_server(body));
    }
    assert_eq!(scene.counts(), (3, 1, 0));
    assert!(scene.bytes.bytes() > 16, "{}", scene.bytes.bytes());
}

#[tokio::test]
async fn what_is_refused_does_not_reach_the_server_and_the_connection_goes_on() {
    let scene = Scene::new().await;
    let mut client = scene.client().await;
    client.ask("/", "before").await;
    scene.proxy.set(Answers::Unavailable);
    let (status, of, body) = client.ask("/", "refused").await;
    assert_eq!((status, of.as_str()), (503, "nobody"));
    assert!(body.starts_with(b"<html>"), "{body:?}");
    scene.proxy.set(Answers::Throttled);
    assert_eq!(client.ask("/", "throttled").await, (429, "the service".into(), Bytes::from("slower, please")));
    assert_eq!(scene.counts(), (1, 1, 2));
    scene.proxy.set(Answers::OfTheServer);
    assert_eq!(client.ask("/", "after").await, of_the_server("after"));
    assert_eq!(scene.counts(), (2, 1, 2));
}

#[tokio::test]
async fn what_is_done_but_answered_503_reaches_the_server_exactly_once_and_the_connection_goes_on() {
    let scene = Scene::new().await;
    let mut client = scene.client().await;
    scene.proxy.set(Answers::DoneButUnavailable);
    let (status, of, _) = client.ask("/", "done").await;
    assert_eq!((status, of.as_str()), (503, "nobody"));
    assert_eq!(scene.counts(), (1, 1, 1));
    scene.proxy.set(Answers::OfTheServer);
    assert_eq!(client.ask("/", "after").await, of_the_server("after"));
    assert_eq!(scene.counts(), (2, 1, 1));
}

#[tokio::test]
async fn the_answer_of_what_was_on_its_way_already_is_replaced_and_only_while_that_lasts() {
    let scene = Scene::new().await;
    for (last, expected) in [(Answers::DoneButUnavailable, 503), (Answers::OfTheServer, 200), (Answers::Throttled, 200)]
    {
        let mut client = scene.client().await;
        let meanwhile = async {
            scene.came.notified().await;
            scene.proxy.set(Answers::DoneButUnavailable);
            scene.proxy.set(last);
            scene.goes.notify_one();
        };
        let ((status, ..), ()) = tokio::join!(client.ask("/slow", "x"), meanwhile);
        assert_eq!(status, expected, "{last:?}");
        scene.proxy.set(Answers::OfTheServer);
    }
}

#[tokio::test]
async fn large_bodies_pass_whole_and_are_read_to_their_end_where_they_are_refused() {
    let scene = Scene::new().await;
    let mut client = scene.client().await;
    let large: Bytes = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (status, _, echo) = client.ask("/", large.clone()).await;
    assert_eq!((status, echo == large), (200, true));
    for (answers, expected) in [(Answers::Throttled, 429), (Answers::DoneButUnavailable, 503)] {
        scene.proxy.set(answers);
        assert_eq!(client.ask("/", large.clone()).await.0, expected);
    }
    scene.proxy.set(Answers::OfTheServer);
    assert_eq!(client.ask("/", "after").await, of_the_server("after"));
    assert_eq!(scene.counts(), (3, 1, 2));
}

#[tokio::test]
async fn a_connection_that_the_server_ends_ends_behind_its_answer_for_the_client_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = listener.local_addr().unwrap().to_string();
    let proxy = HttpProxy::start(upstream, Arc::new(Service(429)), Arc::default()).unwrap();
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    client.write_all(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbody").await.unwrap();
    let (mut server, _) = timeout(SOON, listener.accept()).await.expect("it is connected to").unwrap();
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\nbody") {
        assert_ne!(timeout(SOON, server.read_buf(&mut asked)).await.expect("it is asked").unwrap(), 0);
    }
    // It does not say beforehand that it will end it, as one does not that is idle for long.
    server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nanswer").await.unwrap();
    drop(server);
    let mut told = String::new();
    timeout(SOON, client.read_to_string(&mut told)).await.expect("it ends").unwrap();
    assert!(told.starts_with("HTTP/1.1 200") && told.ends_with("\r\n\r\nanswer"), "{told}");
}

#[tokio::test]
async fn what_happens_to_bytes_happens_to_answers_that_are_not_the_servers() {
    let scene = Scene::new().await;
    let mut client = scene.client().await;
    scene.proxy.set(Answers::Unavailable);
    scene.bytes.set(Way::CutAfter(10), Way::Pass);
    assert!(client.try_ask("/", "x").await.is_err());
    // The connection to the server is made meanwhile: it may have come to it or not.
    let (requests, _, answered) = scene.counts();
    assert_eq!((requests, answered), (0, 0));
}

#[tokio::test]
async fn without_a_server_connections_are_reset() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = listener.local_addr().unwrap().to_string();
    drop(listener);
    let proxy = HttpProxy::start(upstream, Arc::new(Service(429)), Arc::default()).unwrap();
    // The reset may come before connecting has an answer.
    let ended = timeout(SOON, async { TcpStream::connect(proxy.address()).await?.read(&mut [0]).await });
    let ended = ended.await.expect("it ends");
    assert_eq!(ended.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
}

#[test]
fn an_answer_that_is_none_of_http_is_told_before_anything_runs() {
    assert_eq!(check(&Service(429)), Ok(()));
    let told = check(&Service(7)).unwrap_err();
    assert!(told.contains("status"), "{told}");
}
