//! A password that is typed anywhere never comes back out: not in messages, not in debug output.

mod common;

use anybroker_core::config::{Config, EndpointUrl, Format};
use anybroker_core::{ErrorKind, Registry, Secret};
use common::{OtherDriver, TestDriver};

const MARKER: &str = "MARKER";

fn silent(what: &str, shown: &str) {
    assert!(!shown.to_lowercase().contains("marker"), "{what} shows the secret: {shown}");
}

fn registry() -> Registry {
    Registry::new().with(OtherDriver).with(TestDriver::default())
}

#[test]
fn a_broken_file_is_not_repeated_in_its_error() {
    let toml = [
        "url = \"test://me:MARKER@a",
        "url = test://me:MARKER@a",
        "url = 'test://me:MARKER@a'\n[test\ntoken = 'MARKER'",
        "[test]\ntoken = MARKER",
        "[test]\ntoken = 'MARKER'\ntoken = 'MARKER'",
        "[test]\ntoken = \"\\qMARKER\"",
        "[test]\ntoken 'MARKER'",
        "[test]\n\"token\" = 'a' MARKER",
        "[test]\ntoken = 2026-99-99MARKER",
        "token = 0xMARKER",
        "token = [ 'MARKER'",
        "a = { token = 'MARKER' ",
        "MARKER",
        "\"\"\"MARKER",
        "[test]\ntoken = 'x'\n[test]\ntoken = 'MARKER'",
        "a = 1\na.token = 'MARKER'",
    ];
    let yaml = [
        "url: \"test://me:MARKER@a",
        "test: {token: MARKER",
        "test:\n  token: MARKER\n token: MARKER",
        "token: *MARKER",
        "token: !!int MARKER",
        "token: &MARKER [",
        "%MARKER",
        "a: b: MARKER",
        "? [MARKER]\n: 1",
    ];
    let json =
        ["{\"url\": \"test://me:MARKER@a", "{\"token\": MARKER}", "{\"token\": \"\\qMARKER\"}", "MARKER", "\"MARKER"];
    let texts = toml.iter().map(|text| (*text, Format::Toml));
    let texts = texts.chain(yaml.iter().map(|text| (*text, Format::Yaml)));
    for (text, format) in texts.chain(json.iter().map(|text| (*text, Format::Json))) {
        match Config::from_text(text, format, "text") {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
                silent(text, &format!("{error} {error:?}"));
            }
            // Some of it is valid for its parser; then the check refuses it.
            Ok(config) => {
                silent(text, &format!("{config:?}"));
                let error = registry().check(config).expect_err(text);
                assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
            }
        }
    }
}

#[test]
fn a_url_that_is_refused_is_not_repeated() {
    for url in [
        "test//me:MARKER@a",
        "me:MARKER@test://a",
        "TEST://me:MARKER@a",
        "te st+MARKER://a",
        "test://me:MARKER@a#x",
        "test://me:MAR#KERMARKER@a",
        "test://me:%ffMARKER@a",
        // A password with a slash or a question mark in it, not encoded: what follows looks like path or query.
        "test://me:x/MARKER@a",
        "test://me:MARKER/x@a",
        "test://me:x?MARKER@a",
        "test://me:MARKER?x@a",
        "test://me:MARKER?x=1@a",
        "test://me:12/MARKER@a:9092/path",
        "test://MARKER/x:y@a",
        "amqp://me:MARKER@a?x=MARKER",
        "test://me:MARKER@a?colour=MARKER",
        "test://me:MARKER@a?token=MARKER&mode=slow",
        "test://me:MARKER@?token=MARKER",
    ] {
        let error = registry().check(Config::from_url(url)).expect_err(url);
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
        silent(url, &format!("{error} {error:?}"));
    }
}

#[test]
fn a_url_of_the_wrong_type_is_not_repeated() {
    for value in [serde_json::json!(["test://me:MARKER@a"]), serde_json::json!({"full": "test://me:MARKER@a"})] {
        let error = registry().check(Config::new().with("url", value)).expect_err("no text");
        silent("url", &format!("{error} {error:?}"));
    }
}

