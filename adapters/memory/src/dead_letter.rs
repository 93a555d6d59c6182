//! Reading, redriving and purging dead letters.

use anybroker_core::{DeadLetterId, DeadLetterPage, DeadLetterScope, Error, ErrorKind, Result};

use crate::store::{Store, letter_id, letter_number, no_group};

pub(crate) fn page(
    store: &Store,
    scope: &DeadLetterScope,
    from: Option<&DeadLetterId>,
    max: usize,
) -> Result<DeadLetterPage> {
    let topic = store.topic(&scope.source, "dead letters")?;
    let from = match from {
        Some(id) => letter_number(id).ok_or_else(|| no_letter(id, "dead letters"))?,
        None => 0,
    };
    let now = store.clock.now();
    // One more than asked for tells where the next page starts.
    let found = topic
        .read_group(&scope.group, now, |_, group, _| group.letters().page(&scope.group, from, max.saturating_add(1)));
    let found = found.ok_or_else(|| no_group(&scope.source, &scope.group, "dead letters"))?;
    let mut letters: Vec<_> = found.into_iter().flatten().collect();
    letters.sort_by_key(|(number, _)| *number);
    let next = letters.get(max).map(|(number, _)| letter_id(*number));
    letters.truncate(max);
    Ok(DeadLetterPage { letters: letters.into_iter().map(|(_, letter)| letter).collect(), next })
}

pub(crate) fn redrive(store: &Store, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
    let now = store.clock.now();
    each(store, scope, ids, "redrive", |group, log, number| group.redrive(log, number, now))
}

pub(crate) fn purge(store: &Store, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
    each(store, scope, ids, "purge", |group, _, number| group.purge(number).then_some(Ok(())))
}

fn each(
    store: &Store,
    scope: &DeadLetterScope,
    ids: &[DeadLetterId],
    operation: &'static str,
    mut change: impl FnMut(&mut crate::store::GroupState, &mut crate::store::Log, u64) -> Option<Result<()>>,
) -> Vec<Result<()>> {
    let mut outcomes: Vec<Option<Result<()>>> = ids.iter().map(|_| None).collect();
    let reached = store.topic(&scope.source, operation).and_then(|topic| {
        let reached = topic.read_group(&scope.group, store.clock.now(), |_, group, log| {
            for (outcome, id) in outcomes.iter_mut().zip(ids).filter(|(outcome, _)| outcome.is_none()) {
                *outcome = letter_number(id).and_then(|number| change(group, log, number));
            }
        });
        reached.ok_or_else(|| no_group(&scope.source, &scope.group, operation))
    });
    match reached {
        Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        Ok(_) => outcomes
            .into_iter()
            .zip(ids)
            .map(|(outcome, id)| outcome.unwrap_or_else(|| Err(no_letter(id, operation))))
            .collect(),
    }
}

fn no_letter(id: &DeadLetterId, operation: &'static str) -> Error {
    Error::new(ErrorKind::NotFound, operation, "there is no such dead letter").with("letter", id)
}
