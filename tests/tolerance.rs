//! What production sends is no error: unknown items, allow-lists, histories of any length, and values
//! as logs and feature stores write them.

use std::sync::Arc;

use serde_json::{Value, json};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Change, Item};
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{
    Answer, CatalogWriter, Constraint, Engine, EngineOptions, Error, LongHistory, Normalization,
    Request, Result, UnknownItems,
};

#[path = "common/folders.rs"]
mod folders;

use folders::{Folder, T5};

fn small() -> (Folder, Engine) {
    let folder = Folder::small();
    let engine = folder.open().expect("a sound checkpoint");
    (folder, engine)
}

fn answer(engine: &mut Engine, request: &Request) -> Answer {
    engine.recommend(request).expect("a sound request")
}

fn names(answer: &Answer) -> Vec<&str> {
    answer.items.iter().map(|found| &*found.item).collect()
}

// Unknown items.

#[test]
fn unknown_items_of_a_history_are_left_out_counted_and_listed() {
    let (_, mut engine) = small();
    let known = Request::from_history(["i4", "i4", "i9"]);
    let mixed = Request::from_history(["gone", "i4", "i4", "new", "i9", "gone"]);
    let (known, mixed) = (answer(&mut engine, &known), answer(&mut engine, &mixed));
    assert_eq!(mixed, known);
    assert_eq!((mixed.tokens, known.tokens), (9, 9), "repetitions stay");
    assert_eq!(mixed.unknown_items.history.count, 3);
    assert_eq!(mixed.unknown_items.history.names, ["gone", "new", "gone"]);
    assert_eq!((mixed.unknown_items.count(), known.unknown_items.count()), (3, 0));
    let json = serde_json::to_value(&mixed).expect("a JSON form");
    let expected = json!({"history": {"count": 3, "names": ["gone", "new", "gone"]}});
    assert_eq!(json["unknown_items"], expected);
    let json = serde_json::to_value(&known).expect("a JSON form");
    assert_eq!(json.get("unknown_items"), None);
}

#[test]
fn a_history_of_unknown_items_alone_is_an_error_and_an_empty_one_stays_what_it_was() {
    let (folder, mut engine) = small();
    for request in [
        Request::from_history(["x", "y"]),
        Request::from_history(["i4", "x"]).with_unknown_items(UnknownItems::Error),
    ] {
        let error = engine.recommend(&request).expect_err("nothing is known, or all must be");
        assert_eq!(error.code(), "unknown_item");
        let text = error.to_string();
        assert!(text.contains("\"x\"") && text.contains("unknown_items"), "{text}");
    }
    let all = Request::from_history(["i4"]).with_unknown_items(UnknownItems::Error);
    assert_eq!(answer(&mut engine, &all), answer(&mut engine, &Request::from_history(["i4"])));
    let empty = Request::from_history(Vec::<String>::new());
    assert!(matches!(engine.recommend(&empty), Err(Error::EmptyInput)));
    folder.edit("sidereal.json", |layout| layout["prompt"] = json!({"prefix": [1]}));
    let mut engine = folder.open().expect("a sound checkpoint");
    assert!(!answer(&mut engine, &empty).items.is_empty());
    let unknown = Request::from_history(["x"]);
    assert!(matches!(engine.recommend(&unknown), Err(Error::UnknownItem { .. })));
}

#[test]
fn a_history_is_cut_to_the_models_items_before_it_is_looked_up() {
    let (folder, _) = small();
    folder.edit("sidereal.json", |layout| layout["prompt"] = json!({"max_items": 3}));
    let mut engine = folder.open().expect("a sound checkpoint");
    let history = Request::from_history(["x", "x", "i1", "y", "i2"]);
    let cut = answer(&mut engine, &history);
    assert_eq!(cut, answer(&mut engine, &Request::from_history(["i1", "i2"])));
    assert_eq!((cut.skipped_items, cut.tokens), (2, 6), "unknown items count as items");
    assert_eq!(cut.unknown_items.history.names, ["y"], "items that are cut are not looked up");
    let strict = Request::from_history(["x", "i1", "i2", "i3"]);
    let strict = strict.with_unknown_items(UnknownItems::Error);
    assert_eq!(answer(&mut engine, &strict).unknown_items.count(), 0);
}

