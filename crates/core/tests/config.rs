//! Settings: the same from every source, laid over one another in the documented order, and every mistake at once.

mod common;

use std::time::Duration;

use anybroker_core::config::{Config, Format};
use anybroker_core::{
    Credentials, CredentialsProvider, Error, ErrorKind, Message, OnFailure, Order, PublishOrder, Registry, Secret,
    TopologyMode,
};
use common::{FIELDS, OtherDriver, TestDriver};

/// Everything that a configuration decides, as far as a broker and a service can see it.
#[derive(Debug, PartialEq, Clone)]
struct Seen {
    url: String,
    username: Option<String>,
    password: Option<String>,
    hosts: Vec<String>,
    connect_timeout: Duration,
    mode: String,
    level: i64,
    linger: Duration,
    compress: bool,
    tags: Vec<String>,
    token: Option<String>,
    client: String,
    admin: Option<String>,
    publish_timeout: Duration,
    publish_order: PublishOrder,
    max_in_flight: usize,
    lease: Duration,
    max_attempts: Option<u32>,
    crash_limit: Option<u32>,
    order: Order,
    on_failure: OnFailure,
    topology: TopologyMode,
}

async fn seen(config: Config) -> Seen {
    let driver = TestDriver::default();
    let registry = Registry::new().with(OtherDriver).with(driver.clone());
    let bus = registry.connect(config).await.expect("the settings are valid");
    bus.send(Message::new("d", "x")).await.expect("published");
    let section = driver.sections.lock().pop().expect("connected");
    let terms = driver.brokers.lock()[0].terms.lock().take().expect("published");
    let spec = bus.subscription("d", "g");
    Seen {
        url: section.url().to_string(),
        username: section.url().username().map(Into::into),
        password: section.url().password().map(|secret| secret.reveal().to_owned()),
        hosts: section.url().hosts().to_vec(),
        connect_timeout: section.connect_timeout(),
        mode: section.text("mode").to_owned(),
        level: section.integer("level"),
        linger: section.duration("linger"),
        compress: section.bool("compress"),
        tags: section.list("tags").to_vec(),
        token: section.secret("token").map(|secret| secret.reveal().to_owned()),
        client: section.text("client").to_owned(),
        admin: section.optional_text("admin").map(Into::into),
        publish_timeout: terms.timeout,
        publish_order: terms.order,
        max_in_flight: spec.max_in_flight,
        lease: spec.lease,
        max_attempts: spec.max_attempts,
        crash_limit: spec.crash_limit,
        order: spec.order,
        on_failure: spec.on_failure,
        topology: spec.topology,
    }
}

fn refused(config: Config) -> Error {
    let registry = Registry::new().with(OtherDriver).with(TestDriver::default());
    let error = registry.check(config).expect_err("the settings are wrong");
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    error
}

fn toml(text: &str) -> Config {
    Config::from_text(text, Format::Toml, "file x.toml").expect("valid TOML")
}

fn variables<const N: usize>(pairs: [(&str, &str); N]) -> [(String, String); N] {
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned()))
}

const TOML: &str = r#"
url = "test://me:s%26cret@a:1,b:2/path"
require = ["key_order", "nack_delay:native"]
connect_timeout = "3s"
publish_timeout = "4s"
publish_order = "none"
[subscribe]
max_in_flight = 7
lease = "1m"
max_attempts = 0
crash_limit = 9
order = "key"
on_failure = "park"
topology = "verify"
[test]
mode = "fast"
level = 5
linger = "1m 30s"
compress = true
tags = ["x", "y z"]
token = "hush"
client = "c"
admin = "http://a:8080"
"#;

const YAML: &str = r#"
url: "test://me:s%26cret@a:1,b:2/path"
require: [key_order, "nack_delay:native"]
connect_timeout: 3s
publish_timeout: 4s
publish_order: none
subscribe:
  max_in_flight: 7
  lease: 1m
  max_attempts: 0
  crash_limit: 9
  order: key
  on_failure: park
  topology: verify
