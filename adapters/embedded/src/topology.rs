//! Destinations and groups, and what groups have left to do.

use std::collections::BTreeMap;
use std::time::Duration;

use anybroker_core::{
    Declared, Description, Destination, Error, ErrorKind, Group, GroupDescription, Lag, OnFailure, Order, Precision,
    Start, SubscribeSpec, TopologyMode, TopologySpec,
};

use crate::error::{Fault, Step};
use crate::member::Source;
use crate::schema::row_id;
use crate::store::{Store, lane};
use crate::{dead_letter, process, retention};

/// Destinations that a file can have had: the high bits of a message's row id.
const DESTINATIONS: i64 = 1 << 22;

pub(crate) fn create_destination(store: &Store<'_>, name: &Destination) -> Step<i64> {
    let id = store.prepare("INSERT INTO destinations (name) VALUES (?1)")?.insert([name.as_str()])?;
    if id >= DESTINATIONS {
        let text = format!("a file can have had {DESTINATIONS} destinations, deleted ones included; use another file");
        return Err(Error::new(ErrorKind::Unavailable, "declare", text).into());
    }
    Ok(id)
}

fn find_destination(store: &Store<'_>, name: &Destination) -> Step<Option<i64>> {
    Ok(store.one("SELECT id FROM destinations WHERE name = ?1", [name.as_str()], |row| row.get(0))?)
}

fn find_group(store: &Store<'_>, dest: i64, group: &Group) -> Step<Option<i64>> {
    Ok(store.one("SELECT id FROM consumers WHERE dest = ?1 AND name = ?2", (dest, group.as_str()), |row| row.get(0))?)
}

fn no_destination(operation: &'static str, name: &Destination) -> Fault {
    Error::new(ErrorKind::NotFound, operation, "the destination does not exist").with("destination", name).into()
}

fn no_group(operation: &'static str, name: &Destination, group: &Group) -> Fault {
    Error::new(ErrorKind::NotFound, operation, "the group does not exist")
        .with("destination", name)
        .with("group", group)
        .into()
}

/// A group of a destination.
pub(crate) fn find(store: &Store<'_>, name: &Destination, group: &Group, operation: &'static str) -> Step<Source> {
    let dest = find_destination(store, name)?.ok_or_else(|| no_destination(operation, name))?;
    let id = find_group(store, dest, group)?.ok_or_else(|| no_group(operation, name, group))?;
    Ok(Source { destination: name.clone(), dest, group: id })
}

/// The order that a group's members keep, and what a failure does to it, as the last of them stated it.
pub(crate) fn policy(store: &Store<'_>, source: &Source) -> Step<(Order, OnFailure)> {
    let policy = store.number("SELECT policy FROM consumers WHERE id = ?1", [source.group])?;
    let order = match policy & 3 {
        0 => Order::None,
        1 => Order::Key,
        _ => Order::Total,
    };
    let on_failure = match policy >> 2 {
        0 => OnFailure::GoPast,
        1 => OnFailure::Block,
        _ => OnFailure::Park,
    };
    Ok((order, on_failure))
}

fn stated(spec: &SubscribeSpec) -> i64 {
    let order = match spec.order {
        Order::None => 0,
        Order::Key => 1,
        Order::Total => 2,
    };
    let on_failure = match spec.on_failure {
        OnFailure::GoPast => 0,
        OnFailure::Block => 1,
        OnFailure::Park => 2,
    };
    order | on_failure << 2
}

/// Creates what is missing.
pub(crate) fn declare(store: &Store<'_>, spec: &TopologySpec) -> Step<Declared> {
    let mut declared = Declared::Existed;
    let dest = match find_destination(store, &spec.destination)? {
        Some(dest) => dest,
        None => {
            declared = Declared::Created;
            create_destination(store, &spec.destination)?
        }
    };
    if let Some(group) = &spec.group
        && find_group(store, dest, group)?.is_none()
    {
        declared = Declared::Created;
        let cursor = start(store, dest, spec.start)?;
        store.run("INSERT INTO consumers (dest, name, cursor) VALUES (?1, ?2, ?3)", (dest, group.as_str(), cursor))?;
    }
    Ok(declared)
}

