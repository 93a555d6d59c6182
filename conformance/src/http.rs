//! Services that are spoken to over HTTP, as far as the suite answers in their place.

/// An answer over HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpAnswer {
    /// The status, such as 400.
    pub status: u16,
    /// Names and values, in this order. The body's length is added.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

/// A service that is spoken to over HTTP/1.1 without encryption. See [`Harness::http`](crate::Harness::http).
pub trait HttpService: Send + Sync {
    /// What the service itself answers when it is asked too often, and has not done what was asked for. `content_type` is the
    /// request's, empty where it has none: a service that speaks several protocols answers in the one that it is asked in.
    fn throttled(&self, content_type: &str) -> HttpAnswer;
}
