//! Who may do what: users, tokens, keys, credentials, permissions, on servers that are set up for it.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use anybroker_core::{Effect, Error, ErrorKind, Message, PublishOptions, Reason, TopologySpec, Verdict};
use common::server::OwnServer;
use common::{LONG, connect, numbered, publish, receive, try_connect, unique};
use nkeys::KeyPair;

const PASSWORD: &str = "pw-nobody-may-read";

async fn round_trip(url: &str, settings: &str) {
    let bus = connect(url, settings).await;
    let name = unique("auth");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..2)).await;
    let mut came = receive(&mut subscriber, 2).await;
    came.remove(0).ack().await.unwrap();
    came.remove(0).dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
    assert_eq!(bus.dead_letters(name.as_str(), "g").unwrap().redrive(&Default::default()).await.unwrap().moved, 1);
    receive(&mut subscriber, 1).await.remove(0).nack(Duration::ZERO).await.unwrap();
    let back = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(back.attempt(), 2);
    back.ack().await.unwrap();
    let begun = Instant::now();
    subscriber.close(LONG).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "a close took {:?}", begun.elapsed());
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Connecting fails within the connect timeout, and says no secret.
async fn refused(url: &str, settings: &str, secret: &str) -> Error {
    let begun = Instant::now();
    let settings = format!("{settings}&connect_timeout=4s");
    let error = try_connect(url, settings.trim_start_matches('&')).await.map(drop).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}: {error}", begun.elapsed());
    for text in [error.to_string(), format!("{error:?}"), format!("{error:#?}")] {
        assert!(!text.contains(secret), "{text}");
    }
    error
}

