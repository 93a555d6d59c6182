//! The bare client of a broker, past the adapter: what an adapter writes is looked at without it, and what other programs write
//! is read by it. Two mistakes of an adapter that cancel each other out are seen from here.

use async_trait::async_trait;

/// Puts and takes messages with the client library itself. A harness that has one gives it to the cases of the theme `native`.
#[async_trait]
pub trait NativeChannel: Send + Sync + 'static {
    /// What a message of another program can hold on this broker.
    fn carries(&self) -> Carries;

    /// Writes messages as a program would that does not know this library, together where the client makes batches.
    ///
    /// # Errors
    /// Why not; the case fails.
    async fn put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), String>;

    /// Reads `count` messages as they lie there, in any order; fewer when no more come in a reasonable time, which the case sees.
    ///
    /// # Errors
    /// Why not; the case fails.
    async fn take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, String>;
}

/// Where messages lie, by the names that the broker knows.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// What `describe` answers for the destination.
    pub destination: String,
    /// What it answers for the only group.
    pub group: String,
}

impl Place {
    pub(crate) fn new(destination: String, group: String) -> Self {
        Self { destination, group }
    }
}

/// What a broker's own messages can hold. What it cannot is left out of what the cases put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts")]
pub struct Carries {
    /// Payloads of any bytes; texts only otherwise.
    pub any_bytes: bool,
    /// Payloads of no bytes.
    pub empty: bool,
    /// Payloads that are null.
    pub null: bool,
    /// Keys, in a place of the broker's.
    pub keys: bool,
    /// A content type, in a place of its own or in the header `content-type`.
    pub content_type: bool,
    /// Header values of any bytes; texts only otherwise.
    pub any_header: bool,
}

/// A message as the broker has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RawMessage {
    /// `None` is null.
    pub payload: Option<Vec<u8>>,
    /// In the broker's place for keys, where it has one.
    pub key: Option<Vec<u8>>,
    /// The content type, in the broker's place for it; where it has none, in the header `content-type`.
    pub content_type: Option<String>,
    /// All other headers, those of this library among them.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl RawMessage {
    /// A message with a payload and nothing else.
    #[must_use]
    pub fn of(payload: impl Into<Vec<u8>>) -> Self {
        Self { payload: Some(payload.into()), ..Self::default() }
    }

    /// With one header more.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The first header of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| &value[..])
    }
}