/// Where a new group begins.
fn start(store: &Store<'_>, dest: i64, start: Start) -> Step<i64> {
    let (low, next) = store
        .one("SELECT low, next FROM destinations WHERE id = ?1", [dest], |row| Ok((row.get(0)?, row.get(1)?)))?
        .ok_or_else(|| crate::error::damaged("a destination that was found is missing"))?;
    Ok(match start {
        Start::Earliest => low,
        Start::Latest => next,
        Start::Time(moment) => retention::first_since(store, dest, low, next, moment.as_millis())?,
        Start::Position(position) => i64::try_from(position.major).unwrap_or(i64::MAX).clamp(low, next),
        other => return Err(Error::unsupported("subscribe", format!("a start of {other:?} is not known")).into()),
    })
}

/// Checks that it is there.
pub(crate) fn verify(store: &Store<'_>, spec: &TopologySpec, operation: &'static str) -> Step<()> {
    match &spec.group {
        Some(group) => find(store, &spec.destination, group, operation).map(drop),
        None => find_destination(store, &spec.destination)?
            .map(drop)
            .ok_or_else(|| no_destination(operation, &spec.destination)),
    }
}

/// Opens a membership: the sources, and a number that no other member of the file has or had.
pub(crate) fn join(store: &Store<'_>, spec: &SubscribeSpec) -> Step<(i64, Vec<Source>)> {
    let member = store.number(
        "INSERT INTO counters (name, value) VALUES ('member', 1)
         ON CONFLICT DO UPDATE SET value = value + 1 RETURNING value",
        [],
    )?;
    let mut sources: Vec<Source> = Vec::with_capacity(spec.destinations.len());
    for destination in &spec.destinations {
        if sources.iter().any(|source| source.destination == *destination) {
            continue;
        }
        let wanted = TopologySpec::group(destination, &spec.group).with_start(spec.start);
        if spec.topology == TopologyMode::Declare {
            declare(store, &wanted)?;
        }
        let source = find(store, destination, &spec.group, "subscribe")?;
        keep_order(store, &source, spec)?;
        store.run(
            "INSERT INTO members (id, grp, pid, born) VALUES (?1, ?2, ?3, ?4)",
            (member, source.group, process::id(), process::born(process::id())),
        )?;
        sources.push(source);
    }
    Ok((member, sources))
}

/// A group keeps one order at a time: members that state another one are refused while some are there. Otherwise what
/// waits in the group gets the lanes of the new order.
fn keep_order(store: &Store<'_>, source: &Source, spec: &SubscribeSpec) -> Step<()> {
    let before = store.number("SELECT policy FROM consumers WHERE id = ?1", [source.group])?;
    let after = stated(spec);
    let members = store.all("SELECT id, pid, born FROM members WHERE grp = ?1", [source.group], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
    })?;
    for (id, pid, born) in members {
        if process::born(pid) == born {
            if before == after {
                continue;
            }
            let text = "the group has members that keep another order or do something else about failures";
            return Err(Error::new(ErrorKind::AlreadyExists, "subscribe", text)
                .with("destination", &source.destination)
                .with("group", &spec.group)
                .into());
        }
        // Of a process that is gone: whoever comes next tidies up after it.
        store.run("DELETE FROM members WHERE grp = ?1 AND id = ?2", (source.group, id))?;
    }
    if before == after {
        return Ok(());
    }
    store.run("UPDATE consumers SET policy = ?2 WHERE id = ?1", (source.group, after))?;
    let rows = store.all(
        "SELECT p.seq, m.key FROM pending p JOIN messages m ON m.id = (?2 << 40 | p.seq)
         WHERE p.grp = ?1 AND p.state <> 3",
        (source.group, source.dest),
        |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Option<Vec<u8>>>(1)?)),
    )?;
    for (seq, key) in rows {
        store.run(
            "UPDATE pending SET lane = ?3, state = CASE state WHEN 2 THEN 0 ELSE state END WHERE grp = ?1 AND seq = ?2",
            (source.group, seq, lane(spec.order, key.as_deref())),
        )?;
    }
    Ok(())
}