#[test]
fn names_of_any_number_and_length_make_a_bounded_answer() {
    let (_, mut engine) = small();
    // Two bytes a character, from an odd position on: the limit falls into a character.
    let long = format!("x{}", "é".repeat(1 << 14));
    let mut history = vec![long.clone(); 1000];
    history.push("i1".into());
    let found = answer(&mut engine, &Request::from_history(history));
    let unknown = &found.unknown_items.history;
    assert_eq!((unknown.count, unknown.names.len()), (1000, 16));
    let beginning = format!("x{}…", "é".repeat(63));
    assert!(unknown.names.iter().all(|name| *name == beginning), "{:?}", unknown.names[0]);
    let error = engine.recommend(&Request::from_history([long])).expect_err("nothing is known");
    assert!(error.to_string().len() < 1000);
    let just = "x".repeat(128);
    let found = answer(&mut engine, &Request::from_history(["i1", &just]));
    assert_eq!(found.unknown_items.history.names, [just]);
}

#[test]
fn unknown_candidates_are_left_out_and_an_error_where_none_is_known() {
    let (_, mut engine) = small();
    let rank = |candidates: &[&str]| {
        Request::from_history(["i4", "z"]).with_candidates(candidates.to_vec())
    };
    let mixed = answer(&mut engine, &rank(&["x", "i1", "i2", "i1", "y"]));
    assert_eq!(mixed, answer(&mut engine, &rank(&["i1", "i2"])));
    assert_eq!(mixed.items.len(), 2);
    assert_eq!(mixed.unknown_items.candidates.names, ["x", "y"]);
    assert_eq!(mixed.unknown_items.history.names, ["z"]);
    let none = engine.recommend(&rank(&["x", "y"])).expect_err("nothing to score");
    assert_eq!(none.code(), "unknown_item");
    let strict = rank(&["i1", "x"]).with_unknown_items(UnknownItems::Error);
    assert_eq!(engine.recommend(&strict).expect_err("strict").code(), "unknown_item");
}

#[test]
fn an_item_that_is_deleted_while_requests_run_fails_none_of_them() {
    let (folder, _) = small();
    let path = folder.path().join("items.jsonl");
    let catalog = Arc::new(Catalog::open(&path).expect("sound items"));
    let mut engine = folder.open_with(&catalog).expect("a sound checkpoint");
    let writer = CatalogWriter::in_memory(catalog, &Default::default()).expect("a thread");
    let request = Request::from_history(["i4", "i9"]);
    assert_eq!(answer(&mut engine, &request).unknown_items.count(), 0);
    writer.apply(&[Change::Delete { item: "i9".into() }]).expect("sound");
    let after = answer(&mut engine, &request);
    assert_eq!(after.unknown_items.history.names, ["i9"]);
    assert_eq!(after, answer(&mut engine, &Request::from_history(["i4"])));
    let metrics = engine.metrics();
    assert_eq!(metrics.unknown_items, [("history", 1), ("candidates", 0), ("only", 0)]);
    let page = metrics.to_prometheus();
    assert!(page.contains("sidereal_unknown_items_total{field=\"history\"} 1\n"), "{page}");
}

// Allow-lists.

/// A request for everything that it allows.
fn everything() -> Request {
    Request::from_history(["i3", "i4"]).with_beams(216).with_top_k(1000)
}

#[test]
fn an_allow_list_leaves_exactly_its_items_with_the_scores_of_a_search() {
    let (folder, mut engine) = small();
    let all = answer(&mut engine, &everything());
    let listed: Vec<&str> = names(&all).into_iter().step_by(7).collect();
    for constraint in [Constraint::Trie, Constraint::Occurring, Constraint::Level, Constraint::None]
    {
        let request = everything().with_only(listed.clone()).with_constraint(constraint);
        let found = answer(&mut engine, &request);
        let expected = all.items.iter().filter(|found| listed.contains(&&*found.item));
        let expected: Vec<_> = expected.cloned().collect();
        match constraint {
            Constraint::None => assert!(found.items.iter().all(|item| expected.contains(item))),
            _ => assert_eq!(found.items, expected, "{constraint:?}"),
        }
    }
    // So narrow a beam finds the listed items alone, where others would push them out.
    let last = &all.items.last().expect("some items").item;
    let one = everything().with_only([last]).with_beams(1);
    assert_eq!(names(&answer(&mut engine, &one)), [last]);
    assert_eq!(folder.catalog().num_items(), all.items.len());
}

