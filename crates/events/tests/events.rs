//! Events to messages and back, our own and those of others.
#![allow(clippy::unwrap_used)]

use anybroker_core::lineage::{self, TraceContext};
use anybroker_core::{Error, ErrorKind, Headers, Message, MessageId, Timestamp};
use anybroker_events::cloudevents::event::{Data, ExtensionValue};
use anybroker_events::cloudevents::{AttributesReader, Event, EventBuilder, EventBuilderV10};
use anybroker_events::{EventExt, JsonExt, Metadata, Mode, SCHEMA_MISMATCH, TypedEvent, from_message, to_message};
use serde_json::json;

const MODES: [Mode; 2] = [Mode::Binary, Mode::Structured];

fn minimal() -> EventBuilderV10 {
    EventBuilderV10::new().id("e-1").source("/shop").ty("com.example.order.created")
}

fn full() -> Event {
    minimal()
        .subject("order-17")
        .time("2026-11-21T10:00:00.123456789Z")
        .data_with_schema("application/xml; charset=utf-8", "https://example.com/order.xsd", "<order>Zürich</order>")
        .extension("comexamplecity", "Zürich, 100 % \"x\"")
        .extension("partitionkey", "customer-3")
        .build()
        .unwrap()
}

/// A message as a foreign sender writes it.
fn foreign(headers: &[(&str, &str)], content_type: Option<&str>, payload: &str) -> Message {
    let headers: Headers = headers.iter().copied().collect();
    let message = Message::new("orders", payload.to_owned()).with_headers(headers);
    match content_type {
        Some(content_type) => message.with_content_type(content_type.to_owned()),
        None => message,
    }
}

fn structured(value: &serde_json::Value) -> Message {
    foreign(&[], Some("application/cloudevents+json; charset=UTF-8"), &value.to_string())
}

fn assert_mismatch(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::InvalidMessage, "{error}");
    assert!(error.context().any(|pair| pair == ("error_type", SCHEMA_MISMATCH)), "{error}");
}

fn bytes_of(event: &Event) -> Vec<u8> {
    event.data().cloned().map(|data| Vec::<u8>::try_from(data).unwrap()).unwrap_or_default()
}

#[test]
fn every_attribute_and_extension_survives_both_modes() {
    for mode in MODES {
        let event = full();
        let message = to_message(&event, "orders", mode).unwrap();
        let back = from_message(&message).unwrap();
        assert_eq!(back.id(), event.id());
        assert_eq!(back.source(), event.source());
        assert_eq!(back.ty(), event.ty());
        assert_eq!(back.subject(), event.subject());
        assert_eq!(back.time(), event.time(), "full precision, {mode:?}");
        assert_eq!(back.datacontenttype(), event.datacontenttype());
        assert_eq!(back.dataschema(), event.dataschema());
        assert_eq!(back.iter_extensions().count(), 2);
        assert_eq!(back.extension("comexamplecity"), event.extension("comexamplecity"), "{mode:?}");
        assert_eq!(bytes_of(&back), bytes_of(&event));
        // Once more: what was read can be written again, and is the same message.
        let again = to_message(&back, "orders", mode).unwrap();
        assert_eq!(again.headers(), message.headers());
        assert_eq!((again.id(), again.key(), again.timestamp()), (message.id(), message.key(), message.timestamp()));
    }
}

#[test]
fn id_time_and_key_are_those_of_the_message() {
    for mode in MODES {
        let message = to_message(&full(), "orders", mode).unwrap();
        assert_eq!(message.id(), &MessageId::from("e-1"));
        assert_eq!(message.timestamp(), "2026-11-21T10:00:00.123Z".parse::<Timestamp>().unwrap());
        assert_eq!(message.key(), Some(&b"customer-3"[..]), "partitionkey comes before the subject");
        let plain = minimal().subject("order-17").build().unwrap();
        assert_eq!(to_message(&plain, "orders", mode).unwrap().key(), Some(&b"order-17"[..]));
        assert_eq!(to_message(&minimal().build().unwrap(), "orders", mode).unwrap().key(), None);
    }
}

