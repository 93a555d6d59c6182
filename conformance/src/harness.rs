//! What an adapter's author gives the suite.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bus, Error, ErrorKind, ManualClock, Result};
use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::{HttpService, NativeChannel, Route, ServerControl, routes_of, url_through};

/// An endpoint under test. The suite creates destinations under names of its own, deletes what it created where
/// the endpoint can, and touches nothing else.
#[async_trait]
pub trait Harness: Send + Sync + 'static {
    /// What the report calls it, such as the URL without credentials.
    fn name(&self) -> String;

    /// What the report says about the endpoint beyond what a client sees.
    fn about(&self) -> About {
        About::default()
    }

    /// A fresh client of the same broker.
    ///
    /// # Errors
    /// What connecting says; the case that asked for it fails.
    async fn connect(&self) -> Result<Bus>;

    /// A fresh client that creates no destinations when it publishes; `None` where the endpoint has no such setting.
    async fn connect_strict(&self) -> Option<Result<Bus>> {
        None
    }

    /// The lease that cases about leases wait for. Raised to the record's shortest. Default 1 s.
    fn lease(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// How long nothing must happen before an absence counts as one. Default 2 s.
    fn quiet(&self) -> Duration {
        Duration::from_secs(2)
    }

    /// How long something may take that must happen. Default 30 s.
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }

    /// The broker's clock, where it is turned by hand. Cases then run one after the other.
    fn clock(&self) -> Option<ManualClock> {
        None
    }

    /// Whether the endpoint is set up to lose connections or lanes by itself. A case that expects exact deliveries
    /// may then not come about: when it fails after such a loss, and its history has no anomaly, it counts as not
    /// run, with that reason. The history is checked all the same.
    fn is_disturbed(&self) -> bool {
        false
    }

    /// The addresses of the server that a proxy can stand in front of, for the cases about lost connections; or why none
    /// can. Those cases then count as not run, with that reason.
    ///
    /// # Errors
    /// Why no proxy can stand there.
    fn routes(&self) -> std::result::Result<Vec<Route>, String> {
        Err("the harness names no address that a proxy could stand in front of".into())
    }

    /// A fresh client that finds the server at these addresses: one for each of the [routes](Harness::routes), in their
    /// order. Called only where there are some.
    ///
    /// # Errors
    /// What connecting says; the case that asked for it fails.
    async fn connect_through(&self, addresses: &[SocketAddr]) -> Result<Bus> {
        Err(Error::new(ErrorKind::Unsupported, "connect", format!("no way through {addresses:?}")))
    }

    /// The service behind those addresses, where it is spoken to over HTTP, for the cases in which a proxy answers in its place;
    /// or why it is not. Those cases then count as not run, with that reason.
    ///
    /// # Errors
    /// Why nothing can answer in its place.
    fn http(&self) -> std::result::Result<Arc<dyn HttpService>, String> {
        Err(NO_HTTP.into())
    }

    /// The process of the server, where the harness may kill and freeze it; nobody else may be using it. Or why it may not: the
    /// cases about that then count as not run, with that reason.
    ///
    /// # Errors
    /// Why the server is left alone.
    fn server(&self) -> std::result::Result<Arc<dyn ServerControl>, String> {
        Err(NO_SERVER.into())
    }

    /// A command that starts another process, which calls [`run_child`](crate::run_child) with clients of the same broker, for
    /// the cases about publishers and members that are killed; or why none can. Those cases then count as not run, with
    /// that reason. The suite gives the process its standard input and output, and the variable
    /// [`CHILD_JOB`](crate::CHILD_JOB).
    ///
    /// # Errors
    /// Why there is none.
    fn child(&self) -> std::result::Result<Command, String> {
        Err("the harness starts no processes that the suite could kill".into())
    }

    /// The bare client of the broker, past the adapter, for the cases of the theme `native`; or why there is none. Those
    /// cases then count as not run, with that reason.
    ///
    /// # Errors
    /// Why there is none.
    fn native(&self) -> std::result::Result<Arc<dyn NativeChannel>, String> {
        Err("the harness has no native channel: the bare client is not known to it".into())
    }
}

const NO_HTTP: &str =
    "the harness names no service that is spoken to over HTTP, so that no proxy can answer in its place";

const NO_SERVER: &str = "the harness has no server in its hands that it could kill, freeze, fill or lock";

/// See [`Harness::about`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    /// Product and version of the client library, such as `librdkafka 2.11.0`.
    pub client: Option<String>,
    /// What stands in for the product, where it is not the product itself, such as `ElasticMQ in the place of Amazon SQS`.
    pub emulated: Option<String>,
}

type Connect = Box<dyn Fn() -> BoxFuture<'static, Result<Bus>> + Send + Sync>;
type Child = Box<dyn Fn() -> Command + Send + Sync>;
type ConnectThrough = Box<dyn Fn(Vec<SocketAddr>) -> BoxFuture<'static, Result<Bus>> + Send + Sync>;

/// A harness from a function that connects, as `anybroker conform --url` uses it.
pub struct UrlHarness {
    name: String,
    connect: Connect,
    connect_strict: Option<Connect>,
    lease: Duration,
    quiet: Duration,
    patience: Duration,
    clock: Option<ManualClock>,
    disturbed: bool,
    through: Option<(Vec<Route>, ConnectThrough)>,
    http: std::result::Result<Arc<dyn HttpService>, String>,
    server: std::result::Result<Arc<dyn ServerControl>, String>,
    child: Option<Child>,
    native: std::result::Result<Arc<dyn NativeChannel>, String>,
    about: About,
}