#[test]
fn an_allow_list_goes_with_filters_groups_and_exclusions_and_its_unknown_names_are_ignored() {
    let (folder, _) = small();
    let items = String::from_utf8(folder.read("items.jsonl")).expect("text");
    let tagged = items.lines().enumerate().map(|(at, line)| {
        let mut item: Value = serde_json::from_str(line).expect("JSON");
        item["tags"] = if at % 2 == 0 { json!(["even"]) } else { json!(["odd"]) };
        format!("{item}\n")
    });
    let path = folder.write("tagged.jsonl", tagged.collect::<String>());
    let catalog = Arc::new(Catalog::open(&path).expect("sound items"));
    let mut engine = folder.open_with(&catalog).expect("a sound checkpoint");
    let request = everything().with_only(["i1", "i2", "i4", "i6", "i4", "x", ""]);
    let found = |answer: &Answer| {
        let mut found: Vec<String> = answer.items.iter().map(|item| item.item.clone()).collect();
        found.sort_unstable();
        found
    };
    let plain = answer(&mut engine, &request);
    assert_eq!(found(&plain), ["i1", "i2", "i4", "i6"]);
    let unknown = &plain.unknown_items.only;
    assert_eq!((unknown.count, &unknown.names[..]), (2, &["x".to_string(), "".into()][..]));
    let both = request.clone().with_filter("tag:even").with_exclude(["i2"]);
    assert_eq!(found(&answer(&mut engine, &both)), ["i4", "i6"]);
    let grouped = answer(&mut engine, &request.with_groups(["tag:odd", "tag:even"]));
    let counts: Vec<usize> = grouped.groups.iter().map(|group| group.items.len()).collect();
    assert_eq!(counts, [1, 3]);
}

#[test]
fn an_empty_allow_list_allows_nothing() {
    let (_, mut engine) = small();
    for only in [vec![], vec!["x", "y"]] {
        for normalization in
            [Normalization::Vocabulary, Normalization::Level, Normalization::Children]
        {
            let request = everything().with_only(only.clone()).with_normalization(normalization);
            assert!(answer(&mut engine, &request).items.is_empty());
        }
    }
    let nothing = everything().with_only(Vec::<String>::new());
    let line = serde_json::to_string(&nothing).expect("a JSON form");
    let read = RequestLine::parse(&line).and_then(|line| line.to_request(&Default::default()));
    assert_eq!(read.expect("a sound line").only, Some(Vec::new()));
    let candidates = everything().with_candidates(["i1"]).with_only(["i1"]);
    assert_eq!(engine.recommend(&candidates).expect_err("not both").code(), "invalid_field");
}

#[test]
fn an_allow_list_has_items_that_were_put_since_and_loses_those_that_were_deleted() {
    let (folder, _) = small();
    let path = folder.path().join("items.jsonl");
    let catalog = Arc::new(Catalog::open(&path).expect("sound items"));
    let mut engine = folder.open_with(&catalog).expect("a sound checkpoint");
    let writer = CatalogWriter::in_memory(catalog, &Default::default()).expect("a thread");
    let put = |name: &str, codes: [u16; 3]| {
        Change::Put(Item::new(name, Sid::new(&codes).expect("three codes")))
    };
    // Some beside items that there are, some that share a semantic ID of their own.
    let puts: Vec<Change> =
        (0..40).map(|n| put(&format!("new{n}"), [n % 6, n % 5, n % 2])).collect();
    writer.apply(&puts).expect("sound changes");
    writer
        .apply(&[
            Change::Delete { item: "new3".into() },
            Change::Availability { item: "new5".into(), available: false },
            Change::Delete { item: "i7".into() },
        ])
        .expect("sound changes");
    let request = everything().with_only(["new1", "new3", "new5", "new31", "new39", "i7", "i8"]);
    let found = answer(&mut engine, &request);
    let mut sorted = names(&found);
    sorted.sort_unstable();
    assert_eq!(sorted, ["i8", "new1", "new31", "new39"]);
    assert_eq!(found.unknown_items.only.names, ["new3", "i7"]);
    writer.compact().expect("room in memory");
    assert_eq!(answer(&mut engine, &request).items, found.items);
}

