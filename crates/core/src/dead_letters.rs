//! Reading, redriving and purging dead letters: the same verbs on every broker.

use std::sync::Arc;

use tokio::sync::RwLock;

use crate::{
    Broker, DeadLetter, DeadLetterFilter, DeadLetterId, DeadLetterPage, DeadLetterScope, Effect, Error, ErrorKind,
    MessageId, RedriveOptions, RedriveReport, Result,
};

/// How many letters are read at once.
const PAGE: usize = 500;

/// The dead letters of one source and group.
///
/// ```no_run
/// # async fn example(bus: &anybroker_core::Bus) -> anybroker_core::Result<()> {
/// let letters = bus.dead_letters("orders", "payments")?;
/// for letter in letters.peek(&Default::default(), 10).await? {
///     println!("{} {} after {} attempts", letter.message.id(), letter.reason, letter.attempts);
/// }
/// let report = letters.redrive(&Default::default()).await?;
/// println!("{} of {} redriven", report.moved, report.matched);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct DeadLetters {
    broker: Arc<dyn Broker>,
    scope: DeadLetterScope,
    moving: Moving,
}

/// Read while letters are put back; closing a [`Bus`](crate::Bus) waits for them by writing.
pub(crate) type Moving = Arc<RwLock<()>>;

struct Chosen {
    id: DeadLetterId,
    message: MessageId,
    redrives: u32,
}

impl DeadLetters {
    pub(crate) fn new(broker: Arc<dyn Broker>, scope: DeadLetterScope, moving: Moving) -> Self {
        Self { broker, scope, moving }
    }

    /// Whose letters they are.
    #[must_use]
    pub fn scope(&self) -> &DeadLetterScope {
        &self.scope
    }

    /// One page, oldest first, unfiltered: up to `max` letters from `from` on.
    ///
    /// # Errors
    /// `NotFound` when source or group do not exist.
    pub async fn page(&self, from: Option<DeadLetterId>, max: usize) -> Result<DeadLetterPage> {
        self.broker.dead_letters(&self.scope, from, max).await
    }

    /// The oldest `max` letters that match.
    ///
    /// # Errors
    /// As [`page`](Self::page).
    pub async fn peek(&self, filter: &DeadLetterFilter, max: usize) -> Result<Vec<DeadLetter>> {
        let mut found = Vec::new();
        let mut from = None;
        // Unfiltered, no more is read than shown; filtered, a small `max` must not make small pages.
        let size = if *filter == DeadLetterFilter::all() { PAGE.min(max) } else { PAGE };
        while found.len() < max {
            let page = self.page(from.take(), size).await?;
            found.extend(page.letters.into_iter().filter(|letter| filter.matches(letter)));
            match page.next {
                Some(next) => from = Some(next),
                None => break,
            }
        }
        found.truncate(max);
        Ok(found)
    }

    /// How many letters match.
    ///
    /// # Errors
    /// As [`page`](Self::page).
    pub async fn count(&self, filter: &DeadLetterFilter) -> Result<u64> {
        Ok(self.choose(filter, None, u32::MAX).await?.len() as u64)
    }

    /// Puts letters back to the group that failed them: attempt 1 again, id kept, no other group sees them.
    ///
    /// What is there when it begins is what it works on: letters that fail again meanwhile are not met twice.
    /// Interrupted, it is resumed by calling it again. Of a future that is dropped, the batch that is on its way is ended all the
    /// same: in the middle of it letters are back and not gone yet. [`Bus::close`](crate::Bus::close) waits for that.
    ///
    /// # Errors
    /// `Unsupported` where the record refuses it; `ConfigInvalid` for a rate that is no positive number; `NotFound`. Failures of single
    /// letters are in the report.
    pub async fn redrive(&self, options: &RedriveOptions) -> Result<RedriveReport> {
        self.redrive_with(options, |_| {}).await
    }