test: {mode: fast, level: 5, linger: 1m 30s, compress: true, tags: [x, y z], token: hush, client: c,
       admin: "http://a:8080"}
"#;

const JSON: &str = r#"{
"url": "test://me:s%26cret@a:1,b:2/path", "require": ["key_order", "nack_delay:native"],
"connect_timeout": "3s", "publish_timeout": "4s", "publish_order": "none",
"subscribe": {"max_in_flight": 7, "lease": "1m", "max_attempts": 0, "crash_limit": 9, "order": "key",
              "on_failure": "park", "topology": "verify"},
"test": {"mode": "fast", "level": 5, "linger": "1m 30s", "compress": true, "tags": ["x", "y z"], "token": "hush",
         "client": "c", "admin": "http://a:8080"}
}"#;

const URL: &str = "test://me:s%26cret@a:1,b:2/path?require=key_order,nack_delay:native&connect_timeout=3s\
    &publish_timeout=4s&publish_order=none&subscribe.max_in_flight=7&subscribe.lease=1m&subscribe.max_attempts=0\
    &subscribe.crash_limit=9&subscribe.order=key&subscribe.on_failure=park&subscribe.topology=verify&mode=fast\
    &level=5&linger=1m%2030s&compress=true&tags=x,y%20z&token=hush&client=c&admin=http://a:8080";

const VARIABLES: [(&str, &str); 20] = [
    ("ANYBROKER_URL", "test://me:s%26cret@a:1,b:2/path"),
    ("ANYBROKER_REQUIRE", "key_order, nack_delay:native"),
    ("ANYBROKER_CONNECT_TIMEOUT", "3s"),
    ("ANYBROKER_PUBLISH_TIMEOUT", "4s"),
    ("ANYBROKER_PUBLISH_ORDER", "none"),
    ("ANYBROKER_SUBSCRIBE__MAX_IN_FLIGHT", "7"),
    ("ANYBROKER_SUBSCRIBE__LEASE", "1m"),
    ("ANYBROKER_SUBSCRIBE__MAX_ATTEMPTS", "0"),
    ("ANYBROKER_SUBSCRIBE__CRASH_LIMIT", "9"),
    ("ANYBROKER_SUBSCRIBE__ORDER", "key"),
    ("ANYBROKER_SUBSCRIBE__ON_FAILURE", "park"),
    ("ANYBROKER_SUBSCRIBE__TOPOLOGY", "verify"),
    ("ANYBROKER_TEST__MODE", "fast"),
    ("ANYBROKER_TEST__LEVEL", "5"),
    ("ANYBROKER_TEST__LINGER", "1m 30s"),
    ("ANYBROKER_TEST__COMPRESS", "true"),
    ("ANYBROKER_TEST__TAGS", "x,y z"),
    ("ANYBROKER_TEST__TOKEN", "hush"),
    ("ANYBROKER_TEST__CLIENT", "c"),
    ("ANYBROKER_TEST__ADMIN", "http://a:8080"),
];

#[tokio::test]
async fn every_source_gives_the_same_settings() {
    let expected = Seen {
        url: "test://a:1,b:2/path".into(),
        username: Some("me".into()),
        password: Some("s&cret".into()),
        hosts: vec!["a:1".into(), "b:2".into()],
        connect_timeout: Duration::from_secs(3),
        mode: "fast".into(),
        level: 5,
        linger: Duration::from_secs(90),
        compress: true,
        tags: vec!["x".into(), "y z".into()],
        token: Some("hush".into()),
        client: "c".into(),
        admin: Some("http://a:8080".into()),
        publish_timeout: Duration::from_secs(4),
        publish_order: PublishOrder::None,
        max_in_flight: 7,
        lease: Duration::from_secs(60),
        max_attempts: None,
        crash_limit: Some(9),
        order: Order::Key,
        on_failure: OnFailure::Park,
        topology: TopologyMode::Verify,
    };
    for (text, format) in [(TOML, Format::Toml), (YAML, Format::Yaml), (JSON, Format::Json)] {
        let config = Config::from_text(text, format, "text").expect("valid");
        assert_eq!(seen(config).await, expected, "{format:?}");
    }
    assert_eq!(seen(Config::from_url(URL)).await, expected, "URL");
    assert_eq!(seen(Config::new().with_variables(variables(VARIABLES))).await, expected, "environment");
}