impl UrlHarness {
    /// `connect` gives a fresh client of the same broker each time.
    pub fn new(
        name: impl Into<String>,
        connect: impl Fn() -> BoxFuture<'static, Result<Bus>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            connect: Box::new(connect),
            connect_strict: None,
            lease: Duration::from_secs(1),
            quiet: Duration::from_secs(2),
            patience: Duration::from_secs(30),
            clock: None,
            disturbed: false,
            through: None,
            http: Err(NO_HTTP.into()),
            server: Err(NO_SERVER.into()),
            child: None,
            native: Err("the harness has no native channel: the bare client is not known to it".into()),
            about: About::default(),
        }
    }

    /// A harness of the endpoint with that URL, with a proxy in front of each of its hosts for the cases that want some.
    /// `connect` gives a fresh client of the URL that it is handed.
    ///
    /// # Errors
    /// As [`routes_of`](crate::routes_of).
    pub fn behind_proxies(
        name: impl Into<String>,
        url: &str,
        connect: impl Fn(String) -> BoxFuture<'static, Result<Bus>> + Send + Sync + 'static,
    ) -> std::result::Result<Self, String> {
        let routes = routes_of(url)?;
        let connect = Arc::new(connect);
        let (direct, through, to) = (url.to_owned(), url.to_owned(), Arc::clone(&connect));
        let harness = Self::new(name, move || connect(direct.clone()));
        Ok(harness.with_proxies(routes, move |addresses| to(url_through(&through, &addresses))))
    }

    /// How to get a client that creates no destinations. See [`Harness::connect_strict`].
    #[must_use]
    pub fn with_strict(
        mut self,
        connect: impl Fn() -> BoxFuture<'static, Result<Bus>> + Send + Sync + 'static,
    ) -> Self {
        self.connect_strict = Some(Box::new(connect));
        self
    }

    /// See [`Harness::lease`].
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// See [`Harness::quiet`].
    #[must_use]
    pub fn with_quiet(mut self, quiet: Duration) -> Self {
        self.quiet = quiet;
        self
    }

    /// See [`Harness::patience`].
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// See [`Harness::is_disturbed`].
    #[must_use]
    pub fn with_disturbances(mut self) -> Self {
        self.disturbed = true;
        self
    }

    /// Where proxies can stand, and how to get a client behind them. See [`Harness::routes`] and
    /// [`Harness::connect_through`].
    #[must_use]
    pub fn with_proxies(
        mut self,
        routes: Vec<Route>,
        connect: impl Fn(Vec<SocketAddr>) -> BoxFuture<'static, Result<Bus>> + Send + Sync + 'static,
    ) -> Self {
        self.through = Some((routes, Box::new(connect)));
        self
    }

    /// See [`Harness::http`].
    #[must_use]
    pub fn with_http(mut self, service: Arc<dyn HttpService>) -> Self {
        self.http = Ok(service);
        self
    }

    /// See [`Harness::server`].
    #[must_use]
    pub fn with_server(mut self, server: Arc<dyn ServerControl>) -> Self {
        self.server = Ok(server);
        self
    }

    /// See [`Harness::child`].
    #[must_use]
    pub fn with_child(mut self, command: impl Fn() -> Command + Send + Sync + 'static) -> Self {
        self.child = Some(Box::new(command));
        self
    }

    /// See [`Harness::native`].
    #[must_use]
    pub fn with_native(mut self, native: Arc<dyn NativeChannel>) -> Self {
        self.native = Ok(native);
        self
    }

    /// See [`Harness::about`].
    #[must_use]
    pub fn with_about(mut self, about: About) -> Self {
        self.about = about;
        self
    }

    /// See [`Harness::clock`].
    #[must_use]
    pub fn with_clock(mut self, clock: ManualClock) -> Self {
        self.clock = Some(clock);
        self
    }
}

#[async_trait]
impl Harness for UrlHarness {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn about(&self) -> About {
        self.about.clone()
    }

    async fn connect(&self) -> Result<Bus> {
        (self.connect)().await
    }

    async fn connect_strict(&self) -> Option<Result<Bus>> {
        match &self.connect_strict {
            Some(connect) => Some(connect().await),
            None => None,
        }
    }

    fn lease(&self) -> Duration {
        self.lease
    }

    fn quiet(&self) -> Duration {
        self.quiet
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    fn clock(&self) -> Option<ManualClock> {
        self.clock.clone()
    }

    fn is_disturbed(&self) -> bool {
        self.disturbed
    }

    fn routes(&self) -> std::result::Result<Vec<Route>, String> {
        match &self.through {
            Some((routes, _)) => Ok(routes.clone()),
            None => Err("the harness names no address that a proxy could stand in front of".into()),
        }
    }

    async fn connect_through(&self, addresses: &[SocketAddr]) -> Result<Bus> {
        match &self.through {
            Some((_, connect)) => connect(addresses.to_vec()).await,
            None => Err(Error::new(ErrorKind::Unsupported, "connect", "the harness has no way through a proxy")),
        }
    }

    fn http(&self) -> std::result::Result<Arc<dyn HttpService>, String> {
        self.http.clone()
    }

    fn server(&self) -> std::result::Result<Arc<dyn ServerControl>, String> {
        self.server.clone()
    }

    fn child(&self) -> std::result::Result<Command, String> {
        match &self.child {
            Some(command) => Ok(command()),
            None => Err("the harness starts no processes that the suite could kill".into()),
        }
    }

    fn native(&self) -> std::result::Result<Arc<dyn NativeChannel>, String> {
        self.native.clone()
    }
}

impl std::fmt::Debug for UrlHarness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UrlHarness").field("name", &self.name).finish_non_exhaustive()
    }
}