fn users(nkey: &str) -> String {
    format!(
        r#"authorization {{ users = [
            {{ user: alice, password: {PASSWORD} }}
            {{ nkey: {nkey} }}
            {{ user: least, password: {PASSWORD}, permissions: {{
                publish: ["$JS.API.>", "$JS.ACK.>", "anybroker.>", "_INBOX.>"], subscribe: ["_INBOX.>"] }} }}
            {{ user: no_api, password: {PASSWORD}, permissions: {{ publish: ["anybroker.>"], subscribe: ["_INBOX.>"] }} }}
            {{ user: no_inbox, password: {PASSWORD}, permissions: {{ publish: [">"], subscribe: ["other.>"] }} }}
            {{ user: no_publish, password: {PASSWORD}, permissions: {{ publish: {{ deny: ["anybroker.d.closed.>"] }} }} }}
            {{ user: no_pull, password: {PASSWORD}, permissions: {{ publish: {{ deny: ["$JS.API.CONSUMER.MSG.NEXT.>"] }} }} }}
            {{ user: no_ack, password: {PASSWORD}, permissions: {{ publish: {{ deny: ["$JS.ACK.>"] }} }} }}
        ] }}"#
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_and_keys_are_let_in_with_what_is_right_and_with_nothing_else() {
    let (right, wrong) = (KeyPair::new_user(), KeyPair::new_user());
    let Some(server) = OwnServer::start(|_| users(&right.public_key())) else { return };
    round_trip(&server.url(&format!("alice:{PASSWORD}")), "").await;
    // What the README says that is enough, is enough.
    round_trip(&server.url(&format!("least:{PASSWORD}")), "").await;
    round_trip(&server.url(""), &format!("nkey={}", right.seed().unwrap())).await;
    let wrong_seed = wrong.seed().unwrap();
    let cases = [
        (server.url("alice:not-it"), String::new(), "not-it"),
        (server.url("alice"), String::new(), PASSWORD),
        (server.url(""), String::new(), PASSWORD),
        (server.url(""), "token=t0ken".to_owned(), "t0ken"),
        (server.url(""), format!("nkey={wrong_seed}"), wrong_seed.as_str()),
        (server.url(""), "nkey=SUnotaseed".to_owned(), "SUnotaseed"),
    ];
    for (url, settings, secret) in cases {
        let error = refused(&url, &settings, secret).await;
        assert_eq!((error.kind(), error.effect()), (ErrorKind::Unauthenticated, Effect::NotDone), "{error}");
    }
    let error = refused(&server.url(&format!("alice:{PASSWORD}")), "token=other", PASSWORD).await;
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_user_may_not_do_is_told_at_once() {
    let Some(server) = OwnServer::start(|_| users(&KeyPair::new_user().public_key())) else { return };
    let of = |user: &str| server.url(&format!("{user}:{PASSWORD}"));
    for user in ["no_api", "no_inbox"] {
        let error = refused(&of(user), "", PASSWORD).await;
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{user}: {error}");
    }
    let admin = connect(&of("alice"), "").await;
    for name in ["open", "closed"] {
        admin.declare(&TopologySpec::group(name, "g")).await.unwrap();
    }
    let begun = Instant::now();
    let bus = connect(&of("no_publish"), "").await;
    let batch = ["open", "closed", "open", "closed"].map(|name| Message::new(name, "x")).to_vec();
    let outcomes = bus.publish(batch).await;
    for (index, outcome) in outcomes.into_iter().enumerate() {
        if index % 2 == 0 {
            outcome.unwrap();
        } else {
            let error = outcome.unwrap_err();
            assert_eq!((error.kind(), error.effect()), (ErrorKind::PermissionDenied, Effect::NotDone), "{error}");
        }
    }
    bus.close(LONG).await.unwrap();

    let bus = connect(&of("no_pull"), "").await;
    let mut subscriber = bus.subscribe(bus.subscription("open", "g")).await.unwrap();
    let error = subscriber.receive(1, LONG).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    drop(subscriber);
    bus.close(LONG).await.unwrap();

    let bus = connect(&of("no_ack"), "").await;
    let mut subscriber = bus.subscribe(bus.subscription("open", "g")).await.unwrap();
    let failed = receive(&mut subscriber, 1).await.remove(0).ack().await.unwrap_err();
    assert_eq!(failed.error().kind(), ErrorKind::PermissionDenied, "{failed}");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    drop((failed, subscriber));
    let _ = bus.close(Duration::from_secs(1)).await;
    admin.close(LONG).await.unwrap();
}

/// Taking a permission back ends subscriptions at the server for good, that for all answers included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gets_a_permission_back_is_answered_again() {
    let users = |permissions: &str| {
        format!("authorization {{ users = [ {{ user: alice, password: {PASSWORD}{permissions} }} ] }}")
    };
    let Some(server) = OwnServer::start(|_| users("")) else { return };
    let bus = connect(&server.url(&format!("alice:{PASSWORD}")), "").await;
    let name = unique("revoked");
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    server.reload(&users(", permissions: { publish: { deny: \">\" }, subscribe: { deny: \">\" } }"));
    let error = bus.send(Message::new(name.as_str(), "x")).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::PermissionDenied, Effect::NotDone), "{error}");
    server.reload(&users(""));
    // The first one may go out before the connection is made anew: then it is stored, and its answer is lost.
    let options = PublishOptions::default().with_timeout(Duration::from_secs(3));
    let send = || async { bus.submit(vec![Message::new(name.as_str(), "x")], &options).await.await.remove(0) };
    if let Err(error) = send().await {
        assert_eq!((error.kind(), error.effect()), (ErrorKind::Timeout, Effect::Unknown), "{error}");
        send().await.unwrap();
    }
    // So do requests of the API, which have a subscription of their own.
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    receive(&mut subscriber, 2).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// What an account may store at most.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_that_may_store_nothing_more_is_unavailable_until_it_may() {
    let account = |most: &str| {
        format!(
            "accounts {{ A {{ jetstream: {{ max_file: {most} }}, users: [ {{ user: alice, password: {PASSWORD} }} ] }} }}"
        )
    };
    let Some(server) = OwnServer::start(|_| account("100MB")) else { return };
    let bus = connect(&server.url(&format!("alice:{PASSWORD}")), "").await;
    let name = unique("room");
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(3));
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    publish(&bus, numbered(&name, 0..2)).await;
    let mut held = receive(&mut subscriber, 2).await;
    server.reload(&account("100"));
    let error = bus.send(Message::new(name.as_str(), "x")).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Unavailable, Effect::NotDone), "{error}");
    // A failure is stored before it is told; an ack takes no room.
    let failed = held.remove(0).nack(Duration::ZERO).await.unwrap_err();
    assert_eq!(failed.error().kind(), ErrorKind::Unavailable, "{failed}");
    drop(failed);
    held.remove(0).ack().await.unwrap();
    server.reload(&account("100MB"));
    publish(&bus, numbered(&name, 2..3)).await;
    receive(&mut subscriber, 2).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_lets_in() {
    let Some(server) = OwnServer::start(|_| format!("authorization {{ token: {PASSWORD} }}")) else { return };
    round_trip(&server.url(""), &format!("token={PASSWORD}")).await;
    let error = refused(&server.url(""), "token=wr0ng", "wr0ng").await;
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
}