// The codes that occur.

/// A catalog of few codes: 2, 3 and 2 of each level's six.
fn few_codes() -> Vec<Item> {
    let sids: [[u16; 3]; 5] = [[0, 1, 0], [0, 2, 4], [3, 1, 4], [3, 5, 0], [3, 5, 4]];
    let item = |(n, codes): (usize, &[u16; 3])| {
        Item::new(format!("i{n}"), Sid::new(codes).expect("three codes"))
    };
    sids.iter().enumerate().map(item).collect()
}

fn catalog(items: Vec<Item>) -> Arc<Catalog> {
    let mut builder = CatalogBuilder::default();
    items.into_iter().for_each(|item| builder.add(item).expect("levels agree"));
    Arc::new(builder.build().expect("names are unique"))
}

#[test]
fn occurring_codes_are_chosen_from_as_if_the_model_had_no_others() {
    let (folder, _) = small();
    let mut engine = folder.open_with(&catalog(few_codes())).expect("a sound checkpoint");
    // The same model with tokens for these codes alone.
    let other = Folder::small();
    other.edit("sidereal.json", |layout| {
        let template = |text: &str| json!({"size": 6, "template": text});
        layout["levels"] = json!([template("a{}"), template("b{}"), template("c{}")]);
    });
    let texts = [("a0", 2), ("a3", 5), ("b1", 9), ("b2", 10), ("b5", 13), ("c0", 14), ("c4", 18)];
    let vocab: serde_json::Map<String, Value> =
        texts.iter().map(|&(text, token)| (text.to_string(), json!(token))).collect();
    other.write("tokenizer.json", json!({"model": {"vocab": vocab}}).to_string());
    let mut masked = other.open_with(&catalog(few_codes())).expect("a sound checkpoint");
    let mut num_found = 0;
    for beams in 1..12 {
        for (own, others) in [
            (Normalization::Vocabulary, Normalization::Vocabulary),
            (Normalization::Children, Normalization::Level),
        ] {
            let request = Request::from_history(["i0", "i3"]).with_beams(beams).with_top_k(99);
            let occurring =
                request.clone().with_constraint(Constraint::Occurring).with_normalization(own);
            let level = request.with_constraint(Constraint::Level).with_normalization(others);
            let (found, expected) = (answer(&mut engine, &occurring), answer(&mut masked, &level));
            assert_eq!(names(&found), names(&expected), "{beams} beams, {own:?}");
            for (found, expected) in found.items.iter().zip(&expected.items) {
                let difference = (found.score - expected.score).abs();
                assert!(difference < 1e-5, "{beams} beams, {own:?}: {found:?}, not {expected:?}");
            }
            num_found += found.items.len();
        }
    }
    assert!(num_found > 20, "only {num_found} items were found");
}

#[test]
fn codes_occur_from_the_put_of_their_first_item_to_the_deletion_of_their_last() {
    let catalog = catalog(few_codes());
    let writer = CatalogWriter::in_memory(Arc::clone(&catalog), &Default::default());
    let writer = writer.expect("a thread");
    let occurring = || catalog.snapshot().occurring().to_vec();
    assert_eq!(occurring(), [vec![0, 3], vec![1, 2, 5], vec![0, 4]]);
    let delete = |item: &str| Change::Delete { item: item.into() };
    writer.apply(&[delete("i1")]).expect("sound");
    assert_eq!(occurring(), [vec![0, 3], vec![1, 5], vec![0, 4]]);
    let new = Item::new("new", Sid::new(&[5, 2, 4]).expect("three codes"));
    writer.apply(&[Change::Put(new)]).expect("sound");
    assert_eq!(occurring(), [vec![0, 3, 5], vec![1, 2, 5], vec![0, 4]]);
    // An unavailable item is an item, as LC-Rec counts them.
    let unavailable = Change::Availability { item: "new".into(), available: false };
    writer.apply(&[unavailable]).expect("sound");
    assert_eq!(occurring()[0], [0, 3, 5]);
    writer.compact().expect("room in memory");
    assert_eq!(occurring()[0], [0, 3, 5]);
    writer.apply(&["i0", "i2", "i3", "i4", "new"].map(delete)).expect("sound");
    assert_eq!(occurring(), vec![Vec::<u16>::new(); 3]);
}

