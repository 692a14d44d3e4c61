//! Items that share a semantic ID come by weight, then by name, and a change that comes twice
//! changes nothing: so answers depend on what the catalog holds and not on how it came to.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::tiny::{Tiny, random_change, random_item};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Change, Item, ItemWeight, Snapshot, change_log};
use sidereal::{
    CatalogWriter, Constraint, Engine, Error, ErrorKind, Request, SharedSid, WriterOptions,
};

fn sid(codes: &[u16]) -> Sid {
    Sid::new(codes).expect("one to eight codes")
}

fn weight(weight: f32) -> ItemWeight {
    ItemWeight::new(weight).expect("finite")
}

fn built(items: impl IntoIterator<Item = Item>) -> Arc<Catalog> {
    let mut builder = CatalogBuilder::default();
    items.into_iter().for_each(|item| builder.add(item).expect("levels agree"));
    Arc::new(builder.build().expect("names are unique"))
}

/// A catalog of the items of a snapshot, as somebody builds it who knows nothing of its past.
fn rebuilt(snapshot: &Snapshot, rng: &mut fastrand::Rng) -> Arc<Catalog> {
    let mut items: Vec<Item> = snapshot.all_items().map(|item| snapshot.item(item)).collect();
    rng.shuffle(&mut items);
    built(items)
}

fn writer_of(catalog: &Arc<Catalog>) -> CatalogWriter {
    let options = WriterOptions::default().with_compact_at(usize::MAX);
    CatalogWriter::in_memory(Arc::clone(catalog), &options).expect("a thread")
}

/// The names of the items of one semantic ID, in the catalog's order.
fn names(snapshot: &Snapshot, codes: &[u16]) -> Vec<String> {
    let leaf = snapshot.cursor(codes).expect("its items are there");
    let present: Vec<u32> = snapshot.all_items().collect();
    let items = snapshot.items(leaf, codes.len()).filter(|item| present.contains(item));
    items.map(|item| snapshot.name(item).to_string()).collect()
}

/// A feed with at-least-once delivery: from time to time it goes back and delivers again from
/// there.
fn with_repeats(changes: &[Change], rng: &mut fastrand::Rng) -> Vec<Change> {
    let mut delivered = Vec::new();
    let mut at = 0;
    while at < changes.len() {
        delivered.push(changes[at].clone());
        at = if rng.u8(0..10) == 0 { at - rng.usize(0..=at.min(12)) } else { at + 1 };
    }
    delivered
}

/// Applies changes in batches of random sizes, with compactions between them.
fn feed(catalog: &Arc<Catalog>, changes: &[Change], rng: &mut fastrand::Rng) {
    let writer = writer_of(catalog);
    let mut rest = changes;
    while !rest.is_empty() {
        let (batch, later) = rest.split_at(rng.usize(1..=rest.len().min(9)));
        writer.apply(batch).expect("sound changes");
        if rng.u8(0..6) == 0 {
            writer.compact().expect("room in memory");
        }
        rest = later;
    }
}

/// The items of an answer as bytes, scores to the last bit.
fn items(engine: &mut Engine, request: &Request) -> String {
    let answer = engine.recommend(request).expect("a sound request");
    serde_json::to_string(&answer.items).expect("items have a JSON form")
}