/// A JWT as NATS has them: claims, signed with an NKey.
fn jwt(issuer: &KeyPair, subject: &str, expires: Option<u64>, claims: &serde_json::Value) -> String {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let mut body = serde_json::json!({
        "jti": unique("jti"), "iat": 1_700_000_000, "iss": issuer.public_key(), "name": "test", "sub": subject, "nats": claims,
    });
    if let Some(expires) = expires {
        body["exp"] = expires.into();
    }
    let head = URL_SAFE_NO_PAD.encode(br#"{"typ":"JWT","alg":"ed25519-nkey"}"#);
    let signed = format!("{head}.{}", URL_SAFE_NO_PAD.encode(body.to_string()));
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credentials_file_lets_in() {
    let (operator, system, account) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let limits = serde_json::json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let user_claims = serde_json::json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 });
    let Some(server) = OwnServer::start(|_| {
        let claims = serde_json::json!({ "type": "operator", "version": 2 });
        let operator_jwt = jwt(&operator, &operator.public_key(), None, &claims);
        let accounts = [(&system, serde_json::Value::Null), (&account, limits)].map(|(account, limits)| {
            let mut claims = serde_json::json!({ "type": "account", "version": 2 });
            if limits.is_object() {
                claims["limits"] = limits;
            }
            format!("{}: {}", account.public_key(), jwt(&operator, &account.public_key(), None, &claims))
        });
        format!(
            "operator: {operator_jwt}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{\n{}\n}}",
            system.public_key(),
            accounts.join("\n")
        )
    }) else {
        return;
    };
    let write = |name: &str, issuer: &KeyPair, expires: Option<u64>| {
        let user = KeyPair::new_user();
        let (jwt, seed) = (jwt(issuer, &user.public_key(), expires, &user_claims), user.seed().unwrap());
        let path = server.folder.path().join(name);
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        std::fs::write(&path, text).unwrap();
        (format!("credentials={}", path.display()), seed)
    };
    let (right, _) = write("right.creds", &account, None);
    round_trip(&server.url(""), &right).await;
    let (wrong, seed) = write("wrong.creds", &KeyPair::new_account(), None);
    let error = refused(&server.url(""), &wrong, &seed).await;
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    std::fs::write(server.folder.path().join("empty.creds"), &seed).unwrap();
    for name in ["missing.creds", "empty.creds"] {
        let settings = format!("credentials={}", server.folder.path().join(name).display());
        let error = refused(&server.url(""), &settings, &seed).await;
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{error}");
    }

    // Rewritten when the user's JWT is over. The server ends the connection then, and refuses another one.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let (settings, _) = write("renewed.creds", &account, Some(now + 4));
    let bus = connect(&server.url(""), &settings).await;
    let name = unique("renewed");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let options = PublishOptions::default().with_timeout(Duration::from_secs(1));
    let send = || async { bus.submit(vec![Message::new(name.as_str(), "x")], &options).await.await.remove(0) };
    let deadline = Instant::now() + LONG;
    let mut stored = 0;
    loop {
        assert!(Instant::now() < deadline, "never refused");
        match send().await {
            Ok(_) => stored += 1,
            Err(error) if error.kind() == ErrorKind::Unauthenticated => break,
            Err(error) => assert_ne!(error.effect(), Effect::Done, "{error}"),
        }
        // Thousands would be stored by then.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    write("renewed.creds", &account, None);
    publish(&bus, numbered(&name, 0..2)).await;
    receive(&mut subscriber, stored + 2).await;
    drop(subscriber);
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}