    /// As [`redrive`](Self::redrive), telling `progress` after every batch.
    ///
    /// # Errors
    /// As [`redrive`](Self::redrive).
    pub async fn redrive_with(
        &self,
        options: &RedriveOptions,
        mut progress: impl FnMut(&RedriveReport) + Send,
    ) -> Result<RedriveReport> {
        self.broker.capabilities().redrive.check("redrive", "redrive")?;
        if let Some(rate) = options.rate.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            let text = format!("a rate of {rate} letters a second: expected a positive number");
            return Err(Error::new(ErrorKind::ConfigInvalid, "redrive", text));
        }
        let chosen = self.choose(&options.filter, options.limit, options.max_redrives).await?;
        let mut report = RedriveReport { matched: chosen.len() as u64, ..RedriveReport::default() };
        let mut ids = Vec::with_capacity(chosen.len());
        for letter in chosen {
            if letter.redrives >= options.max_redrives {
                report.refused.push((letter.id, letter.message, letter.redrives));
            } else {
                ids.push(letter.id);
            }
        }
        if options.dry_run {
            report.moved = ids.len() as u64;
            return Ok(report);
        }
        // At a low rate a batch is one second's worth, so that the rate holds in the small too.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 1 and more")]
        let step = options.rate.map_or(options.batch, |rate| options.batch.min(rate.max(1.0) as usize)).max(1);
        for (index, batch) in ids.chunks(step).enumerate() {
            if index > 0
                && let Some(pause) = options.pause(step)
            {
                tokio::time::sleep(pause).await;
            }
            for (id, outcome) in batch.iter().zip(self.move_back(batch.to_vec()).await) {
                match outcome {
                    Ok(()) => report.moved += 1,
                    Err(error) => report.failed.push((id.clone(), error)),
                }
            }
            progress(&report);
        }
        Ok(report)
    }

    /// Goes to its end also when nobody waits for it any more.
    async fn move_back(&self, batch: Vec<DeadLetterId>) -> Vec<Result<()>> {
        let (broker, scope, count) = (Arc::clone(&self.broker), self.scope.clone(), batch.len());
        let is_moving = Arc::clone(&self.moving).read_owned().await;
        let moved = tokio::spawn(async move {
            let outcomes = broker.redrive(&scope, &batch).await;
            drop(is_moving);
            outcomes
        });
        let ended = |error: tokio::task::JoinError| {
            let text = format!("the redrive did not come to its end: {error}");
            Error::new(ErrorKind::Unexpected, "redrive", text).with_effect(Effect::Unknown)
        };
        moved.await.unwrap_or_else(|error| {
            let error = ended(error);
            (0..count).map(|_| Err(error.duplicate())).collect()
        })
    }

    /// Deletes the letters that match; tells how many there were.
    ///
    /// # Errors
    /// `Unsupported` where the record refuses it; `NotFound`; the first failure of a letter (one that is gone
    /// already is no failure).
    pub async fn purge(&self, filter: &DeadLetterFilter) -> Result<u64> {
        self.broker.capabilities().purge.check("purging dead letters", "purge")?;
        let chosen = self.choose(filter, None, u32::MAX).await?;
        let ids: Vec<DeadLetterId> = chosen.into_iter().map(|letter| letter.id).collect();
        let mut purged = 0;
        for batch in ids.chunks(PAGE) {
            for outcome in self.broker.purge(&self.scope, batch).await {
                match outcome {
                    Ok(()) => purged += 1,
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error.with("purged", purged)),
                }
            }
        }
        Ok(purged)
    }

    /// The ids of all that match now, oldest first. Letters that were redriven `max_redrives` times do not count
    /// towards the limit: refused ones at the head of the queue would otherwise hide the rest for ever.
    async fn choose(&self, filter: &DeadLetterFilter, limit: Option<u64>, max_redrives: u32) -> Result<Vec<Chosen>> {
        let mut left = limit.unwrap_or(u64::MAX);
        let mut chosen = Vec::new();
        let mut from = None;
        loop {
            let page = self.page(from.take(), PAGE).await?;
            for letter in page.letters.into_iter().filter(|letter| filter.matches(letter)) {
                if letter.redrives < max_redrives {
                    match left.checked_sub(1) {
                        Some(less) => left = less,
                        None => return Ok(chosen),
                    }
                }
                let (id, message) = (letter.id, letter.message.id().clone());
                chosen.push(Chosen { id, message, redrives: letter.redrives });
            }
            match page.next {
                Some(next) => from = Some(next),
                None => return Ok(chosen),
            }
        }
    }
}

impl std::fmt::Debug for DeadLetters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DeadLetters").field(&self.scope).finish()
    }
}