#[test]
fn binary_mode_is_the_published_header_form() {
    let message = to_message(&full(), "orders", Mode::Binary).unwrap();
    let header = |name| message.headers().get_str(name);
    assert_eq!(message.content_type(), Some("application/xml; charset=utf-8"));
    assert_eq!(message.bytes(), "<order>Zürich</order>".as_bytes());
    assert_eq!(header("ce-specversion"), Some("1.0"));
    assert_eq!(header("ce-id"), Some("e-1"));
    assert_eq!(header("ce-source"), Some("/shop"));
    assert_eq!(header("ce-type"), Some("com.example.order.created"));
    assert_eq!(header("ce-time"), Some("2026-11-21T10:00:00.123456789Z"));
    assert_eq!(header("ce-subject"), Some("order-17"));
    assert_eq!(header("ce-dataschema"), Some("https://example.com/order.xsd"));
    assert_eq!(header("ce-comexamplecity"), Some("Z%C3%BCrich,%20100%20%25%20%22x%22"));
    assert_eq!(header("ce-datacontenttype"), None);
}

#[test]
fn binary_data_survives_both_modes_byte_for_byte() {
    let bytes: Vec<u8> = (0..=255).collect();
    for mode in MODES {
        let event = minimal().data("application/octet-stream", bytes.clone()).build().unwrap();
        let message = to_message(&event, "orders", mode).unwrap();
        let back = from_message(&message).unwrap();
        assert_eq!(back.data(), Some(&Data::Binary(bytes.clone())), "{mode:?}");
    }
    let message = to_message(&minimal().data("x/y", bytes.clone()).build().unwrap(), "orders", Mode::Binary).unwrap();
    assert_eq!(message.bytes(), bytes);
}

#[test]
fn an_event_without_data_stays_one() {
    for mode in MODES {
        let message = to_message(&minimal().build().unwrap(), "orders", mode).unwrap();
        assert!(!message.is_tombstone(), "tombstones are refused on many brokers");
        assert_eq!(from_message(&message).unwrap().data(), None, "{mode:?}");
    }
    let headers = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")];
    let tombstone = Message::tombstone("orders", "k").with_headers(headers.into_iter().collect());
    assert_eq!(from_message(&tombstone).unwrap().data(), None);
}