/// The destination with its groups.
pub(crate) fn describe(store: &Store<'_>, name: &Destination) -> Step<Description> {
    let dest = find_destination(store, name)?.ok_or_else(|| no_destination("describe", name))?;
    let groups =
        store.all("SELECT name FROM consumers WHERE dest = ?1 ORDER BY name", [dest], |row| row.get::<_, String>(0))?;
    let mut described = Vec::with_capacity(groups.len());
    for group in groups {
        let group = Group::from(group);
        let source = find(store, name, &group, "describe")?;
        let lag = lag(store, &source)?;
        let letters = store.number("SELECT count(*) FROM letters WHERE grp = ?1", [source.group])?;
        described.push(GroupDescription {
            physical: format!("consumers/{}", source.group),
            dead_letters: format!("{name}.dlq"),
            dead_letter_count: Some(letters.cast_unsigned()),
            group,
            lag,
        });
    }
    let (low, next): (i64, i64) = store
        .one("SELECT low, next FROM destinations WHERE id = ?1", [dest], |row| Ok((row.get(0)?, row.get(1)?)))?
        .unwrap_or((0, 0));
    let below = store
        .number("SELECT count(*) FROM messages WHERE id >= ?1 AND id < ?2", (row_id(dest, 0), row_id(dest, low)))?;
    let settings = BTreeMap::from([
        ("first_position".to_owned(), low.to_string()),
        ("next_position".to_owned(), next.to_string()),
        ("retention".to_owned(), format!("{:?}", store.settings.retention)),
        ("retention_messages".to_owned(), store.settings.retention_messages.to_string()),
    ]);
    Ok(Description {
        destination: name.clone(),
        physical: format!("destinations/{dest}"),
        groups: described,
        messages: Some((next - low + below).cast_unsigned()),
        settings,
    })
}

/// The destinations whose names begin with `prefix`.
pub(crate) fn list(store: &Store<'_>, prefix: &str) -> Step<Vec<Destination>> {
    let sql = "SELECT name FROM destinations WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name";
    Ok(store.all(sql, [prefix], |row| row.get::<_, String>(0).map(Destination::from))?)
}

/// Deletes a group, or a destination with all its groups.
pub(crate) fn delete(store: &Store<'_>, name: &Destination, group: Option<&Group>) -> Step<()> {
    let dest = find_destination(store, name)?.ok_or_else(|| no_destination("delete", name))?;
    if let Some(group) = group {
        let source = find(store, name, group, "delete")?;
        return delete_group(store, &source, true);
    }
    let groups = store.all("SELECT id FROM consumers WHERE dest = ?1", [dest], |row| row.get::<_, i64>(0))?;
    for group in groups {
        delete_group(store, &Source { destination: name.clone(), dest, group }, false)?;
    }
    store.run("DELETE FROM messages WHERE id >= ?1 AND id < ?2", (row_id(dest, 0), row_id(dest + 1, 0)))?;
    store.run("DELETE FROM destinations WHERE id = ?1", [dest])?;
    store.touch_destination(dest);
    Ok(())
}

