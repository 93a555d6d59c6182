//! The proxy does to a connection what it is told to.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use super::proxy::{End, Proxy, Way};

const SOON: Duration = Duration::from_secs(10);
/// Nothing comes for that long; then something must.
const QUIET: Duration = Duration::from_millis(100);

/// Both ends of a connection through a proxy.
struct Pair {
    proxy: Proxy,
    listener: TcpListener,
    client: TcpStream,
    server: TcpStream,
}

async fn pair() -> Pair {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = listener.local_addr().unwrap().to_string();
    let proxy = Proxy::start(None, upstream).unwrap();
    let client = TcpStream::connect(proxy.address()).await.unwrap();
    let (server, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
    Pair { proxy, listener, client, server }
}

async fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    timeout(SOON, stream.read_exact(&mut bytes)).await.expect("they arrive").expect("no end");
    bytes
}

/// What ends the stream.
async fn end(stream: &mut TcpStream) -> Result<usize, ErrorKind> {
    timeout(SOON, stream.read(&mut [0; 64])).await.expect("it ends").map_err(|error| error.kind())
}

async fn is_silent(stream: &mut TcpStream) -> bool {
    timeout(QUIET, stream.peek(&mut [0; 1])).await.is_err()
}

#[tokio::test]
async fn bytes_pass_in_both_directions_and_so_does_the_end() {
    let Pair { proxy, mut client, mut server, .. } = pair().await;
    client.write_all(b"question").await.unwrap();
    assert_eq!(read(&mut server, 8).await, b"question");
    server.write_all(b"answer").await.unwrap();
    assert_eq!(read(&mut client, 6).await, b"answer");
    assert_eq!((proxy.open(), proxy.accepted(), proxy.bytes()), (1, 1, 14));
    client.shutdown().await.unwrap();
    assert_eq!(end(&mut server).await, Ok(0));
}

#[tokio::test]
async fn a_reset_is_a_reset_on_both_sides_and_an_orderly_end_is_none() {
    let Pair { proxy, mut client, mut server, .. } = pair().await;
    client.write_all(b"x").await.unwrap();
    read(&mut server, 1).await;
    proxy.end(End::Reset);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(end(&mut server).await, Err(ErrorKind::ConnectionReset));

    let Pair { proxy, mut client, mut server, .. } = pair().await;
    proxy.end(End::Finish);
    assert_eq!((end(&mut client).await, end(&mut server).await), (Ok(0), Ok(0)));
}

#[tokio::test]
async fn what_is_held_arrives_later_and_in_order() {
    let Pair { proxy, mut client, mut server, .. } = pair().await;
    proxy.set(Way::Hold, Way::Pass);
    client.write_all(b"late").await.unwrap();
    assert!(is_silent(&mut server).await);
    server.write_all(b"answer").await.unwrap();
    assert_eq!(read(&mut client, 6).await, b"answer");
    proxy.set(Way::Pass, Way::Pass);
    client.write_all(b"r").await.unwrap();
    assert_eq!(read(&mut server, 5).await, b"later");
}

#[tokio::test]
async fn when_answers_are_lost_questions_arrive_and_the_connection_does_not_go_on_afterwards() {
    let Pair { proxy, mut client, mut server, .. } = pair().await;
    proxy.set(Way::Pass, Way::Lose);
    client.write_all(b"question").await.unwrap();
    assert_eq!(read(&mut server, 8).await, b"question");
    server.write_all(b"answer").await.unwrap();
    assert!(is_silent(&mut client).await);
    proxy.set(Way::Pass, Way::Pass);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_connection_is_cut_behind_the_byte_that_was_named() {
    let Pair { proxy, mut client, mut server, .. } = pair().await;
    proxy.set(Way::CutAfter(5), Way::Pass);
    client.write_all(b"123456789").await.unwrap();
    // A reset may overtake what was read by nobody yet, so that the five bytes may or may not be seen.
    let mut seen = Vec::new();
    let ended = timeout(SOON, server.read_to_end(&mut seen)).await.unwrap();
    assert_eq!(ended.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    assert!(b"12345".starts_with(&seen), "{seen:?}");
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_half_open_connection_is_gone_for_the_server_and_silent_for_the_client() {
    let Pair { proxy, mut client, mut server, .. } = pair().await;
    proxy.end(End::HalfOpen);
    assert_eq!(end(&mut server).await, Err(ErrorKind::ConnectionReset));
    client.write_all(b"anybody there?").await.unwrap();
    assert!(is_silent(&mut client).await);
    proxy.set(Way::Pass, Way::Pass);
    assert_eq!(end(&mut client).await, Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_slow_line_is_late_and_narrow() {
    let Pair { proxy, mut client, mut server, .. } = pair().await;
    let delay = Duration::from_millis(50);
    proxy.set(Way::Slow { delay, bytes_per_second: 10_000 }, Way::Pass);
    let begin = Instant::now();
    client.write_all(&[7; 1_000]).await.unwrap();
    read(&mut server, 1_000).await;
    assert!(begin.elapsed() >= delay + Duration::from_millis(100), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn new_connections_are_reset_while_the_proxy_refuses_and_served_again_afterwards() {
    let Pair { proxy, listener, .. } = pair().await;
    proxy.refuse(true);
    // The reset may come before connecting has an answer.
    let refused = match TcpStream::connect(proxy.address()).await {
        Ok(mut refused) => end(&mut refused).await,
        Err(error) => Err(error.kind()),
    };
    assert_eq!(refused, Err(ErrorKind::ConnectionReset));
    proxy.refuse(false);
    let mut taken = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut server, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
    server.write_all(b"x").await.unwrap();
    assert_eq!(read(&mut taken, 1).await, b"x");
}

/// As a client of librdkafka does that is closed by being dropped: its runtime has no other thread here.
#[tokio::test]
async fn a_client_that_blocks_its_thread_gets_its_answer_through_the_proxy() {
    use std::io::{Read as _, Write as _};

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let upstream = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut server, _) = listener.accept().unwrap();
        let mut question = [0; 8];
        server.read_exact(&mut question).unwrap();
        server.write_all(&question).unwrap();
    });
    let proxy = Proxy::start(None, upstream).unwrap();
    let mut client = std::net::TcpStream::connect(proxy.address()).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.write_all(b"question").unwrap();
    let mut answer = [0; 8];
    client.read_exact(&mut answer).expect("the proxy passes it on");
    assert_eq!(&answer, b"question");
    server.join().unwrap();
}

#[tokio::test]
async fn the_address_of_a_proxy_that_is_dropped_is_free_at_once() {
    let Pair { proxy, client, server, .. } = pair().await;
    let address = proxy.address();
    // Those that are reset leave nothing behind that waits.
    proxy.end(End::Reset);
    drop((client, server, proxy));
    Proxy::start(Some(address), "127.0.0.1:1".into()).unwrap();
}
