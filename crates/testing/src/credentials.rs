//! Credentials that change while a service runs.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anybroker_core::{
    Bus, Credentials, CredentialsProvider, Effect, Error, ErrorKind, Message, PublishOptions, PublishOutcome, Result,
};
use async_trait::async_trait;

/// Longer than any server takes to learn of what an administrator changed.
const LONG: Duration = Duration::from_secs(30);

/// What a [`Vault`] says: credentials, or why there are none.
pub type Told = std::result::Result<Credentials, &'static str>;

/// A provider that says what the test wants it to.
#[derive(Clone)]
pub struct Vault(Arc<(Mutex<(Told, Duration)>, AtomicU32)>);

impl Vault {
    /// One that says this at first.
    #[must_use]
    pub fn saying(told: Told) -> Self {
        Self(Arc::new((Mutex::new((told, Duration::ZERO)), AtomicU32::new(0))))
    }

    /// From now on it says this, at once.
    pub fn says(&self, told: Told) {
        self.says_after(told, Duration::ZERO);
    }

    /// From now on it says this, and takes so long.
    pub fn says_after(&self, told: Told, after: Duration) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = (told, after);
    }

    /// How often it was asked.
    #[must_use]
    pub fn asked(&self) -> u32 {
        self.0.1.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl CredentialsProvider for Vault {
    async fn credentials(&self) -> Result<Credentials> {
        self.0.1.fetch_add(1, Ordering::SeqCst);
        let (told, after) = self.0.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tokio::time::sleep(after).await;
        told.map_err(|text| Error::new(ErrorKind::NotFound, "read a secret", text))
    }
}

/// Publishes a number under one key, within that time.
pub async fn send(bus: &Bus, name: &str, number: u32, within: Duration) -> PublishOutcome {
    let options = PublishOptions::default().with_timeout(within);
    bus.submit(vec![Message::new(name, number.to_string()).with_key("k")], &options).await.await.remove(0)
}

/// Publishes numbers until one is refused with an error of that kind, and answers that. What was stored before goes to
/// `stored`; what was handed over in the moment in which the connection was lost has no certain outcome.
///
/// # Panics
/// When none is refused in time, or in another way.
pub async fn refused(bus: &Bus, name: &str, kind: ErrorKind, next: &mut u32, stored: &mut BTreeSet<u32>) -> Error {
    let deadline = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < deadline, "never refused");
        let begun = Instant::now();
        let number = std::mem::replace(next, *next + 1);
        match send(bus, name, number, Duration::from_secs(2)).await {
            Err(error) if error.kind() == kind => {
                assert_eq!(error.effect(), Effect::NotDone, "{error:?}");
                assert!(begun.elapsed() < Duration::from_secs(4), "refused after {:?}", begun.elapsed());
                return error;
            }
            Err(error) => assert_ne!(error.effect(), Effect::Done, "{error:?}"),
            Ok(_) => {
                stored.insert(number);
            }
        }
        // Thousands would be stored by then.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