#[tokio::test]
async fn a_file_is_read_by_its_ending() {
    let folder = tempfile::tempdir().expect("a folder");
    let expected = seen(toml(TOML)).await;
    for (name, text) in [("a.toml", TOML), ("b.yaml", YAML), ("c.yml", YAML), ("d.json", JSON)] {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        assert_eq!(seen(Config::from_file(&path).expect("readable")).await, expected, "{name}");
    }
}

#[tokio::test]
async fn what_is_not_set_has_its_default() {
    let seen = seen(Config::from_url("test://a")).await;
    assert_eq!((seen.mode.as_str(), seen.level, seen.linger), ("safe", 3, Duration::from_millis(5)));
    assert_eq!((seen.compress, seen.token, seen.client.as_str(), seen.admin), (false, None, "anybroker", None));
    assert_eq!((seen.connect_timeout, seen.publish_timeout), (Duration::from_secs(10), Duration::from_secs(30)));
    assert_eq!((seen.publish_order, seen.max_in_flight), (PublishOrder::Key, 1000));
    assert_eq!((seen.max_attempts, seen.crash_limit), (Some(5), Some(20)));
    assert_eq!((seen.order, seen.on_failure, seen.topology), (Order::None, OnFailure::GoPast, TopologyMode::Declare));
}

#[tokio::test]
async fn the_later_source_wins_url_file_environment_program() {
    // Each of the four sets one setting more than the one above it.
    let file = "url = 'test://file?level=1&client=url&linger=1s&admin=url'\n[test]\nclient = 'file'\nlinger = '2s'\n\
                admin = 'file'";
    let config = toml(file)
        .with_variables(variables([("ANYBROKER_TEST__LINGER", "3s"), ("ANYBROKER_TEST__ADMIN", "environment")]))
        .with("test.admin", "program");
    let seen = seen(config).await;
    assert_eq!(seen.level, 1, "only the URL");
    assert_eq!(seen.client, "file", "the file over the URL");
    assert_eq!(seen.linger, Duration::from_secs(3), "the environment over the file");
    assert_eq!(seen.admin.as_deref(), Some("program"), "the program over all");
}

#[tokio::test]
async fn the_url_itself_follows_the_same_precedence() {
    let file = || toml("url = 'test://file'");
    let environment = variables([("ANYBROKER_URL", "test://environment")]);
    assert_eq!(seen(file()).await.hosts, ["file"]);
    assert_eq!(seen(file().with_variables(environment.clone())).await.hosts, ["environment"]);
    let program = file().with_variables(environment).with("url", "test://program");
    assert_eq!(seen(program).await.hosts, ["program"]);
    assert_eq!(seen(file().overlaid_by(Config::from_url("test://over"))).await.hosts, ["over"]);
}

#[tokio::test]
async fn variables_of_the_tools_around_are_no_settings() {
    let config = Config::from_url("test://a").with_variables(variables([
        ("ANYBROKER_CONFIG", "x.toml"),
        ("ANYBROKER_LOG", "debug"),
        ("ANYBROKER_TEST_KAFKA_URL", "kafka://x"),
        ("OTHER_URL", "nothing of ours"),
        ("anybroker_level", "lower case is not ours"),
    ]));
    seen(config).await;
}

#[test]
fn a_scheme_that_nobody_knows_is_refused_and_the_known_ones_are_named() {
    let error = refused(Config::from_url("amqp://a"));
    for name in ["amqp", "other", "test", "test+tls"] {
        assert!(error.message().contains(name), "{error}");
    }
}