#[test]
fn answers_depend_on_what_the_catalog_holds_and_not_on_how_it_came_to() {
    for seed in 0..120 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed ^ 0x0dde);
        let levels = tiny.num_levels();
        // Few codes: most items share their semantic ID with others.
        let num_codes = tiny.num_codes.min(2);
        let first: Vec<Item> = (0..rng.usize(1..30))
            .map(|n| random_item(&mut rng, &n.to_string(), levels, num_codes))
            .collect();
        let change = |_| random_change(&mut rng, 40, levels, num_codes);
        let mut changes: Vec<Change> = (0..90).map(change).collect();
        // A history needs an item that is there.
        changes.push(Change::Put(random_item(&mut rng, "0", levels, num_codes)));
        let catalogs = [(); 3].map(|()| built(first.clone()));
        feed(&catalogs[0], &changes, &mut rng);
        for replica in &catalogs[1..] {
            feed(replica, &with_repeats(&changes, &mut rng), &mut rng);
        }
        let snapshot = catalogs[0].snapshot();
        let fresh = rebuilt(&snapshot, &mut rng);
        let mut expected_engine = tiny.open_with(Arc::clone(&fresh), 1);
        let mut engines = catalogs.each_ref().map(|it| tiny.open_with(Arc::clone(it), 1));
        let all: Vec<String> =
            snapshot.all_items().map(|item| snapshot.name(item).to_string()).collect();
        let some = |rng: &mut fastrand::Rng| -> Vec<String> {
            all.iter().filter(|_| rng.u8(0..3) == 0).cloned().collect()
        };
        for case in 0..12 {
            let mut request = Request::from_history(["0"]);
            (request.beams, request.top_k) = (rng.usize(1..20), rng.usize(1..60));
            request.titles = true;
            match case % 4 {
                0 => request.candidates = some(&mut rng),
                1 => request.exclude = some(&mut rng),
                2 => request.filter = Some("tag:a | !tag:b".into()),
                _ => request.constraint = Constraint::Level,
            }
            request.per_sid = rng.bool().then(|| rng.usize(1..4));
            let expected = items(&mut expected_engine, &request);
            for (replica, engine) in engines.iter_mut().enumerate() {
                let found = items(engine, &request);
                assert_eq!(found, expected, "seed {seed}, replica {replica}: {request:?}");
            }
        }
    }
}

#[test]
fn one_set_of_items_compiles_into_one_file_whatever_happened_before() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bytes = |catalog: &Catalog| {
        let path = folder.path().join("c");
        catalog.save(&path).expect("a writable folder");
        std::fs::read(path).expect("just written")
    };
    for seed in 0..30 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut item = |n: usize| random_item(&mut rng, &n.to_string(), 2, 3);
        let first: Vec<Item> = (0..20).map(&mut item).collect();
        let catalog = built(first);
        let changes: Vec<Change> = (0..40).map(|_| random_change(&mut rng, 25, 2, 3)).collect();
        feed(&catalog, &changes, &mut rng);
        let snapshot = catalog.snapshot();
        let (one, other) = (rebuilt(&snapshot, &mut rng), rebuilt(&snapshot, &mut rng));
        assert!(bytes(&one) == bytes(&other), "seed {seed}");
        // A changed catalog is the same but for its past, which the head has.
        let (one, changed) = (bytes(&one), bytes(&catalog));
        let head = |bytes: &[u8]| (96 + 32 * usize::from(bytes[88]) + 8).next_multiple_of(64);
        assert!(one[head(&one)..] == changed[head(&changed)..], "seed {seed}");
    }
}

#[test]
fn a_larger_weight_comes_first_then_the_name_in_the_order_of_its_bytes() {
    let item = |name: &str, of: f32| {
        let mut item = Item::new(name, sid(&[1, 2]));
        item.weight = weight(of);
        item
    };
    let start = [item("b", 0.0), item("é", 0.0), item("B", 0.0), item("last", -1.0)];
    let catalog = built(start);
    assert_eq!(names(&catalog.snapshot(), &[1, 2]), ["B", "b", "é", "last"]);
    let writer = writer_of(&catalog);
    let cases: [(Change, &[&str]); 6] = [
        (Change::Put(item("aa", 0.0)), &["B", "aa", "b", "é", "last"]),
        (Change::Put(item("z", 3.0)), &["z", "B", "aa", "b", "é", "last"]),
        // Tags and availability have no part in the order.
        (
            Change::Tag { item: "B".into(), add: vec!["new".into()], remove: vec![] },
            &["z", "B", "aa", "b", "é", "last"],
        ),
        (
            Change::Availability { item: "aa".into(), available: false },
            &["z", "B", "aa", "b", "é", "last"],
        ),
        (
            Change::Weight { item: "last".into(), weight: weight(f32::MAX) },
            &["last", "z", "B", "aa", "b", "é"],
        ),
        (
            Change::Weight { item: "z".into(), weight: weight(-0.0) },
            &["last", "B", "aa", "b", "z", "é"],
        ),
    ];
    for compacts in [false, true] {
        for (change, expected) in &cases {
            writer.apply(std::slice::from_ref(change)).expect("a sound change");
            if compacts {
                writer.compact().expect("room in memory");
            }
            if !compacts {
                assert_eq!(names(&catalog.snapshot(), &[1, 2]), *expected, "{change:?}");
            }
        }
        let snapshot = catalog.snapshot();
        assert_eq!(names(&snapshot, &[1, 2]), cases[5].1);
        let last = snapshot.find("last").expect("it is there");
        assert_eq!(snapshot.weight(last), weight(f32::MAX));
        assert!(!snapshot.is_available(snapshot.find("aa").expect("it is there")));
    }
}