fn delete_group(store: &Store<'_>, source: &Source, messages_stay: bool) -> Step<()> {
    let group = source.group;
    let held = store.all(
        "SELECT seq FROM pending WHERE grp = ?1 UNION SELECT seq FROM letters WHERE grp = ?1",
        [group],
        |row| row.get::<_, i64>(0),
    )?;
    for table in ["pending", "letters", "claims", "members"] {
        store.run(&format!("DELETE FROM {table} WHERE grp = ?1"), [group])?;
    }
    store.run("DELETE FROM consumers WHERE id = ?1", [group])?;
    store.touch_group(group);
    if messages_stay {
        for seq in held {
            retention::release(store, source.dest, seq)?;
        }
        store.count_settled(source.dest, retention::WORTH);
    }
    Ok(())
}

/// What a group has left to do, exactly.
pub(crate) fn lag(store: &Store<'_>, source: &Source) -> Step<Lag> {
    dead_letter::sweep(store, source)?;
    let group = source.group;
    let (cursor, next): (i64, i64) = store
        .one(
            "SELECT c.cursor, d.next FROM consumers c JOIN destinations d ON d.id = c.dest WHERE c.id = ?1",
            [group],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?
        .ok_or_else(|| crate::error::damaged("a group that was found is missing"))?;
    let count = |sql: &str| store.number(sql, (group, store.now));
    let ahead = store.number("SELECT count(*) FROM pending WHERE grp = ?1 AND seq >= ?2", (group, cursor))?;
    let held_back = store.number(
        "SELECT count(*) FROM messages m WHERE id >> 40 = ?1 AND due_at > ?2 AND id >= ?3
         AND NOT EXISTS (SELECT 1 FROM pending WHERE grp = ?4 AND seq = (m.id & 1099511627775))",
        (source.dest, store.now, row_id(source.dest, cursor), group),
    )?;
    let waiting = count("SELECT count(*) FROM pending WHERE grp = ?1 AND (state = 2 OR (state = 0 AND due_at <= ?2))")?;
    let delayed = count("SELECT count(*) FROM pending WHERE grp = ?1 AND state = 0 AND due_at > ?2")?;
    let single = count("SELECT count(*) FROM pending WHERE grp = ?1 AND state = 1 AND due_at > ?2")?;
    let runs = count("SELECT sum(open) FROM claims WHERE grp = ?1 AND lease_until > ?2")?;
    let exact = |figure: i64| Some((figure.max(0).cast_unsigned(), Precision::Exact));
    Ok(Lag {
        ready: exact(next - cursor - ahead - held_back + waiting),
        in_flight: exact(single + runs),
        delayed: exact(delayed + held_back),
        oldest_age: oldest(store, source, cursor, next)?.map(|age| (age, Precision::Exact)),
        lanes: Vec::new(),
    })
}

/// How long the oldest unsettled message has been stored.
fn oldest(store: &Store<'_>, source: &Source, cursor: i64, next: i64) -> Step<Option<Duration>> {
    let settled = "SELECT 1 FROM pending WHERE grp = ?1 AND seq = ?2 AND state = 3";
    let mut fresh = cursor;
    while fresh < next && store.number(settled, (source.group, fresh))? == 1 {
        fresh += 1;
    }
    let mut seq = (fresh < next).then_some(fresh);
    let pending =
        store.number("SELECT coalesce(min(seq), -1) FROM pending WHERE grp = ?1 AND state <> 3", [source.group])?;
    if pending >= 0 {
        seq = Some(seq.map_or(pending, |seq| seq.min(pending)));
    }
    let claims = store.all("SELECT first, last, done FROM claims WHERE grp = ?1", [source.group], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get(2)?))
    })?;
    for (first, last, done) in claims {
        let bits = crate::fetch::Bits::new(first, last, done);
        if let Some(open) = (first..=last).find(|at| !bits.is_set(*at)) {
            seq = Some(seq.map_or(open, |seq| seq.min(open)));
        }
    }
    let Some(seq) = seq else { return Ok(None) };
    let stored_at = store.number("SELECT stored_at FROM messages WHERE id = ?1", [row_id(source.dest, seq)])?;
    Ok(Some(Duration::from_millis((store.now - stored_at).max(0).cast_unsigned())))
}
