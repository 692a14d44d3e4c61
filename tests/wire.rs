//! The JSON of requests, changes and errors.

use std::time::Duration;

use serde_json::{Value, json};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Change, Item, ItemWeight};
use sidereal::wire::{ErrorBody, ErrorLine, RequestDefaults, RequestLine};
use sidereal::{
    Constraint, Error, Forced, Input, LongHistory, NamedToken, Normalization, Priority, Request,
    Result, SharedSid, UnknownItems,
};

fn read(line: &str) -> Result<Request> {
    RequestLine::parse(line)?.to_request(&RequestDefaults::default())
}

fn random_texts(rng: &mut fastrand::Rng) -> Vec<String> {
    (0..rng.usize(0..4)).map(|_| format!("é\"{}\n", rng.u32(..))).collect()
}

fn random_request(rng: &mut fastrand::Rng) -> Request {
    let input = match rng.u8(0..4) {
        0 => Input::History(random_texts(rng)),
        1 => Input::Tokens((0..rng.usize(0..4)).map(|_| rng.u32(..)).collect()),
        2 => Input::Text(random_texts(rng).concat()),
        _ => Input::Messages(vec![json!({"role": "user", "content": [{"b": 1, "a": null}]})]),
    };
    let mut request = Request::new(input)
        .with_exclude(random_texts(rng))
        .with_groups(random_texts(rng))
        .with_candidates(random_texts(rng))
        .with_log_probs(rng.bool())
        .with_titles(rng.bool())
        .with_timings(rng.bool())
        .with_beams(rng.usize(0..5000))
        .with_top_k(rng.usize(0..5000))
        .with_constraint(
            [Constraint::Trie, Constraint::Occurring, Constraint::None][rng.usize(0..3)],
        )
        .with_temperature(rng.f32() * 3.0)
        .with_shared_sid([SharedSid::All, SharedSid::First][rng.usize(0..2)])
        .with_priority([Priority::High, Priority::Normal, Priority::Low][rng.usize(0..3)]);
    if rng.bool() {
        let variables = json!({"query": "é", "enable_thinking": false});
        let variables = variables.as_object().cloned().expect("an object");
        request = request.with_variables(variables).with_special_tokens(rng.bool());
    }
    if rng.bool() {
        request = request.with_widths([rng.usize(0..100), rng.usize(0..100)]);
    }
    if rng.bool() {
        request =
            request.with_filter("tag:a & !tag:\"b c\"").with_user("u 1").with_seed(rng.u64(..));
    }
    if rng.bool() {
        let tokens = [rng.u32(..), rng.u32(..)];
        let forced = if rng.bool() { Forced::counted(tokens) } else { Forced::new(tokens) };
        let named = [NamedToken::Text("Yes".into()), NamedToken::Id(rng.u32(..))];
        request = request.with_forced(forced).with_read(named);
    }
    if rng.bool() {
        request = request
            .with_only(random_texts(rng))
            .with_unknown_items(UnknownItems::Error)
            .with_long_history(LongHistory::Cut);
    }
    if rng.bool() {
        request = request.with_deadline(Duration::from_micros(rng.u64(0..1 << 40)));
    }
    if rng.bool() {
        request = request.with_per_sid(rng.usize(0..5)).with_min_snapshot(rng.u64(..));
    }
    match rng.u8(0..4) {
        0 => request.with_normalization(Normalization::Vocabulary),
        1 => request.with_normalization(Normalization::Level),
        2 => request.with_normalization(Normalization::Children),
        _ => request,
    }
}