/// Changes that leave an item of a snapshot as it is.
fn repeats(snapshot: &Snapshot, item: u32) -> Vec<Change> {
    let name = || snapshot.name(item).to_string();
    let mut put = snapshot.item(item);
    // A feed may name tags in any order, and more than once.
    put.tags.reverse();
    put.tags.extend(put.tags.first().cloned());
    vec![
        Change::Put(put),
        Change::Availability { item: name(), available: snapshot.is_available(item) },
        Change::Tag { item: name(), add: snapshot.tags(item), remove: vec!["never".into()] },
        Change::Tag { item: name(), add: vec![], remove: vec![] },
        Change::Weight { item: name(), weight: snapshot.weight(item) },
        Change::Delete { item: "unheard of".into() },
        Change::Weight { item: "unheard of".into(), weight: weight(1.0) },
    ]
}

#[test]
fn a_change_that_says_what_already_is_changes_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for seed in 0..20 {
        let path = folder.path().join(format!("c{seed}"));
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut item = |n: usize| random_item(&mut rng, &n.to_string(), 2, 3);
        built((0..20).map(&mut item)).save(&path).expect("a writable folder");
        let options = WriterOptions::default().with_compact_at(usize::MAX);
        let writer = CatalogWriter::open(&path, &options).expect("a sound catalog");
        let changes: Vec<Change> = (0..30).map(|_| random_change(&mut rng, 25, 2, 3)).collect();
        writer.apply(&changes).expect("sound changes");
        let before = writer.catalog().snapshot();
        let state = |writer: &CatalogWriter| {
            let snapshot = writer.catalog().snapshot();
            let sizes = (snapshot.num_put(), snapshot.num_deleted(), snapshot.num_items());
            (snapshot.number(), sizes, writer.log_bytes(), writer.num_compactions())
        };
        let expected = state(&writer);
        let mut all = Vec::new();
        for item in before.all_items() {
            for change in repeats(&before, item) {
                let number = writer.apply(std::slice::from_ref(&change)).expect("a sound change");
                assert_eq!((number, state(&writer)), (expected.0, expected), "{seed}: {change:?}");
                all.push(change);
            }
        }
        rng.shuffle(&mut all);
        assert_eq!(writer.apply(&all).expect("sound changes"), expected.0);
        assert_eq!(state(&writer), expected, "seed {seed}, all at once");
        // Twice in one batch is as good as once, and a batch is repeated as one.
        let put = Change::Put(random_item(&mut rng, "new", 2, 3));
        let twice = [put.clone(), put];
        let number = writer.apply(&twice).expect("sound changes");
        assert_eq!(number, expected.0 + 1);
        assert_eq!(writer.catalog().snapshot().num_put(), expected.1.0 + 1, "seed {seed}");
        assert_eq!(writer.apply(&twice).expect("sound changes"), number);
        // What differs in one thing is a change.
        let known = writer.catalog().snapshot();
        let item = known.item(known.find("new").expect("just put"));
        let mut others = [(); 5].map(|()| item.clone());
        others[0].title += "!";
        others[1].tags.push("another".into());
        others[2].available = !item.available;
        others[3].weight = weight(100.0);
        others[4].sid = sid(&[item.sid.codes()[0], 3]);
        for (index, other) in others.into_iter().enumerate() {
            let number = writer.catalog().snapshot().number();
            let applied = writer.apply(&[Change::Put(other)]).expect("a sound change");
            assert_eq!(applied, number + 1, "field {index}");
        }
    }
}