#[test]
fn the_header_forms_of_all_bindings_are_read() {
    type Form = (&'static str, Option<&'static str>, &'static [(&'static str, &'static str)]);
    let forms: [Form; 5] = [
        (
            "http",
            Some("application/json"),
            &[
                ("Ce-Specversion", "1.0"),
                ("CE-ID", "1"),
                ("ce-source", "/s"),
                ("ce-type", "t"),
                ("ce-city", "Z%C3%BCrich"),
            ],
        ),
        (
            "nats",
            None,
            &[
                ("ce-specversion", "1.0"),
                ("ce-id", "1"),
                ("ce-source", "/s"),
                ("ce-type", "t"),
                ("ce-city", "Z%C3%BCrich"),
                ("ce-datacontenttype", "application/json"),
            ],
        ),
        (
            "kafka",
            None,
            &[
                ("ce_specversion", "1.0"),
                ("ce_id", "1"),
                ("ce_source", "/s"),
                ("ce_type", "t"),
                ("ce_city", "Zürich"),
                ("content-type", "application/json"),
            ],
        ),
        (
            "amqp",
            Some("application/json"),
            &[
                ("cloudEvents:specversion", "1.0"),
                ("cloudEvents:id", "1"),
                ("cloudEvents:source", "/s"),
                ("cloudEvents:type", "t"),
                ("cloudEvents:city", "Zürich"),
            ],
        ),
        (
            "amqp, no colon",
            Some("application/json"),
            &[
                ("cloudEvents_specversion", "1.0"),
                ("cloudEvents_id", "1"),
                ("cloudEvents_source", "/s"),
                ("cloudEvents_type", "t"),
                ("cloudEvents_city", "Zürich"),
            ],
        ),
    ];
    for (name, content_type, headers) in forms {
        let event = from_message(&foreign(headers, content_type, "[1, 2]")).unwrap();
        assert_eq!((event.id(), event.ty()), ("1", "t"), "{name}");
        assert_eq!(event.datacontenttype(), Some("application/json"), "{name}");
        assert_eq!(event.extension("city"), Some(&ExtensionValue::from("Zürich")), "{name}");
        assert_eq!(event.data(), Some(&Data::Binary(b"[1, 2]".to_vec())), "{name}");
    }
}

#[test]
fn a_percent_sign_in_a_kafka_header_stands_for_itself() {
    let headers = [("ce_specversion", "1.0"), ("ce_id", "%41"), ("ce_source", "/s"), ("ce_type", "t")];
    assert_eq!(from_message(&foreign(&headers, None, "")).unwrap().id(), "%41");
}

#[test]
fn a_foreign_event_with_nothing_optional_is_read() {
    let headers = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")];
    let binary = from_message(&foreign(&headers, None, "")).unwrap();
    let structured =
        from_message(&structured(&json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}))).unwrap();
    for event in [binary, structured] {
        assert_eq!((event.subject(), event.time(), event.datacontenttype()), (None, None, None));
        assert_eq!((event.data(), event.iter_extensions().count()), (None, 0));
    }
}

#[test]
fn structured_events_of_others_are_read() {
    let base = json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "x": "y", "n": 5, "b": true,
        "subject": null});
    let with = |extra: serde_json::Value| {
        let mut value = base.clone();
        value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        from_message(&structured(&value)).unwrap()
    };
    let event = with(json!({"data": {"total": 1}}));
    assert_eq!(event.data(), Some(&Data::Json(json!({"total": 1}))), "no content type: the data are JSON");
    assert_eq!(event.extension("n"), Some(&ExtensionValue::Integer(5)));
    assert_eq!(event.extension("b"), Some(&ExtensionValue::Boolean(true)));
    assert_eq!(event.subject(), None);
    let event = with(json!({"datacontenttype": "application/octet-stream", "data_base64": "AP8="}));
    assert_eq!(event.data(), Some(&Data::Binary(vec![0, 255])));
    let event = with(json!({"datacontenttype": "application/json", "data_base64": "eyJhIjoxfQ=="}));
    assert_eq!(event.data(), Some(&Data::Json(json!({"a": 1}))));
    let event = with(json!({"datacontenttype": "text/plain", "data": "hello"}));
    assert_eq!(event.data(), Some(&Data::String("hello".into())));
    let event = with(json!({"datacontenttype": "application/vnd.acme.order+json; v=1", "data": {"a": 1}}));
    assert_eq!(event.data(), Some(&Data::Json(json!({"a": 1}))));
    let nats = foreign(&[], Some("application/cloudevents"), &base.to_string());
    assert_eq!(from_message(&nats).unwrap().id(), "1");
}