#[test]
fn a_request_has_one_input() {
    let text = read(r#"{"text": "Hi"}"#).expect("a text").input;
    assert_eq!(text, Input::Text("Hi".into()));
    for name in ["items", "item_ids", "item_id_list"] {
        let request = read(&format!(r#"{{"{name}": [1, "2"], "user_id": 7}}"#)).expect(name);
        assert_eq!(request.input, Input::History(vec!["1".into(), "2".into()]));
        assert_eq!(request.user.as_deref(), Some("7"));
    }
    for line in [
        r#"{"text": "Hi", "history": ["1"]}"#,
        r#"{"messages": [{"role": "user"}], "tokens": [1]}"#,
        r#"{"messages": ["Hi"]}"#,
        r#"{"messages": {"role": "user"}}"#,
        r#"{"text": ["Hi"]}"#,
        r#"{"text": "Hi", "variables": 1}"#,
        r#"{"items": ["1"], "history": ["1"]}"#,
    ] {
        assert!(read(line).is_err(), "{line}");
    }
    let error = read(r#"{"prompt": "Hi"}"#).expect_err("another name").to_string();
    assert!(error.contains("did you mean `text`"), "{error}");
}

#[test]
fn a_request_survives_a_round_trip_whatever_the_readers_defaults_are() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut defaults = RequestDefaults::default();
    (defaults.beams, defaults.widths, defaults.top_k) = (7, vec![3, 4, 7], 9);
    (defaults.constraint, defaults.titles) = (Constraint::Level, true);
    (defaults.unknown_items, defaults.long_history) = (UnknownItems::Error, LongHistory::Cut);
    defaults.per_sid = Some(3);
    for case in 0..2000 {
        let request = random_request(&mut rng);
        let line = serde_json::to_string(&request).expect("requests have a JSON form");
        let read = RequestLine::parse(&line).and_then(|line| line.to_request(&defaults));
        assert_eq!(read.expect("a sound line"), request, "case {case}: {line}");
    }
}

#[test]
fn a_request_is_written_with_the_names_of_the_request_line() {
    let request = Request::from_history(["17", "4"])
        .with_groups(["tag:a"])
        .with_seed(3)
        .with_forced(Forced::counted([7, 8]))
        .with_read([NamedToken::Text("Yes".into()), NamedToken::Id(9)])
        .with_deadline(Duration::from_millis(20));
    let expected = json!({
        "history": ["17", "4"], "groups": ["tag:a"], "forced": {"tokens": [7, 8], "counted": true},
        "read": ["Yes", 9], "seed": 3, "exclude_history": false, "log_probs": false, "sequences": false, "titles": false, "timings": false,
        "beams": 50, "top_k": 10, "constraint": "trie", "temperature": 1.0, "shared_sid": "all",
        "priority": "normal", "deadline_ms": 20.0, "unknown_items": "skip", "long_history": "error",
    });
    assert_eq!(serde_json::to_value(&request).expect("a JSON form"), expected);
}

#[test]
fn a_field_under_another_name_is_refused_with_its_own() {
    for (other, own) in
        [("each", "groups"), ("sample", "seed"), ("k", "top_k"), ("beam_width", "beams")]
    {
        let error = read(&format!(r#"{{"tokens": [1], "{other}": 1}}"#)).expect_err("refused");
        let text = error.to_string();
        assert_eq!(error.code(), "malformed_request");
        assert!(text.contains(&format!("unknown field `{other}`")), "{text}");
        assert!(text.contains(&format!("did you mean `{own}`?")), "{text}");
    }
    let text = read(r#"{"tokens": [1], "colour": 1}"#).expect_err("refused").to_string();
    assert!(text.contains("unknown field `colour`") && !text.contains("did you mean"), "{text}");
}

#[test]
fn forced_and_read_tokens_must_be_tokens() {
    let request =
        read(r#"{"tokens": [1], "forced": {"tokens": [5]}, "read": ["Yes", 4294967295]}"#)
            .expect("a sound line");
    assert_eq!(request.forced, Some(Forced::new([5])));
    assert_eq!(request.read, [NamedToken::Text("Yes".into()), NamedToken::Id(u32::MAX)]);
    for (fields, code, word) in [
        (r#""forced": {"tokens": []}"#, "invalid_field", "at least one"),
        (r#""forced": {"tokens": [4294967296]}"#, "invalid_field", "forced: 4294967296"),
        (r#""forced": {"tokens": [1], "count": true}"#, "malformed_request", "count"),
        (r#""forced": [1]"#, "malformed_request", "malformed"),
        (r#""read": [1, -1]"#, "invalid_field", "read: -1 at position 1"),
        (r#""read": [1.5]"#, "malformed_request", "expected a token"),
        (r#""read": "Yes""#, "malformed_request", "malformed"),
    ] {
        let error = read(&format!(r#"{{"tokens": [1], {fields}}}"#)).expect_err(fields);
        let text = error.to_string();
        assert_eq!(error.code(), code, "{fields}: {text}");
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_line_says_how_many_items_of_one_sid_come_back_and_which_state_it_accepts() {
    let request = read(r#"{"tokens": [1], "per_sid": 2, "min_snapshot": 7}"#).expect("sound");
    assert_eq!((request.per_sid, request.min_snapshot), (Some(2), Some(7)));
    // A default holds where the line says nothing of items that share a semantic ID.
    let mut defaults = RequestDefaults::default();
    defaults.per_sid = Some(3);
    for (line, per_sid) in [
        (r#"{"tokens": [1]}"#, Some(3)),
        (r#"{"tokens": [1], "per_sid": 5}"#, Some(5)),
        (r#"{"tokens": [1], "shared_sid": "all"}"#, None),
        (r#"{"tokens": [1], "shared_sid": "all", "per_sid": 1}"#, Some(1)),
    ] {
        let request = RequestLine::parse(line).and_then(|line| line.to_request(&defaults));
        assert_eq!(request.expect("a sound line").per_sid, per_sid, "{line}");
    }
    for (fields, code, word) in [
        (r#""per_sid": -1"#, "invalid_field", "per_sid: -1 is not at least 1"),
        (r#""per_sid": 1.5"#, "malformed_request", "malformed"),
        (r#""min_snapshot": -1"#, "invalid_field", "not the number of a snapshot"),
        (r#""min_snapshot": "new""#, "malformed_request", "malformed"),
    ] {
        let error = read(&format!(r#"{{"tokens": [1], {fields}}}"#)).expect_err(fields);
        assert_eq!(error.code(), code, "{fields}: {error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn changes_survive_a_round_trip_in_the_documented_form() {
    let mut item = Item::new("17", Sid::new(&[3, 250, 7]).expect("three codes"));
    let put = json!({"put": {"item": "17", "sid": [3, 250, 7], "available": true}});
    let mut cases = vec![(Change::Put(item.clone()), put)];
    item.title = "A \"lamp\"".into();
    item.tags = vec!["garden".into(), "new".into()];
    item.available = false;
    let put = json!({"put": {
        "item": "17", "sid": [3, 250, 7], "title": "A \"lamp\"", "tags": ["garden", "new"],
        "available": false,
    }});
    cases.push((Change::Put(item), put));
    cases.push((Change::Delete { item: "17".into() }, json!({"delete": {"item": "17"}})));
    cases.push((
        Change::Availability { item: "17".into(), available: false },
        json!({"availability": {"item": "17", "available": false}}),
    ));
    cases.push((
        Change::Tag { item: "17".into(), add: vec!["new".into()], remove: vec![] },
        json!({"tag": {"item": "17", "add": ["new"], "remove": []}}),
    ));
    let weight = ItemWeight::new(2.5).expect("finite");
    cases.push((
        Change::Weight { item: "17".into(), weight },
        json!({"weight": {"item": "17", "weight": 2.5}}),
    ));
    let mut heavy = Item::new("17", Sid::new(&[3]).expect("one code"));
    heavy.weight = weight;
    let put = json!({"put": {"item": "17", "sid": [3], "available": true, "weight": 2.5}});
    cases.push((Change::Put(heavy), put));
    for (change, expected) in cases {
        let written = serde_json::to_value(&change).expect("changes have a JSON form");
        assert_eq!(written, expected);
        let read: Change = serde_json::from_value(written).expect("the documented form");
        assert_eq!(read, change);
        let text = serde_json::to_string(&change).expect("changes have a JSON form");
        assert_eq!(serde_json::from_str::<Change>(&text).expect("the documented form"), change);
    }
}

#[test]
fn items_and_changes_are_read_leniently_where_files_of_the_field_differ() {
    let item: Item = serde_json::from_str(r#"{"item": 17, "sid": ["<a_3>", 250]}"#)
        .expect("a number as name, a text as code");
    assert_eq!(item, Item::new("17", Sid::new(&[3, 250]).expect("two codes")));
    let change: Change = serde_json::from_str(r#"{"tag": {"item": 17}}"#).expect("no tags");
    assert_eq!(change, Change::Tag { item: "17".into(), add: vec![], remove: vec![] });
    for (line, word) in [
        (r#"{"put": {"item": "1", "sid": [70000]}}"#, "code 70000 is over 65535"),
        (r#"{"put": {"item": "1", "sid": []}}"#, "levels"),
        (r#"{"put": {"sid": [1]}}"#, "missing field `item`"),
        (r#"{"drop": {"item": "1"}}"#, "unknown variant `drop`"),
        (r#"{"delete": {"item": null}}"#, "expected an item's name"),
        (r#"{"put": {"item": "1", "sid": [1], "weight": "2 kg"}}"#, "expected a number"),
        (r#"{"put": {"item": "1", "sid": [1], "weight": 1e39}}"#, "not a finite number"),
        (r#"{"weight": {"item": "1"}}"#, "missing field `weight`"),
        (r#"{"weight": {"item": "1", "weight": null}}"#, "expected a number"),
        (r#"{"weight": {"item": "1", "weight": -1e300}}"#, "not a finite number"),
    ] {
        let text = sidereal::json::parse::<Change>(line).expect_err(line);
        assert!(text.contains(word), "{text}");
    }
}

/// `"availble": false` must not leave an item that is recommended.
#[test]
fn fields_that_items_do_not_have_are_refused() {
    let fields = ["item_id", "sid", "title", "tags", "available", "weight"];
    for slip in ["availble", "Available", "tag", "sids", "price", "expires"] {
        let item = format!(r#"{{"item": "1", "sid": [1], "{slip}": false}}"#);
        for line in [item.clone(), format!(r#"{{"put": {item}}}"#)] {
            let text = match line.contains("put") {
                true => sidereal::json::parse::<Change>(&line).expect_err(&line),
                false => sidereal::json::parse::<Item>(&line).expect_err(&line),
            };
            assert!(text.contains(&format!("unknown field `{slip}`")), "{text}");
            assert!(fields.iter().all(|field| text.contains(field)), "{text}");
        }
    }
}

#[test]
fn errors_are_written_with_code_and_message_and_for_servers_with_their_kind() {
    let error = Error::UnknownItem { field: "history", item: "x".into() };
    let message = error.to_string();
    let written = serde_json::to_string(&ErrorBody::new(&error)).expect("a JSON form");
    let expected = format!(r#"{{"code":"unknown_item","message":{}}}"#, json!(message));
    assert_eq!(written, expected);
    let body = serde_json::to_value(ErrorBody::with_kind(&error)).expect("a JSON form");
    assert_eq!(body, json!({"code": "unknown_item", "kind": "caller", "message": message}));
    let id = Value::from(7);
    let line = serde_json::to_string(&ErrorLine::new(&id, 3, &error)).expect("a JSON form");
    assert_eq!(line, format!(r#"{{"id":7,"line":3,"error":{expected}}}"#));
}

#[test]
fn entries_are_names_or_objects_with_features() {
    let parse = |line: &str| {
        let line = RequestLine::parse(line)?;
        line.to_request(&RequestDefaults::default())
    };
    let line = r#"{"history": [{"item": 17, "time": 5, "rating": "4"}, "9", {"item_id": "x"}],
                   "candidates": ["1", {"item": "2", "price": 2.5}],
                   "time": "1700000000", "features": {"country": "DE"}}"#;
    let request = parse(line).expect("a request");
    assert_eq!(request.input, Input::History(vec!["17".into(), "9".into(), "x".into()]));
    assert_eq!(request.candidates, ["1", "2"]);
    let features = &request.features;
    assert_eq!(features.time, Some(1_700_000_000));
    assert_eq!(json!(features.context), json!({"country": "DE"}));
    assert_eq!(json!(features.history), json!([{"time": 5, "rating": "4"}, {}, {}]));
    assert_eq!(json!(features.candidates), json!([{}, {"price": 2.5}]));
    // Written and read again, it is the same request.
    let written = serde_json::to_string(&request).expect("a JSON form");
    assert_eq!(parse(&written).expect("a request"), request);
    // Names alone are written as names.
    let plain = parse(r#"{"history": [{"item": "17"}, 4]}"#).expect("a request");
    assert!(plain.features.history.is_empty());
    for (line, word) in [
        (r#"{"history": [{"time": 5}]}"#, "entry 0 has no \"item\""),
        (r#"{"history": ["4", {"item": [5]}]}"#, "entry 1"),
        (r#"{"history": ["4", 1.5]}"#, "entry 1"),
        (r#"{"history": ["4"], "time": "noon"}"#, "a whole number"),
        (r#"{"history": ["4"], "time": 99999999999999999999}"#, "time"),
        (r#"{"history": ["4"], "features": 4}"#, "features"),
    ] {
        let error = parse(line).expect_err(line).to_string();
        assert!(error.contains(word), "{line}: {error}");
    }
}

/// A field that the API description leaves out is one that its readers do not know.
#[test]
fn the_api_description_has_every_field_of_a_request() {
    let document = include_str!("../src/server/openapi.json");
    let document: serde_json::Value = serde_json::from_str(document).expect("JSON");
    let aliases = ["items", "item_ids", "item_id_list", "user_id"];
    let described = &document["components"]["schemas"]["Request"]["properties"];
    let error = RequestLine::parse("{\"unknown\": 1}").expect_err("no such field").to_string();
    let (_, known) = error.split_once("expected one of").expect("the known fields");
    let known: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
    assert!(known.len() > 30, "{error}");
    for field in known.into_iter().filter(|field| !aliases.contains(field)) {
        assert!(described.get(field).is_some(), "openapi.json does not describe {field:?}");
    }
}