// Long histories.

#[test]
fn a_long_history_is_cut_to_what_fits_where_the_request_asks_for_it() {
    // The model has 2,048 positions, and the engine takes 90 tokens of the other one's.
    for (folder, max_context) in [(Folder::small(), 8192), (Folder::of(T5), 90)] {
        folder.edit("sidereal.json", |layout| {
            layout["prompt"] = json!({"prefix": [1], "separator": [0], "suffix": [1]});
        });
        let snapshot = folder.catalog();
        let options = EngineOptions::default().with_threads(1).with_max_context(max_context);
        let mut engine = folder.open_as(&options).expect("a sound checkpoint");
        let item = snapshot.name(snapshot.all_items().next().expect("an item")).to_string();
        let history = Request::from_history(vec![item.clone(); 5000]);
        let error = engine.recommend(&history).expect_err("too long");
        assert!(matches!(error, Error::HistoryTooLong { .. }), "{error}");
        let text = error.to_string();
        for word in ["long_history", "max_items", "--max-context"] {
            assert!(text.contains(word), "{text}");
        }
        let cut = answer(&mut engine, &history.with_long_history(LongHistory::Cut));
        assert!(!cut.items.is_empty() && cut.skipped_items > 0);
        let newest = 5000 - cut.skipped_items;
        let short = Request::from_history(vec![item.clone(); newest]);
        assert_eq!(answer(&mut engine, &short), cut);
        // One more would not have fitted.
        let longer = Request::from_history(vec![item; newest + 1]);
        assert_eq!(engine.recommend(&longer).expect_err("too long").code(), "history_too_long");
    }
}

// What a feature store or an at-least-once feed sends: the table of docs/serving.md, row by row.

fn ask(engine: &mut Engine, fields: &str) -> Result<Answer> {
    let line = RequestLine::parse(&format!("{{{fields}}}"))?;
    engine.recommend(&line.to_request(&RequestDefaults::default())?)
}