#[test]
fn what_is_no_event_is_a_typed_error_and_never_a_panic() {
    let good: &[(&str, &str)] = &[("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t")];
    let with = |extra: (&'static str, &'static str)| {
        let headers: Vec<_> = good.iter().copied().filter(|(name, _)| *name != extra.0).chain([extra]).collect();
        foreign(&headers, Some("application/json"), "{}")
    };
    let mut messages = vec![
        Message::new("orders", "{}"),
        with(("ce-specversion", "0.3")),
        with(("ce-specversion", "2.0")),
        with(("ce-id", "")),
        with(("ce-source", "")),
        with(("ce-type", "")),
        with(("ce-time", "yesterday")),
        with(("ce-dataschema", "not a url")),
        with(("ce_id", "2")),
        with(("ce-correlationid", "")),
        with(("content-type", "x")).with_content_type("application/cloudevents-batch+json"),
        with(("x", "y")).with_content_type("application/cloudevents+avro"),
        foreign(&[], Some("application/cloudevents+json"), "not JSON"),
        foreign(&[], Some("application/cloudevents+json"), ""),
        foreign(&[], Some("application/cloudevents+json"), "[]"),
        foreign(&[], Some("application/cloudevents+json"), "null"),
        Message::new("orders", vec![0xff, 0xfe]).with_content_type("application/cloudevents+json"),
    ];
    messages.extend(good.iter().map(|(missing, _)| {
        let headers: Vec<_> = good.iter().copied().filter(|(name, _)| name != missing).collect();
        foreign(&headers, None, "{}")
    }));
    let mut not_utf8 = with(("x", "y"));
    not_utf8.headers_mut().append("ce-subject", [0xff]);
    messages.push(not_utf8);
    let base = json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t"});
    for extra in [
        json!({"id": 5}),
        json!({"id": ""}),
        json!({"specversion": "0.3"}),
        json!({"specversion": 1.0}),
        json!({"time": "25:00"}),
        json!({"dataschema": "::"}),
        json!({"data": 1, "data_base64": "AA=="}),
        json!({"data_base64": "***"}),
        json!({"data_base64": 5}),
        json!({"x": {"deep": 1}}),
        json!({"x": 1.5}),
        json!({"Upper": "x"}),
        json!({"datacontenttype": ["x"]}),
    ] {
        let mut value = base.clone();
        value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        messages.push(structured(&value));
    }
    for message in &messages {
        match from_message(message) {
            Err(error) => assert_mismatch(&error),
            Ok(event) => panic!("{message:?} was read as {event}"),
        }
        assert_eq!(Metadata::of_message(message).user_id, None);
    }
}

#[test]
fn no_cut_or_flipped_byte_of_a_structured_event_panics() {
    let whole = to_message(&full(), "orders", Mode::Structured).unwrap();
    for at in 0..whole.bytes().len() {
        let mut bytes = whole.bytes().to_vec();
        bytes[at] ^= 0x55;
        let _ = from_message(&Message::new("orders", bytes).with_content_type("application/cloudevents+json"));
        let cut = whole.bytes()[..at].to_vec();
        assert!(from_message(&Message::new("orders", cut).with_content_type("application/cloudevents+json")).is_err());
    }
}

#[test]
fn names_that_the_specification_forbids_are_not_written() {
    for name in ["Upper", "my-ext", "ключ", "", "data", "subject"] {
        let event = minimal().extension(name, "x").build().unwrap();
        for mode in MODES {
            assert_mismatch(&to_message(&event, "orders", mode).unwrap_err());
        }
    }
    let event = minimal().id("").build().unwrap();
    assert_mismatch(&to_message(&event, "orders", Mode::Binary).unwrap_err());
}

#[test]
fn a_key_of_the_sender_becomes_the_partition_key_and_stays_the_key() {
    let message = to_message(&minimal().subject("order-17").build().unwrap(), "orders", Mode::Binary).unwrap();
    assert_eq!(from_message(&message).unwrap().extension("partitionkey"), None);
    let event = from_message(&message.with_key("customer-3")).unwrap();
    assert_eq!(event.extension("partitionkey"), Some(&ExtensionValue::from("customer-3")));
    assert_eq!(to_message(&event, "orders", Mode::Binary).unwrap().key(), Some(&b"customer-3"[..]));
}