#[test]
fn an_unknown_key_is_refused_wherever_it_stands() {
    for config in [
        Config::from_url("test://a?colour=red"),
        Config::from_url("test://a?subscribe.colour=red"),
        toml("url = 'test://a'\ncolour = 'red'"),
        toml("url = 'test://a'\n[test]\ncolour = 'red'"),
        toml("url = 'test://a'\n[subscribe]\ncolour = 'red'"),
        toml("url = 'test://a'\n[colour]\nred = 1"),
        toml("url = 'test://a'\n[test.mode]\ncolour = 'red'"),
        Config::from_url("test://a").with_variables(variables([("ANYBROKER_COLOUR", "red")])),
        Config::from_url("test://a").with_variables(variables([("ANYBROKER_TEST__COLOUR", "red")])),
        Config::from_url("test://a").with("test.colour", "red"),
        Config::from_url("other://a?colour=red"),
    ] {
        let shown = format!("{config:?}");
        let error = refused(config);
        assert!(error.message().starts_with("1 problem: "), "{shown}: {error}");
    }
}

#[test]
fn an_unknown_key_of_a_broker_without_settings_is_called_a_key() {
    let error = refused(Config::from_url("other://a?colour=red"));
    assert!(error.message().contains("other.colour"), "{error}");
    assert!(!error.message().contains("unknown section"), "{error}");
}

#[test]
fn sections_of_other_brokers_may_stand_in_the_same_file() {
    let registry = Registry::new().with(OtherDriver).with(TestDriver::default());
    let config = toml("url = 'other://a'\n[test]\nmode = 'fast'\n[other]");
    registry.check(config).expect("swapping is a change of the URL");
}

#[test]
fn a_value_of_the_wrong_type_names_what_was_expected() {
    for (key, value, expected) in [
        ("test.mode", "'slow'", "one of fast, safe"),
        ("test.level", "10", "from 0 to 9"),
        ("test.level", "-1", "from 0 to 9"),
        ("test.level", "2.5", "whole number"),
        ("test.level", "'many'", "whole number"),
        ("test.linger", "5", "with a unit"),
        ("test.linger", "'5'", "with a unit"),
        ("test.linger", "'soon'", "with a unit"),
        ("test.compress", "1", "true or false"),
        ("test.compress", "'yes'", "true or false"),
        ("test.tags", "[1]", "list of texts"),
        ("test.tags", "5", "list of texts"),
        ("test.token", "5", "a text"),
        ("test.client", "''", "not empty"),
        ("publish_timeout", "true", "with a unit"),
        ("publish_order", "'total'", "one of key, none"),
        ("subscribe.max_in_flight", "0", "from 1 to"),
        ("subscribe.order", "'keys'", "one of none, key, total"),
        ("require", "['exactly_once']", "exactly_once"),
        ("connect_timeout", "{ secs = 1 }", "connect_timeout"),
    ] {
        let table = match key.split_once('.') {
            Some((section, name)) => format!("url = 'test://a'\n[{section}]\n{name} = {value}"),
            None => format!("url = 'test://a'\n{key} = {value}"),
        };
        let error = refused(toml(&table));
        assert!(error.message().starts_with("1 problem: "), "{key} = {value}: {error}");
        assert!(error.message().contains(key), "{key} = {value}: {error}");
        assert!(error.message().contains(expected), "{key} = {value}: {error}");
    }
}

#[test]
fn three_mistakes_are_told_at_once_with_where_each_came_from() {
    let config = toml("url = 'test://a'\ncolour = 'red'\n[test]\nmode = 'slow'")
        .with_variables(variables([("ANYBROKER_PUBLISH_TIMEOUT", "soon")]));
    let error = refused(config);
    assert!(error.message().starts_with("3 problems: "), "{error}");
    for part in ["colour (file x.toml)", "test.mode (file x.toml)", "publish_timeout (environment ANYBROKER_PUBLISH_"] {
        assert!(error.message().contains(part), "{part}: {error}");
    }
}