#[test]
fn what_can_only_mean_one_thing_is_read_as_that() {
    let (_, mut engine) = small();
    let numbers = catalog(
        few_codes()
            .into_iter()
            .zip([4u32, 9, 17, 1, 2])
            .map(|(item, name)| Item { name: name.to_string(), ..item })
            .collect(),
    );
    let (folder, _) = small();
    let mut by_number = folder.open_with(&numbers).expect("a sound checkpoint");
    for (loose, plain) in [
        // Items in any notation of their number, and what is no item.
        (r#""history": [4, 9]"#, r#""history": ["4", "9"]"#),
        (r#""history": [4.0, 9.0]"#, r#""history": ["4", "9"]"#),
        (r#""history": [4, null, 9, "", -1]"#, r#""history": ["4", "9"]"#),
        (
            r#""history": [4], "exclude": [9, null, 9, "no such item"]"#,
            r#""history": ["4"], "exclude": ["9"]"#,
        ),
        (r#""history": [4], "only": [9, 9.0, null]"#, r#""history": ["4"], "only": ["9"]"#),
        (
            r#""history": [4], "candidates": [9, "9", 17]"#,
            r#""history": ["4"], "candidates": ["9", "17"]"#,
        ),
    ] {
        let (found, expected) = (ask(&mut by_number, loose), ask(&mut by_number, plain));
        assert_eq!(found.expect(loose), expected.expect(plain), "{loose}");
    }
    let plain = r#""history": ["i4", "i9"]"#;
    let expected = ask(&mut engine, plain).expect("a sound line");
    for same in [
        // A null is a field left out, and so is an empty list of what is excluded, grouped or read.
        r#""tokens": null, "filter": null, "groups": null, "candidates": null, "only": null"#,
        r#""beams": null, "top_k": null, "normalize": null, "constraint": null, "seed": null"#,
        r#""temperature": null, "deadline_ms": null, "user": null, "priority": null, "target": null"#,
        r#""forced": null, "read": null, "unknown_items": null, "long_history": null"#,
        r#""exclude": [], "groups": [], "candidates": [], "read": [], "tokens": []"#,
        // Numbers in any notation.
        r#""beams": 50.0, "top_k": "10", "temperature": "1", "deadline_ms": "1e9""#,
        r#""beams": ["50", 50, 50.0]"#,
        // A user is any scalar.
        r#""user": 7"#,
        r#""user": 7.5"#,
        r#""user": true"#,
        r#""user": """#,
    ] {
        let found = ask(&mut engine, &format!("{plain}, {same}")).expect(same);
        assert_eq!(found, expected, "{same}");
    }
    for most in ["1000000000", "18446744073709551615", "\"99999999999999999999999\""] {
        let found = ask(&mut engine, &format!("{plain}, \"top_k\": {most}")).expect(most);
        assert!(found.items.len() >= 50, "{most}");
    }
    let tokens = ask(&mut engine, r#""tokens": [2, 8, 14]"#).expect("tokens");
    for same in [r#""tokens": ["2", 8.0, 14]"#, r#""tokens": [2, 8, 14], "history": []"#] {
        assert_eq!(ask(&mut engine, same).expect(same), tokens, "{same}");
    }
    let seeded = ask(&mut engine, &format!("{plain}, \"seed\": 7")).expect("a seed");
    let loose = ask(&mut engine, &format!("{plain}, \"seed\": \"7\"")).expect("a seed");
    assert_eq!(loose, seeded);
    // A tag that no item carries passes nothing; equal groups are answered twice.
    assert!(
        ask(&mut engine, &format!("{plain}, \"filter\": \"tag:x\"")).expect("x").items.is_empty()
    );
    let twice = ask(&mut engine, &format!("{plain}, \"groups\": [\"all\", \"all\"]")).expect("two");
    assert_eq!(twice.groups[0], twice.groups[1]);
}

#[test]
fn what_may_mean_something_else_is_an_error_that_says_so() {
    let (_, mut engine) = small();
    for (fields, code, word) in [
        (r#""history": ["x", null]"#, "unknown_item", "unknown_items"),
        (r#""history": null"#, "empty_input", "history"),
        (r#""history": "i4""#, "malformed_request", "expected a list"),
        (r#""history": [1.5]"#, "malformed_request", "item's name"),
        (r#""history": [true]"#, "malformed_request", "item's name"),
        (r#""history": ["i4"], "tokens": [2]"#, "invalid_field", "not several"),
        // A filter that is empty may be a template that went wrong: nothing may slip through it.
        (r#""history": ["i4"], "filter": """#, "invalid_field", "all"),
        (r#""history": ["i4"], "filter": "  ""#, "invalid_field", "leave the field out"),
        (r#""history": ["i4"], "groups": ["all", ""]"#, "invalid_field", "all"),
        (r#""history": ["i4"], "beams": 4097"#, "beam_width", "4096"),
        (r#""history": ["i4"], "beams": 1e18"#, "beam_width", "4096"),
        (r#""history": ["i4"], "beams": 0"#, "beam_width", "4096"),
        (r#""history": ["i4"], "top_k": 0"#, "top_k", "at least 1"),
        (r#""history": ["i4"], "top_k": 2.5"#, "malformed_request", "a whole number"),
        (r#""history": ["i4"], "top_k": "many""#, "malformed_request", "a whole number"),
        (r#""history": ["i4"], "seed": -1"#, "malformed_request", "seed"),
        (r#""history": ["i4"], "temperature": "NaN""#, "malformed_request", "a number"),
        (r#""history": ["i4"], "temperature": NaN"#, "malformed_request", "expected value"),
        (r#""history": ["i4"], "titles": 1"#, "malformed_request", "true or false"),
        (r#""history": ["i4"], "deadline_ms": 0"#, "deadline_exceeded", "0 ms"),
        (r#""history": ["i4"], "deadline_ms": -1"#, "invalid_field", "deadline_ms"),
        (r#""history": ["i4"], "metadata": {}"#, "malformed_request", "unknown field"),
        (r#""history": ["i4"], "unknown_items": "ignore""#, "malformed_request", "skip"),
        (r#""history": ["i4"], "history": ["i4"]"#, "malformed_request", "duplicate"),
        (r#""tokens": [2, null]"#, "malformed_request", "a whole number"),
        (r#""tokens": [2, 20]"#, "token_out_of_range", "20 tokens"),
    ] {
        let error = ask(&mut engine, fields).expect_err(fields);
        assert_eq!(error.code(), code, "{fields}: {error}");
        assert!(error.to_string().contains(word), "{fields}: {error}");
    }
}
