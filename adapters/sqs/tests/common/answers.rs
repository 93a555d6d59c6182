//! A proxy that answers chosen requests as Amazon answers under stress, and passes all others on.
#![allow(dead_code, reason = "each test binary uses its share")]

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// What becomes of a request.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// The server does not see it.
    Answer(u16, &'static str),
    /// The server has done it, and its answer is lost behind this one.
    DoneBut(u16, &'static str),
    /// The server does not see it, and this answer takes so long.
    Late(Duration, u16, &'static str),
    /// The server has done it, which `done` tells. Its answer is lost behind this one, which waits for `goes`.
    DoneThenHeld { done: Arc<Notify>, goes: Arc<Notify>, answer: (u16, &'static str) },
    /// These entries of the batch are refused, with this code; the server does the others.
    Entries { failed: Vec<usize>, code: &'static str, is_senders: bool },
    /// The server does all of it, and its answer leaves these entries out.
    Unmentioned(Vec<usize>),
}

type Scripts = Arc<Mutex<HashMap<&'static str, VecDeque<Fault>>>>;

pub(crate) struct Proxy {
    address: SocketAddr,
    scripts: Scripts,
    door: Door,
}

/// The access key whose requests pass; all do where there is none.
type Door = Arc<Mutex<Option<String>>>;

const NOT_LET_IN: (&str, &str) = (
    r#"{"__type":"com.amazon.coral.service#InvalidClientTokenId","message":"by the test"}"#,
    "<ErrorResponse><Error><Type>Sender</Type><Code>InvalidClientTokenId</Code><Message>by the test</Message></Error></ErrorResponse>",
);

impl Proxy {
    /// Passes everything on to `target`.
    pub(crate) async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (scripts, door) = (Scripts::default(), Door::default());
        let shared = (Arc::clone(&scripts), Arc::clone(&door));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (target, (scripts, door)) = (target.clone(), shared.clone());
                tokio::spawn(async move {
                    // A client that has gone away is no matter of the test.
                    let _ = serve(client, &target, &scripts, &door).await;
                });
            }
        });
        Self { address, scripts, door }
    }

    /// From now on requests that are signed with this access key pass, and no others.
    pub(crate) fn lets_in(&self, key: &str) {
        *self.door.lock().unwrap() = Some(key.to_owned());
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next requests of that action, one fault each.
    pub(crate) fn script(&self, action: &'static str, faults: impl IntoIterator<Item = Fault>) {
        self.scripts.lock().unwrap().entry(action).or_default().extend(faults);
    }

    /// Whether every fault has met its request.
    pub(crate) fn is_spent(&self) -> bool {
        self.scripts.lock().unwrap().values().all(VecDeque::is_empty)
    }
}

/// One request for each connection: the answer closes it, so that nothing has to be taken apart.
async fn serve(mut client: TcpStream, target: &str, scripts: &Scripts, door: &Door) -> std::io::Result<()> {
    let (head, body) = read(&mut client).await?;
    let is_shut = door.lock().unwrap().as_ref().is_some_and(|key| !head.contains(&format!("Credential={key}/")));
    if is_shut {
        let text = if body.starts_with(b"Action=") { NOT_LET_IN.1 } else { NOT_LET_IN.0 };
        client.write_all(&answer(403, text.as_bytes())).await?;
        return client.shutdown().await;
    }
    let answer = match fault_of(&head, &body, scripts) {
        None => ask(target, &head, &body).await?,
        Some(Fault::Answer(status, text)) => answer(status, text.as_bytes()),
        Some(Fault::DoneBut(status, text)) => {
            ask(target, &head, &body).await?;
            answer(status, text.as_bytes())
        }
        Some(Fault::Late(time, status, text)) => {
            tokio::time::sleep(time).await;
            answer(status, text.as_bytes())
        }
        Some(Fault::DoneThenHeld { done, goes, answer: (status, text) }) => {
            ask(target, &head, &body).await?;
            done.notify_one();
            goes.notified().await;
            answer(status, text.as_bytes())
        }
        Some(Fault::Entries { failed, code, is_senders }) => {
            let mut request: Value = serde_json::from_slice(&body)?;
            let entries = request["Entries"].as_array_mut().expect("a batch");
            let all = std::mem::take(entries);
            let (refused, kept): (Vec<_>, Vec<_>) =
                all.into_iter().enumerate().partition(|(place, _)| failed.contains(place));
            *entries = kept.into_iter().map(|(_, entry)| entry).collect();
            let mut told = json_of(&ask(target, &head, &serde_json::to_vec(&request)?).await?)?;
            let refused = refused.into_iter().map(|(_, entry)| {
                json!({ "Id": entry["Id"], "Code": code, "SenderFault": is_senders, "Message": "by the test" })
            });
            told["Failed"] = refused.collect();
            answer(200, &serde_json::to_vec(&told)?)
        }
        Some(Fault::Unmentioned(places)) => {
            let mut told = json_of(&ask(target, &head, &body).await?)?;
            let done = told["Successful"].as_array_mut().expect("a batch's answer");
            let is_left_out =
                |id: &Value| id.as_str().and_then(|id| id.parse().ok()).is_some_and(|id| places.contains(&id));
            done.retain(|entry| !is_left_out(&entry["Id"]));
            answer(200, &serde_json::to_vec(&told)?)
        }
    };
    client.write_all(&answer).await?;
    client.shutdown().await
}

fn fault_of(head: &str, body: &[u8], scripts: &Scripts) -> Option<Fault> {
    let body = String::from_utf8_lossy(body);
    // The queue of delayed failures is polled all the time, whatever a test does.
    if body.contains(r#"_retry""#) {
        return None;
    }
    let mut scripts = scripts.lock().unwrap();
    let (_, faults) = scripts.iter_mut().find(|(action, faults)| {
        // SQS is asked in JSON, with the action in a header; SNS by a form.
        let is_it = head.to_ascii_lowercase().contains(&format!("amazonsqs.{}\r\n", action.to_ascii_lowercase()))
            || body.starts_with(&format!("Action={action}&"));
        is_it && !faults.is_empty()
    })?;
    faults.pop_front()
}

async fn read(client: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
    });
    let mut body = bytes.split_off(end);
    while body.len() < length.unwrap_or(0) {
        if client.read_buf(&mut body).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok((head, body))
}

/// The server's answer, as it came.
async fn ask(target: &str, head: &str, body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(target).await?;
    let kept = head.trim_end().lines().filter(|line| {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        name != "content-length" && name != "connection"
    });
    let mut request = kept.collect::<Vec<_>>().join("\r\n");
    request.push_str(&format!("\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len()));
    server.write_all(request.as_bytes()).await?;
    server.write_all(body).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// The object in an answer, whatever it is wrapped in.
fn json_of(answer: &[u8]) -> std::io::Result<Value> {
    let begin = answer.iter().position(|byte| *byte == b'{').unwrap_or(0);
    let end = answer.iter().rposition(|byte| *byte == b'}').map_or(begin, |place| place + 1);
    Ok(serde_json::from_slice(&answer[begin..end])?)
}

fn answer(status: u16, body: &[u8]) -> Vec<u8> {
    let kind = if body.starts_with(b"<") { "text/xml" } else { "application/x-amz-json-1.0" };
    let head = format!(
        "HTTP/1.1 {status} By The Test\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}
