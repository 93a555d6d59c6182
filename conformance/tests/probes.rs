//! Every field of the capability record is proven in both directions, or it is said why it cannot be.
//! `UPDATE=1 cargo test -p anybroker-conformance --test probes` rewrites docs/probes.md.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anybroker_conformance::{Evidence, cases, probes};
use anybroker_memory::Memory;

/// The fields of the record, and the figures of those that are made of several.
fn fields() -> Vec<String> {
    let bus = Memory::builder().build().bus();
    let limits = serde_json::to_value(anybroker_core::Limits::default()).unwrap();
    let lag = serde_json::to_value(anybroker_core::LagPrecision::default()).unwrap();
    let figures = |field: &str, value: &serde_json::Value| {
        value.as_object().unwrap().keys().map(|figure| format!("{field}.{figure}")).collect::<Vec<_>>()
    };
    let all = bus.capabilities().fields().into_iter().flat_map(|(field, _)| match field {
        "limits" => figures(field, &limits),
        "lag" => figures(field, &lag),
        _ => vec![field.to_owned()],
    });
    all.collect()
}

#[test]
fn every_field_of_the_record_is_proven_in_both_directions_or_it_is_said_why_not() {
    let (mut expected, mut found) = (fields(), probes().iter().map(|probe| probe.field.to_owned()).collect::<Vec<_>>());
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected);
    for probe in probes() {
        for (side, evidence) in [("claimed", probe.claimed), ("refused", probe.refused)] {
            match evidence {
                Evidence::Nothing(why) => assert!(!why.is_empty(), "{}", probe.field),
                Evidence::Refusal => {
                    assert_eq!(side, "refused", "{}", probe.field);
                    assert!(probe.is_tried(), "the refusal of {} is not tried", probe.field);
                }
                Evidence::Cases(named) => {
                    assert!(!named.is_empty(), "{}", probe.field);
                    for name in named {
                        assert!(cases().iter().any(|case| case.name == *name), "{}: no case `{name}`", probe.field);
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_written_about_it_is_what_there_is() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/probes.md");
    let mut text = String::from(
        "# How the capability record is proven\n\n\
         A record can claim what is not there, and it can refuse what works. Both fail. This table says, for each field, which \
         cases of the [conformance suite](../conformance/README.md) fail in each direction, or why nothing can. It is written by \
         `UPDATE=1 cargo test -p anybroker-conformance --test probes`, and a test fails when a field is missing.\n\n\
         *Tried*: in place of each case that needs what the record refuses, the call is made. It must answer `Unsupported` (or \
         what the contract says instead), leave no trace, and leave everything usable. That is the check layer's answer, by the \
         record. *Behind the check too*: as if the record claimed the field, the case beside it has to fail \
         (`topology/what-the-record-refuses-does-not-work-behind-it`); where it passes, the record is too modest. Orders, and what \
         a failure does to them, are not: messages may come in order by chance.\n\n\
         | field | when it claims too much | when it claims too little |\n|---|---|---|\n",
    );
    let cell = |evidence: Evidence, behind: bool| match evidence {
        Evidence::Cases(names) => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
        Evidence::Refusal if behind => "tried, behind the check too".to_owned(),
        Evidence::Refusal => "tried".to_owned(),
        Evidence::Nothing(why) => format!("not probed: {why}"),
    };
    for probe in probes() {
        writeln!(
            text,
            "| `{}` | {} | {} |",
            probe.field,
            cell(probe.claimed, false),
            cell(probe.refused, probe.is_tried_behind_the_check())
        )
        .unwrap();
    }
    if std::env::var_os("UPDATE").is_some() {
        fs::write(file, text).unwrap();
    } else {
        assert!(
            fs::read_to_string(&file).ok() == Some(text),
            "docs/probes.md is out of date: see the top of this file"
        );
    }
}