#[test]
fn weights_survive_the_log_a_compaction_and_a_file_and_cost_nothing_where_there_are_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("c");
    let item = |n: u16| Item::new(format!("item {n}"), sid(&[n / 8, 1]));
    let save = |catalog: &Catalog| {
        catalog.save(&path).expect("a writable folder");
        std::fs::metadata(&path).expect("just written").len()
    };
    let plain = save(&built((0..640).map(item)));
    let weighted = |n: u16| Item { weight: weight(f32::from(n % 3)), ..item(n) };
    let with_weights = save(&built((0..640).map(weighted)));
    // Four bytes an item and an entry of the table of sections.
    let added = with_weights - plain;
    assert!((2560..=2560 + 64).contains(&added), "{added} bytes for 640 weights");
    let options = WriterOptions::default();
    let change = |of: f32| Change::Weight { item: "item 3".into(), weight: weight(of) };
    let writer = CatalogWriter::open(&path, &options).expect("a sound catalog");
    writer.apply(&[change(-2.5), Change::Put(weighted(5))]).expect("sound changes");
    let mut put = weighted(6);
    put.weight = weight(1e-30);
    writer.apply(&[Change::Put(put)]).expect("a sound change");
    drop(writer);
    let check = |what: &str| {
        let snapshot = Catalog::open(&path).expect("a sound catalog").snapshot();
        for (name, expected) in [("item 3", -2.5), ("item 4", 1.0), ("item 6", 1e-30)] {
            let item = snapshot.find(name).expect("it is there");
            assert_eq!(snapshot.weight(item).get(), expected, "{what}: {name}");
        }
        assert_eq!(names(&snapshot, &[0, 1])[0], "item 2", "{what}");
        assert_eq!(names(&snapshot, &[0, 1])[7], "item 3", "{what}");
    };
    check("logged");
    let writer = CatalogWriter::open(&path, &options).expect("a sound catalog");
    writer.compact().expect("a writable folder");
    check("compacted");
    // Once the last weight is gone, so is the room for them.
    let zero = |n: u16| Change::Weight { item: format!("item {n}"), weight: weight(0.0) };
    writer.apply(&(0..640).map(zero).collect::<Vec<_>>()).expect("sound changes");
    writer.compact().expect("a writable folder");
    assert_eq!(std::fs::metadata(&path).expect("compacted").len(), plain);
}

fn old_files(folder: &Path) -> PathBuf {
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    let path = folder.join("old");
    for ending in ["", ".changes"] {
        let from = files.join(format!("catalog-of-format-2{ending}"));
        std::fs::copy(from, folder.join(format!("old{ending}"))).expect("a writable folder");
    }
    path
}

#[test]
fn a_catalog_of_format_2_keeps_its_order_until_it_is_compacted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = old_files(folder.path());
    let log = change_log::path_of(&path);
    // As the version that wrote them answered.
    let compiled = ["zebra", "apple", "mango", "bench"];
    let logged = ["zebra", "apple", "bench", "yak", "ant", "mango"];
    let without_log = folder.path().join("without log");
    std::fs::copy(&path, &without_log).expect("a writable folder");
    let opened = Catalog::open(&without_log).expect("an old file").snapshot();
    assert_eq!(names(&opened, &[1, 2]), compiled);
    let snapshot = Catalog::open(&path).expect("old files").snapshot();
    assert_eq!(
        (names(&snapshot, &[1, 2]), snapshot.number()),
        (logged.map(String::from).into(), 2)
    );
    assert_eq!(snapshot.tags(snapshot.find("mango").expect("it is there")), ["fruit", "ripe"]);
    // Weights count at once, and repeats change nothing.
    let writer = CatalogWriter::open(&path, &WriterOptions::default()).expect("old files");
    for item in snapshot.all_items() {
        assert_eq!(writer.apply(&repeats(&snapshot, item)).expect("sound changes"), 2);
    }
    let heavy = Change::Weight { item: "bench".into(), weight: weight(1.0) };
    writer.apply(&[heavy]).expect("a sound change");
    let changed = ["bench", "zebra", "apple", "yak", "ant", "mango"];
    assert_eq!(names(&writer.catalog().snapshot(), &[1, 2]), changed);
    writer.compact().expect("a writable folder");
    drop(writer);
    let by_name = ["bench", "ant", "apple", "mango", "yak", "zebra"];
    std::fs::remove_file(&log).expect("the log is empty");
    let compacted = Catalog::open(&path).expect("a new file").snapshot();
    assert_eq!(names(&compacted, &[1, 2]), by_name);
    let tags = |snapshot: &Snapshot| {
        let mut tags: Vec<_> = snapshot
            .all_items()
            .map(|item| (snapshot.name(item).to_string(), snapshot.tags(item)))
            .collect();
        tags.sort();
        tags
    };
    assert_eq!(tags(&compacted), tags(&snapshot), "tags moved with their items");
    for filter in ["tag:new", "tag:fruit & !tag:ripe"] {
        let passing = |snapshot: &Snapshot| {
            let allowed = snapshot.allowed_set(&[], Some(filter)).expect("a sound filter");
            let items = snapshot.all_items().filter(|&item| allowed.allows(snapshot, item));
            let mut names: Vec<_> = items.map(|item| snapshot.name(item).to_string()).collect();
            names.sort();
            names
        };
        assert_eq!(passing(&compacted), passing(&snapshot), "{filter}");
    }
    // A copy that is saved is a file of today's format.
    let copy = folder.path().join("copy");
    Catalog::open(&without_log).expect("an old file").save(&copy).expect("a writable folder");
    let copy = Catalog::open(&copy).expect("a new file").snapshot();
    assert_eq!(names(&copy, &[1, 2]), ["apple", "bench", "mango", "zebra"]);
}