#[test]
fn a_wrong_url_does_not_hide_the_other_mistakes() {
    for url in ["amqp://a", "nonsense"] {
        let text = format!("url = '{url}'\npublish_timeout = 5\n[subscribe]\norder = 'x'\n[colour]\nred = 1");
        let error = refused(toml(&text));
        assert!(error.message().starts_with("4 problems: "), "{url}: {error}");
    }
    assert!(refused(Config::new().with("publish_timeout", 5)).message().starts_with("2 problems: "));
}

#[test]
fn a_wrong_url_is_told_once() {
    for value in [serde_json::json!(5), serde_json::json!(""), serde_json::json!("x"), serde_json::json!(["test://a"])]
    {
        let error = refused(Config::new().with("url", value.clone()));
        assert!(error.message().starts_with("1 problem: "), "{value}: {error}");
    }
}

#[test]
fn what_the_adapter_finds_is_told_together_with_the_rest() {
    let error = refused(Config::from_url("test://?mode=slow&colour=red"));
    assert!(error.message().starts_with("3 problems: "), "{error}");
    assert!(error.message().contains("a host is missing"), "{error}");
    let error = refused(Config::from_url("test://a?mode=fast&level=9"));
    assert!(error.message().contains("levels up to 5"), "{error}");
}

#[test]
fn subscription_defaults_that_contradict_each_other_are_refused_at_connect() {
    let error = refused(Config::from_url("test://a?subscribe.on_failure=block"));
    assert!(error.message().contains("subscribe.on_failure"), "{error}");
    let error = refused(Config::from_url("test://a?subscribe.lease=0s"));
    assert!(error.message().contains("subscribe.lease"), "{error}");
}

#[test]
fn a_setting_that_stands_twice_in_a_url_is_refused() {
    let error = refused(Config::from_url("test://a?level=1&level=2"));
    assert!(error.message().contains("test.level"), "{error}");
}

#[test]
fn a_file_that_cannot_be_read_is_told_apart_from_one_that_is_missing() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = Config::from_file(folder.path().join("none.toml")).expect_err("missing");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("none.toml"), "{missing}");

    let path = folder.path().join("folder.toml");
    std::fs::create_dir(&path).expect("created");
    assert_eq!(Config::from_file(&path).expect_err("a folder").kind(), ErrorKind::ConfigInvalid);

    let path = folder.path().join("binary.toml");
    std::fs::write(&path, [0xff, 0xfe]).expect("written");
    assert_eq!(Config::from_file(&path).expect_err("not UTF-8").kind(), ErrorKind::ConfigInvalid);

    for name in ["settings.ini", "settings"] {
        let path = folder.path().join(name);
        std::fs::write(&path, "url = 'test://a'").expect("written");
        assert_eq!(Config::from_file(&path).expect_err(name).kind(), ErrorKind::ConfigInvalid);
    }
}

#[cfg(unix)]
#[test]
fn a_file_without_permission_is_permission_denied() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("secret.toml");
    std::fs::write(&path, "url = 'test://a'").expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).expect("changed");
    // The superuser may read everything; then there is nothing to refuse.
    if std::fs::read(&path).is_err() {
        assert_eq!(Config::from_file(&path).expect_err("no permission").kind(), ErrorKind::PermissionDenied);
    }
}

#[test]
fn a_file_that_is_empty_or_no_table_is_no_configuration() {
    for (text, format) in [("", Format::Toml), ("", Format::Yaml), ("{}", Format::Json)] {
        let config = Config::from_text(text, format, "text").expect("readable");
        assert!(refused(config).message().contains("url"));
    }
    for (text, format) in [("[1]", Format::Json), ("- a", Format::Yaml), ("text", Format::Yaml), ("", Format::Json)] {
        let error = Config::from_text(text, format, "text").expect_err(text);
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{format:?} {text}");
    }
}