#[test]
fn a_secret_of_the_wrong_type_and_a_table_in_place_of_a_value_are_not_repeated() {
    for value in [
        serde_json::json!(["MARKER"]),
        serde_json::json!({"value": "MARKER"}),
        serde_json::json!({"MARKER": 1}),
        serde_json::Value::Null,
    ] {
        for key in ["test.token", "test.mode", "test.level", "test.tags", "publish_timeout", "subscribe.order"] {
            let config = Config::from_url("test://a").with(key, value.clone());
            // A list of one text is a list of texts.
            let Err(error) = registry().check(config) else { continue };
            silent(key, &format!("{error} {error:?}"));
        }
    }
}

#[test]
fn a_secret_that_is_a_number_is_not_repeated() {
    let error = registry().check(Config::from_url("test://a").with("test.token", 424_242)).expect_err("no text");
    assert!(!format!("{error} {error:?}").contains("424242"), "{error}");
}

#[test]
fn a_port_that_is_no_number_may_be_the_first_part_of_a_password() {
    for url in ["test://me:MARKER?level=1", "test://a,me:MARKER", "test://a:", "test://a:70000", "test://[::1]:MARKER"]
    {
        silent(url, &EndpointUrl::parse(url).expect_err(url));
    }
    for url in ["test://a:1", "test://a,b:65535", "test://[::1]", "test://[::1]:1", "test://"] {
        EndpointUrl::parse(url).expect(url);
    }
}

#[tokio::test]
async fn a_valid_configuration_never_shows_its_secrets() {
    let driver = TestDriver::default();
    let registry = Registry::new().with(driver.clone());
    let config = Config::from_url("test://me:MARKER@a/x?token=MARKER")
        .with_variables([("ANYBROKER_TEST__TOKEN".to_owned(), MARKER.to_owned())]);
    silent("Config", &format!("{config:?} {config:#?}"));
    let bus = registry.connect(config).await.expect("valid");
    silent("Bus", &format!("{bus:?} {bus:#?} {:?} {}", bus.endpoint(), bus.endpoint()));
    silent("Registry", &format!("{registry:?}"));
    let section = driver.sections.lock().pop().expect("connected");
    silent("Section", &format!("{section:?} {section:#?} {:?} {}", section.url(), section.url()));
    assert_eq!(section.secret("token").map(Secret::reveal), Some(MARKER));
    assert_eq!(section.url().password().map(Secret::reveal), Some(MARKER));
    silent("Secret", &format!("{:?} {:#?}", section.secret("token"), section.url().password()));
}

#[tokio::test]
async fn an_unmet_requirement_does_not_show_the_secrets_of_its_url() {
    let mut record = common::record();
    record.key_order = anybroker_core::Support::refused("use something else");
    let driver = TestDriver { record: Some(record), ..TestDriver::default() };
    let config = Config::from_url("test://me:MARKER@a?token=MARKER&require=key_order");
    let error = Registry::new().with(driver).connect(config).await.expect_err("unmet");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    silent("unmet requirement", &format!("{error} {error:?}"));
}

#[test]
fn a_password_may_hold_anything_when_it_is_encoded() {
    let url = EndpointUrl::parse("test://k%40y:a%2Fb%3Fc%23d%40e:f@[::1]:9092,b/p%40th?x=a%40b").expect("valid");
    assert_eq!(url.username(), Some("k@y"));
    assert_eq!(url.password().map(Secret::reveal), Some("a/b?c#d@e:f"));
    assert_eq!((url.hosts(), url.path()), (&["[::1]:9092".to_owned(), "b".to_owned()][..], "/p@th"));
}

#[test]
fn an_at_sign_in_a_path_without_hosts_is_part_of_the_path() {
    let url = EndpointUrl::parse("embedded:///home/me@here/x.db?note=a@b").expect("valid");
    assert_eq!(url.path(), "/home/me@here/x.db");
}