#[test]
fn a_limit_per_sid_is_exact_with_every_other_wish() {
    let mut num_cut = 0;
    for seed in 0..150 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let snapshot = tiny.snapshot();
        let mut engine = tiny.open(1);
        let all: Vec<String> =
            snapshot.all_items().map(|item| snapshot.name(item).to_string()).collect();
        for _ in 0..8 {
            let mut request = Request::from_history(["0"]);
            request.beams = rng.usize(1..40);
            request.top_k = usize::MAX;
            request.exclude = all.iter().filter(|_| rng.u8(0..4) == 0).cloned().collect();
            request.filter = rng.bool().then(|| "!tag:a | tag:b".to_string());
            request.constraint =
                [Constraint::Trie, Constraint::Level, Constraint::None][rng.usize(0..3)];
            let whole = engine.recommend(&request).expect("a sound request").items;
            (request.per_sid, request.top_k) = (Some(rng.usize(1..4)), rng.usize(1..20));
            let is_first = rng.u8(0..4) == 0;
            request.shared_sid = if is_first { SharedSid::First } else { SharedSid::All };
            let most = request.per_sid.filter(|_| !is_first).unwrap_or(1);
            let mut expected = Vec::new();
            for item in &whole {
                let same = whole.iter().take_while(|other| *other != item);
                if same.filter(|other| other.sid == item.sid).count() < most {
                    expected.push(item.clone());
                }
            }
            num_cut += usize::from(expected.len() < whole.len());
            expected.truncate(request.top_k);
            let found = engine.recommend(&request).expect("a sound request").items;
            assert_eq!(found, expected, "seed {seed}: {request:?}");
        }
        // Candidates are all listed.
        let mut request = Request::from_history(["0"]).with_candidates(all);
        let whole = engine.recommend(&request).expect("a sound request");
        request.per_sid = Some(1);
        assert_eq!(engine.recommend(&request).expect("a sound request"), whole, "seed {seed}");
        request.per_sid = Some(0);
        let error = engine.recommend(&request).expect_err("none could come back");
        assert_eq!(error.code(), "invalid_field");
        assert!(error.to_string().contains("per_sid: 0 is not at least 1"), "{error}");
    }
    assert!(num_cut > 200, "only {num_cut} answers were cut");
}

#[test]
fn a_request_for_a_later_snapshot_is_refused_with_both_numbers_until_it_is_there() {
    let tiny = Tiny::new(1);
    let mut engine = tiny.open(1);
    let now = tiny.snapshot().number();
    let mut request = Request::from_history(["0"]);
    for accepted in [0, 1, now] {
        request.min_snapshot = Some(accepted);
        let answer = engine.recommend(&request).expect("a state that is there");
        assert_eq!(answer.snapshot.number(), now);
    }
    // Not even the item is known yet: what is behind is the catalog.
    let mut request = Request::from_history(["new"]).with_min_snapshot(now + 1);
    let error = engine.recommend(&request).expect_err("the catalog is behind");
    let behind = Error::CatalogBehind { snapshot: now, min_snapshot: now + 1 };
    assert_eq!(error.to_string(), behind.to_string());
    assert_eq!((error.kind(), error.code()), (ErrorKind::Overloaded, "catalog_behind"));
    for number in [now, now + 1] {
        assert!(error.to_string().contains(&number.to_string()), "{error}");
    }
    let put = Change::Put(Item::new("new", sid(&vec![0; tiny.num_levels()])));
    let number = writer_of(&tiny.catalog).apply(&[put]).expect("a sound change");
    request.min_snapshot = Some(number);
    let answer = engine.recommend(&request).expect("the catalog has caught up");
    assert_eq!(answer.snapshot.number(), number);
    let json = serde_json::to_value(&answer).expect("answers have a JSON form");
    assert_eq!(json["snapshot"], number);
}