#[test]
fn the_schema_lists_every_setting_and_nothing_else() {
    let schema = Registry::new().with(OtherDriver).with(TestDriver::default()).json_schema();
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["required"], serde_json::json!(["url"]));
    let names = |value: &serde_json::Value| -> Vec<String> {
        value["properties"].as_object().expect("an object").keys().cloned().collect()
    };
    let common = [
        "connect_timeout",
        "credentials_file",
        "other",
        "publish_order",
        "publish_timeout",
        "require",
        "subscribe",
        "test",
        "url",
    ];
    assert_eq!(names(&schema), common);
    let subscribe = ["crash_limit", "lease", "max_attempts", "max_in_flight", "on_failure", "order", "topology"];
    assert_eq!(names(&schema["properties"]["subscribe"]), subscribe);
    let section = &schema["properties"]["test"];
    let mut fields: Vec<&str> = FIELDS.iter().map(|field| field.name).collect();
    fields.sort_unstable();
    assert_eq!(names(section), fields);
    assert_eq!(section["additionalProperties"], false);
    assert_eq!(section["properties"]["level"]["default"], 3);
    assert_eq!(section["properties"]["mode"]["enum"], serde_json::json!(["fast", "safe"]));
    for field in FIELDS {
        assert_eq!(section["properties"][field.name]["description"], field.doc);
    }
}

#[test]
fn what_the_schema_says_of_durations_is_what_is_accepted() {
    let schema = Registry::new().with(TestDriver::default()).json_schema();
    let pattern = schema["properties"]["publish_timeout"]["pattern"].as_str().expect("a pattern");
    assert_eq!(pattern, "^[0-9][0-9a-z ]*$", "the texts below are written for this pattern");
    for text in ["250ms", "30s", "5m", "2h", "1h 30m", "1day"] {
        let config = Config::from_url("test://a").with("publish_timeout", text);
        Registry::new().with(TestDriver::default()).check(config).expect(text);
    }
}

struct Fixed;

#[async_trait::async_trait]
impl CredentialsProvider for Fixed {
    async fn credentials(&self) -> anybroker_core::Result<Credentials> {
        Ok(Credentials::Password { user: "of the program".into(), password: Secret::new("x") })
    }
}

#[tokio::test]
async fn an_adapter_is_told_the_credentials_of_the_program_or_of_the_file_or_of_the_url() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("login.json");
    std::fs::write(&file, r#"{"user": "of the file", "password": "y"}"#).expect("written");
    let of_file = Config::from_url("test://host").with("credentials_file", file.display().to_string());
    let of_url = Config::from_url("test://of-the-url:z@host");
    let sources = [
        (Config::from_url("test://host"), None),
        (of_url, Some(("of-the-url", false))),
        (of_file.clone(), Some(("of the file", true))),
        (of_file.clone().with_credentials(Fixed), Some(("of the program", true))),
        (Config::from_url("test://host").with_credentials(Fixed).overlaid_by(of_file), Some(("of the program", true))),
    ];
    for (config, expected) in sources {
        let driver = TestDriver::default();
        Registry::new().with(driver.clone()).connect(config).await.expect("the settings are valid");
        let section = driver.sections.lock().pop().expect("connected");
        let found = match section.login() {
            Some(login) => match login.now().await.expect("readable") {
                Credentials::Password { user, .. } => Some((user, login.may_change())),
                other => panic!("{other:?}"),
            },
            None => None,
        };
        assert_eq!(found.as_ref().map(|(user, may_change)| (user.as_str(), *may_change)), expected);
    }
}

#[test]
fn credentials_stand_in_one_place_and_only_where_the_adapter_shows_them() {
    for (url, expected) in [("test://me:secret@host", "one place"), ("other://host", "takes no credentials")] {
        for config in [
            Config::from_url(url).with_credentials(Fixed),
            Config::from_url(url).with("credentials_file", "/run/secrets/login.json"),
        ] {
            let error = refused(config);
            assert!(error.message().contains(expected), "{error}");
            assert!(error.message().contains("credentials"), "{error}");
        }
    }
}