#[test]
fn metadata_travel_in_both_modes_and_agree_with_core() {
    for mode in MODES {
        let trace = TraceContext::new_root();
        let mut first = TypedEvent::new("/shop", "com.example.order.created", json!({"a": 1}))
            .with_subject("order-17")
            .with_user_id("u-4")
            .with_schema_version("2");
        first.metadata.trace = Some(trace);
        first.metadata.trace_state = Some("vendor=x".into());
        let first = first.to_message("orders", mode).unwrap();
        let second = TypedEvent::new("/payments", "com.example.payment.completed", ()).caused_by(&first);
        let second = second.to_message("payments", mode).unwrap();
        let third = minimal().build().unwrap().caused_by(&second);
        let third = to_message(&third, "shipping", mode).unwrap();

        assert_eq!(second.causation_id().as_ref(), Some(first.id()), "core reads what the envelope says");
        assert_eq!(third.causation_id().as_ref(), Some(second.id()));
        assert_eq!(third.correlation_id(), *first.id());
        let metadata = from_message(&third).unwrap().metadata();
        assert_eq!(metadata.correlation_id.as_ref(), Some(first.id()));
        assert_eq!(metadata.user_id.as_deref(), Some("u-4"));
        assert_eq!(metadata.schema_version, None, "the shape is the parent's own affair");
        assert_eq!(metadata.trace_state.as_deref(), Some("vendor=x"));
        let leaf = TraceContext::of(&third).unwrap();
        assert_eq!((leaf.trace_id, Some(leaf)), (trace.trace_id, metadata.trace));
        assert_ne!(leaf.span_id, trace.span_id);
        // Lineage that core added behind the envelope is seen too.
        let plain = Message::new("x", "").caused_by(&third);
        assert_eq!(Metadata::of_message(&plain).causation_id.as_ref(), Some(third.id()));
    }
}

#[test]
fn the_correlation_of_a_foreign_event_is_inherited() {
    let headers = [
        ("ce_specversion", "1.0"),
        ("ce_id", "1"),
        ("ce_source", "/s"),
        ("ce_type", "t"),
        ("ce_correlationid", "process-9"),
    ];
    let next = TypedEvent::new("/s", "a.b.done", ()).caused_by(&foreign(&headers, None, ""));
    assert_eq!(next.metadata.correlation_id, Some(MessageId::from("process-9")));
}

#[test]
fn lineage_headers_of_core_show_in_the_event() {
    let order = Message::new("orders", "");
    let message = to_message(&minimal().build().unwrap(), "orders", Mode::Binary).unwrap().caused_by(&order);
    assert_eq!(message.headers().get_str(lineage::CAUSATION_ID), Some(order.id().to_string().as_str()));
    assert_eq!(from_message(&message).unwrap().metadata().causation_id.as_ref(), Some(order.id()));
}

#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
struct Order {
    total_cents: u64,
}

#[test]
fn typed_events_round_trip() {
    for mode in MODES {
        let event = TypedEvent::new("/shop", "com.example.order.created", Order { total_cents: u64::MAX })
            .with_subject("order-17")
            .with_partition_key("customer-3")
            .with_schema_version("1");
        let message = event.to_message("orders", mode).unwrap();
        assert_eq!(TypedEvent::<Order>::from_message(&message).unwrap(), event, "{mode:?}");
        let nothing = TypedEvent::new("/shop", "com.example.shop.closed", ());
        assert_eq!(TypedEvent::<()>::from_message(&nothing.to_message("x", mode).unwrap()).unwrap(), nothing);
    }
}

#[test]
fn data_of_another_shape_is_a_schema_mismatch() {
    for mode in MODES {
        let message = TypedEvent::new("/s", "a.b.done", json!({"total_cents": "12"})).to_message("o", mode).unwrap();
        assert_mismatch(&TypedEvent::<Order>::from_message(&message).unwrap_err());
    }
    assert_mismatch(&Message::new("o", "{").json::<Order>().unwrap_err());
    assert_mismatch(&Message::tombstone("o", "k").json::<Order>().unwrap_err());
}

#[test]
fn an_impossible_time_is_an_error_of_the_sender() {
    let event = TypedEvent::new("/s", "a.b.done", ()).with_time(Timestamp::from_millis(i64::MAX));
    assert_mismatch(&event.to_message("o", Mode::Binary).unwrap_err());
}
