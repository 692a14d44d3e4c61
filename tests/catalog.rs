//! A catalog that changes equals one that was built as it is now, whatever happened in between.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::tiny::{TAGS, Tiny, random_change, random_item};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Change, Item, Snapshot, change_log};
use sidereal::quantizer::{Collision, FitOptions, Quantizer};
use sidereal::{CatalogWriter, Constraint, Durability, Error, Request, WriterOptions};

fn built(items: &[Item]) -> Catalog {
    let mut builder = CatalogBuilder::default();
    items.iter().for_each(|item| builder.add(item.clone()).expect("levels agree"));
    builder.build().expect("names are unique")
}

/// What the changes mean, done to a plain list, whose order says nothing.
fn apply(items: &mut Vec<Item>, change: &Change) {
    let find = |items: &[Item], name: &str| items.iter().position(|item| item.name == name);
    match change {
        Change::Put(item) => {
            items.retain(|other| other.name != item.name);
            items.push(item.clone());
        }
        Change::Delete { item } => items.retain(|other| other.name != *item),
        Change::Availability { item, available } => {
            if let Some(at) = find(items, item) {
                items[at].available = *available;
            }
        }
        Change::Tag { item, add, remove } => {
            if let Some(at) = find(items, item) {
                let mut tags: BTreeSet<String> = items[at].tags.drain(..).collect();
                tags.retain(|tag| !remove.contains(tag));
                tags.extend(add.iter().cloned());
                items[at].tags = tags.into_iter().collect();
            }
        }
        &Change::Weight { ref item, weight } => {
            if let Some(at) = find(items, item) {
                items[at].weight = weight;
            }
        }
    }
}

fn assert_holds(snapshot: &Snapshot, items: &[Item], what: &str) {
    assert_eq!(snapshot.num_items(), items.len(), "{what}");
    assert_eq!(snapshot.all_items().count(), items.len(), "{what}");
    for item in items {
        let found = snapshot.find(&item.name);
        let found = found.unwrap_or_else(|| panic!("{what}: {:?} is missing", item.name));
        assert_eq!(snapshot.item(found), *item, "{what}");
    }
}

fn writer_of(catalog: &Arc<Catalog>, compact_at: Option<usize>) -> CatalogWriter {
    let mut options = WriterOptions::default();
    options.compact_at = compact_at;
    CatalogWriter::in_memory(Arc::clone(catalog), &options).expect("a thread")
}

#[test]
fn any_interleaving_of_changes_and_searches_equals_a_fresh_catalog() {
    let mut compactions = 0;
    for seed in 0..150 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed ^ 0xca7);
        let levels = tiny.snapshot().num_levels();
        let mut items: Vec<Item> = (0..rng.usize(1..20))
            .map(|n| random_item(&mut rng, &n.to_string(), levels, tiny.num_codes))
            .collect();
        let catalog = Arc::new(built(&items));
        let mut engine = tiny.open_with(Arc::clone(&catalog), 1);
        let writer = writer_of(&catalog, [None, Some(6), Some(usize::MAX)][rng.usize(0..3)]);
        for batch in 0..12 {
            let what = format!("seed {seed}, batch {batch}");
            let change = |_| random_change(&mut rng, 25, levels, tiny.num_codes);
            let changes: Vec<Change> = (0..10).map(change).collect();
            let number = writer.apply(&changes).expect("sound changes");
            changes.iter().for_each(|change| apply(&mut items, change));
            if rng.u8(0..5) == 0 {
                writer.compact().expect("room in memory");
            }
            let snapshot = catalog.snapshot();
            assert_eq!(snapshot.number(), number, "{what}");
            assert_holds(&snapshot, &items, &what);
            let Some(known) = items.first() else { continue };
            let mut fresh = tiny.open_with(Arc::new(built(&items)), 1);
            for _ in 0..4 {
                let mut request = Request::from_history([known.name.clone()]);
                request.beams = rng.usize(1..30);
                request.top_k = usize::MAX;
                request.exclude = (0..rng.usize(0..5)).map(|_| rng.u8(0..25).to_string()).collect();
                if rng.u8(0..3) == 0 {
                    let names = (0..25).filter(|_| rng.bool());
                    request.only = Some(names.map(|name: u8| name.to_string()).collect());
                }
                if rng.u8(0..4) == 0 {
                    request.constraint = Constraint::Occurring;
                }
                let filters = ["tag:a", "tag:b | !tag:c", "tag:nobody"];
                request.filter = filters.get(rng.usize(0..6)).map(|filter| filter.to_string());
                let found = |engine: &mut sidereal::Engine| {
                    let answer = engine.recommend(&request).expect("a sound request");
                    let items = answer.items.iter();
                    items.map(|found| (found.item.clone(), found.sid, found.score)).collect()
                };
                let (now, expected): (Vec<_>, Vec<_>) = (found(&mut engine), found(&mut fresh));
                assert_eq!(now, expected, "{what} {request:?}");
            }
        }
        compactions += writer.num_compactions();
    }
    assert!(compactions > 150, "only {compactions} compilations came in between");
}

type Passes = Box<dyn Fn(&[String]) -> bool>;

/// A random filter as text, and whether it passes an item with some tags.
fn random_filter(rng: &mut fastrand::Rng, depth: usize) -> (String, Passes) {
    match rng.u8(0..if depth == 0 { 3 } else { 8 }) {
        0 => ("all".into(), Box::new(|_| true)),
        1 | 2 => {
            let tag = [&TAGS[..], &["nobody", "two words \"quoted\""]].concat()[rng.usize(0..5)];
            let quoted = format!("tag:\"{}\"", tag.replace('"', "\\\""));
            let text = if tag.contains(' ') { quoted } else { format!("tag:{tag}") };
            (text, Box::new(move |tags| tags.iter().any(|other| other == tag)))
        }
        3 | 4 => {
            let (text, passes) = random_filter(rng, depth - 1);
            let not = ["!", "not "][rng.usize(0..2)];
            (format!("{not}({text})"), Box::new(move |tags| !passes(tags)))
        }
        _ => {
            let (a, b) = (random_filter(rng, depth - 1), random_filter(rng, depth - 1));
            let (is_and, is_word) = (rng.bool(), rng.bool());
            let sign = [["|", "or"], ["&", "and"]][usize::from(is_and)][usize::from(is_word)];
            let text = format!("({}) {sign} ({})", a.0, b.0);
            let passes = move |tags: &[String]| match is_and {
                true => a.1(tags) && b.1(tags),
                false => a.1(tags) || b.1(tags),
            };
            (text, Box::new(passes))
        }
    }
}

#[test]
fn filters_agree_with_brute_force_at_every_place() {
    for seed in 0..400 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let catalog = common::tiny::random_catalog(&mut rng, 1 + seed as usize % 4, 5);
        let catalog = Arc::new(catalog);
        let change = |item: usize| Change::Tag {
            item: item.to_string(),
            add: vec!["two words \"quoted\"".into()],
            remove: Vec::new(),
        };
        let changes: Vec<Change> = (0..25).step_by(4).map(change).collect();
        writer_of(&catalog, None).apply(&changes).expect("sound changes");
        let snapshot = catalog.snapshot();
        for _ in 0..10 {
            let (text, passes) = random_filter(&mut rng, 4);
            let mut excluded: Vec<u32> =
                snapshot.all_items().filter(|_| rng.u8(0..4) == 0).collect();
            excluded.sort_unstable();
            let mut allowed_set =
                snapshot.allowed_set(&excluded, Some(&text)).expect("a sound filter");
            let mut only: Vec<u32> = snapshot.all_items().collect();
            if rng.bool() {
                only.retain(|_| rng.bool());
                only.sort_unstable();
                allowed_set = allowed_set.restricted_to(&snapshot, &only);
            }
            let is_allowed = |item: u32| {
                snapshot.is_available(item)
                    && only.contains(&item)
                    && !excluded.contains(&item)
                    && passes(&snapshot.tags(item))
            };
            let known: BTreeSet<u32> = snapshot.all_items().collect();
            let mut places = vec![snapshot.root()];
            for depth in 0..snapshot.num_levels() {
                let mut next = Vec::new();
                for &place in &places {
                    let mut below = allowed_set.below(&snapshot, place, depth);
                    for run in snapshot.children(place) {
                        for at in 0..run.labels.len() {
                            let child = run.child(at);
                            let mut items = snapshot.items(child, depth + 1);
                            let expected =
                                items.any(|item| known.contains(&item) && is_allowed(item));
                            let what = format!("seed {seed}: {text} at depth {depth}");
                            assert_eq!(below.is_match(child), expected, "{what}");
                            let possible = below.can_match(&run, at) & 1 == 1;
                            assert!(possible || !expected, "{what}");
                            next.push(child);
                        }
                    }
                }
                places = next;
            }
            for item in known {
                assert_eq!(
                    allowed_set.allows(&snapshot, item),
                    is_allowed(item),
                    "seed {seed}: {text}"
                );
            }
        }
    }
}

#[test]
fn large_catalogs_agree_with_brute_force_as_well() {
    // Stretches of items over many words of the bitmaps, and filters that pass almost nothing.
    let mut rng = fastrand::Rng::with_seed(3);
    let mut items: Vec<Item> = (0..20_000)
        .map(|n: usize| {
            let sid = Sid::new(&[rng.u16(0..3), rng.u16(0..40), rng.u16(0..60)]).expect("three");
            let mut item = Item::new(n.to_string(), sid);
            item.tags.extend((n.is_multiple_of(2)).then(|| "half".to_string()));
            item.tags.extend((n % 1999 == 7).then(|| "rare".to_string()));
            item.tags.extend((sid.codes()[0] == 1).then(|| "first is one".to_string()));
            item.tags.sort_unstable();
            item
        })
        .collect();
    let catalog = Arc::new(built(&items));
    let writer = writer_of(&catalog, Some(usize::MAX));
    let withdraw = |n: usize| Change::Availability { item: n.to_string(), available: false };
    let changes: Vec<Change> = (0..20_000).filter(|n| n % 11 < 3).map(withdraw).collect();
    writer.apply(&changes).expect("sound changes");
    changes.iter().for_each(|change| apply(&mut items, change));
    let snapshot = catalog.snapshot();
    let filters = ["tag:half", "tag:rare", "!tag:half & tag:rare", "tag:\"first is one\"", "all"];
    for filter in filters.into_iter().map(Some).chain([None]) {
        for (excluded, only) in
            [(0, None), (50, None), (4096, None), (0, Some(3000)), (4096, Some(40)), (50, Some(0))]
        {
            let excluded: BTreeSet<u32> = (0..excluded).map(|_| rng.u32(0..20_000)).collect();
            let list: Vec<u32> = excluded.iter().copied().collect();
            let mut allowed_set = snapshot.allowed_set(&list, filter).expect("a sound filter");
            let only = only
                .map(|count| -> BTreeSet<u32> { (0..count).map(|_| rng.u32(0..20_000)).collect() });
            if let Some(only) = &only {
                let list: Vec<u32> = only.iter().copied().collect();
                allowed_set = allowed_set.restricted_to(&snapshot, &list);
            }
            let tag = |item: u32, tag: &str| snapshot.tags(item).iter().any(|other| other == tag);
            let passes: Vec<bool> = (0..20_000)
                .map(|item| {
                    let by_filter = match filter {
                        Some("tag:half") => tag(item, "half"),
                        Some("tag:rare") => tag(item, "rare"),
                        Some("!tag:half & tag:rare") => !tag(item, "half") && tag(item, "rare"),
                        Some("tag:\"first is one\"") => snapshot.sid(item).codes()[0] == 1,
                        _ => true,
                    };
                    let is_listed = only.as_ref().is_none_or(|only| only.contains(&item));
                    by_filter
                        && is_listed
                        && snapshot.is_available(item)
                        && !excluded.contains(&item)
                })
                .collect();
            let mut places = vec![snapshot.root()];
            for depth in 0..3 {
                let mut next = Vec::new();
                for &place in &places {
                    let mut below = allowed_set.below(&snapshot, place, depth);
                    for run in snapshot.children(place) {
                        for at in 0..run.labels.len() {
                            let mut items = snapshot.items(run.child(at), depth + 1);
                            let expected = items.any(|item| passes[item as usize]);
                            let found =
                                below.can_match(&run, at) & 1 == 1 && below.is_match(run.child(at));
                            assert_eq!(found, expected, "{filter:?} at depth {depth}");
                            next.push(run.child(at));
                        }
                    }
                }
                places = next;
            }
        }
    }
}

#[test]
fn readers_see_whole_batches_and_keep_what_they_began_with() {
    // Items come and go in pairs, so a snapshot with half of a pair was torn.
    let item = |name: String, code: u16| Item::new(name, Sid::new(&[code, code % 7]).expect("two"));
    let start = [item("a0".into(), 0), item("b0".into(), 1)];
    let catalog = Arc::new(built(&start));
    let writer = writer_of(&catalog, Some(40));
    let (done, looks) = (AtomicBool::new(false), AtomicU64::new(0));
    // On a busy machine readers and compilations come to nothing for a while.
    let has_seen_enough = || looks.load(Ordering::Relaxed) > 100 && writer.num_compactions() > 3;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut last = 0;
                while !done.load(Ordering::Relaxed) {
                    let snapshot = catalog.snapshot();
                    assert!(snapshot.number() >= last, "time goes forward");
                    last = snapshot.number();
                    let names = snapshot.all_items().map(|item| snapshot.name(item).to_string());
                    let names: BTreeSet<String> = names.collect();
                    for name in &names {
                        let twin = name.replace('a', "x").replace('b', "a").replace('x', "b");
                        assert!(names.contains(&twin), "{name} without its twin");
                    }
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut rng = fastrand::Rng::with_seed(1);
        for batch in 0..1_000_000 {
            if batch >= 3000 && has_seen_enough() {
                break;
            }
            let n = rng.u16(0..60);
            let names = ["a", "b"].map(|letter| format!("{letter}{n}"));
            let put = |name: &String| Change::Put(item(name.clone(), rng.u16(0..30)));
            let delete = |name: &String| Change::Delete { item: name.clone() };
            let changes = if n.is_multiple_of(2) {
                names.each_ref().map(put)
            } else {
                names.each_ref().map(delete)
            };
            writer.apply(&changes).expect("sound changes");
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(has_seen_enough(), "{} compilations", writer.num_compactions());
}

#[test]
fn a_batch_with_a_bad_change_changes_nothing() {
    let tiny = Tiny::new(5);
    let mut engine = tiny.open(1);
    let writer = writer_of(&tiny.catalog, None);
    let levels = tiny.snapshot().num_levels();
    let before = tiny.snapshot();
    let good = || Change::Put(Item::new("new", Sid::new(&vec![0; levels]).expect("few")));
    let named = |name: &str, codes: &[u16]| {
        Change::Put(Item::new(name, Sid::new(codes).expect("one to eight")))
    };
    for (bad, words) in [
        (named("", &vec![0; levels]), "the name is empty"),
        (named("x", &vec![0; levels + 1]), "levels"),
        (named("x", &vec![tiny.num_codes; levels]), "no token"),
    ] {
        match writer.apply(&[good(), bad, good()]) {
            Err(error @ Error::InvalidChange { index: 1, .. }) => {
                assert!(error.to_string().contains(words), "{error}");
            }
            other => panic!("{words}: {other:?}"),
        }
        assert_eq!(tiny.snapshot().number(), before.number());
        assert_eq!(tiny.snapshot().find("new"), None);
    }
    writer.apply(&[good()]).expect("a sound change");
    assert!(engine.recommend(&Request::from_history(["new"])).is_ok());
    assert_eq!(writer.apply(&[]).expect("nothing to do"), tiny.snapshot().number());
    let unknown = Change::Delete { item: "unheard of".into() };
    assert!(tiny.snapshot().is_without_effect(&unknown));
    writer.apply(&[unknown]).expect("deleting twice is no mistake");
}

// On disk.

struct OnDisk {
    folder: tempfile::TempDir,
    items: Vec<Item>,
}

impl OnDisk {
    fn new(seed: u64) -> OnDisk {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut rng = fastrand::Rng::with_seed(seed);
        let items: Vec<Item> =
            (0..12).map(|n| random_item(&mut rng, &n.to_string(), 3, 5)).collect();
        let on_disk = OnDisk { folder, items };
        built(&on_disk.items).save(&on_disk.path()).expect("a writable folder");
        on_disk
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("c.sidereal")
    }

    fn writer(&self) -> CatalogWriter {
        let options = WriterOptions::default().with_compact_at(usize::MAX);
        CatalogWriter::open(&self.path(), &options).expect("a sound catalog")
    }

    /// Applies batches; returns the items, and the log's length, after none, one, two and so on.
    fn change(&mut self, rng: &mut fastrand::Rng, batches: usize) -> Vec<(Vec<Item>, u64)> {
        let writer = self.writer();
        let mut states = vec![(self.items.clone(), writer.log_bytes())];
        for _ in 0..batches {
            // A batch that changes nothing leaves no record.
            let before = writer.catalog().snapshot().number();
            while writer.catalog().snapshot().number() == before {
                let changes: Vec<Change> =
                    (0..rng.usize(1..4)).map(|_| random_change(rng, 20, 3, 5)).collect();
                writer.apply(&changes).expect("sound changes");
                changes.iter().for_each(|change| apply(&mut self.items, change));
            }
            states.push((self.items.clone(), writer.log_bytes()));
        }
        states
    }
}

#[test]
fn a_compilation_may_die_between_the_new_file_and_the_new_log() {
    let mut rng = fastrand::Rng::with_seed(6);
    let mut on_disk = OnDisk::new(6);
    on_disk.change(&mut rng, 6);
    let log = change_log::path_of(&on_disk.path());
    let (old_file, old_log) =
        (std::fs::read(on_disk.path()).expect("a file"), std::fs::read(&log).expect("a log"));
    let writer = on_disk.writer();
    let before = writer.log_bytes();
    writer.compact().expect("a writable folder");
    assert!(writer.log_bytes() < before);
    let number = writer.catalog().snapshot().number();
    assert_holds(&writer.catalog().snapshot(), &on_disk.items, "compiled");
    drop(writer);
    // The new file with the old log: its records are in the file already.
    let new_log = std::fs::read(&log).expect("a log");
    std::fs::write(&log, &old_log).expect("a writable folder");
    let writer = on_disk.writer();
    assert_holds(&writer.catalog().snapshot(), &on_disk.items, "new file, old log");
    assert_eq!(writer.catalog().snapshot().number(), number);
    drop(writer);
    let states = on_disk.change(&mut rng, 3);
    assert_holds(&Catalog::open(&on_disk.path()).expect("sound").snapshot(), &states[3].0, "later");
    // The old file with the new log lacks what was dropped from it.
    std::fs::write(on_disk.path(), old_file).expect("a writable folder");
    std::fs::write(&log, new_log).expect("a writable folder");
    let stale = Catalog::open(&on_disk.path()).err().map(|error| error.to_string());
    assert!(stale.is_some_and(|text| text.contains("put the newer catalog back")));
    let stale = CatalogWriter::open(&on_disk.path(), &WriterOptions::default());
    assert!(stale.is_err());
}

#[test]
fn a_reader_opens_the_catalog_at_any_time() {
    // Between the new file and the new log a reader must find neither an error nor an old state.
    let on_disk = OnDisk::new(11);
    let writer = on_disk.writer();
    let (done, applied) = (AtomicBool::new(false), AtomicU64::new(1));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let least = applied.load(Ordering::SeqCst);
                let catalog = Catalog::open(&on_disk.path()).expect("a sound catalog");
                assert!(catalog.snapshot().number() >= least, "older than what was acknowledged");
            }
        });
        for n in 0..60 {
            let put = Change::Put(Item::new(format!("n{n}"), Sid::new(&[1, 1, 1]).expect("three")));
            applied.store(writer.apply(&[put]).expect("sound"), Ordering::SeqCst);
            if n % 3 == 0 {
                writer.compact().expect("a writable folder");
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_log_belongs_to_one_catalog_and_one_writer() {
    let mut rng = fastrand::Rng::with_seed(7);
    let (mut one, other) = (OnDisk::new(7), OnDisk::new(8));
    one.change(&mut rng, 2);
    let (log, other_log) = (change_log::path_of(&one.path()), change_log::path_of(&other.path()));
    std::fs::copy(&log, &other_log).expect("a writable folder");
    let foreign = Catalog::open(&other.path()).err().map(|error| error.to_string());
    assert!(foreign.is_some_and(|text| text.contains("another catalog")));
    let writer = one.writer();
    let second = CatalogWriter::open(&one.path(), &WriterOptions::default());
    assert!(second.is_err_and(|error| error.to_string().contains("another writer")));
    // Still so when the log was begun again.
    writer.compact().expect("a writable folder");
    let second = CatalogWriter::open(&one.path(), &WriterOptions::default());
    assert!(second.is_err_and(|error| error.to_string().contains("another writer")));
    assert!(Catalog::open(&one.path()).is_ok(), "readers need no lock");
    let items = CatalogWriter::open(Path::new("items.jsonl"), &WriterOptions::default());
    assert!(items.is_err_and(|error| error.to_string().contains("catalog build")));
}

#[test]
fn a_writer_that_is_closed_is_closed_whatever_processes_are_started_meanwhile() {
    let on_disk = OnDisk::new(12);
    std::thread::scope(|scope| {
        let processes = scope.spawn(|| {
            for _ in 0..100 {
                let mut command = Command::new(env!("CARGO_BIN_EXE_sidereal"));
                let status = command.arg("--version").stdout(Stdio::null()).status();
                assert!(status.expect("the command").success());
            }
        });
        while !processes.is_finished() {
            drop(on_disk.writer());
        }
    });
}

#[test]
fn a_compilation_that_fails_loses_nothing() {
    let mut on_disk = OnDisk::new(9);
    let options =
        WriterOptions::default().with_compact_at(usize::MAX).with_durability(Durability::Machine);
    let writer = CatalogWriter::open(&on_disk.path(), &options).expect("a sound catalog");
    // A folder where the new file is to be written.
    let partial = on_disk.folder.path().join("c.sidereal.partial");
    std::fs::create_dir(&partial).expect("a writable folder");
    let put = |name: &str| Change::Put(Item::new(name, Sid::new(&[1, 1, 1]).expect("three")));
    writer.apply(&[put("before")]).expect("a sound change");
    assert!(matches!(writer.compact(), Err(Error::Io { .. })));
    writer.apply(&[put("after")]).expect("a sound change");
    for name in ["before", "after"] {
        apply(&mut on_disk.items, &put(name));
    }
    assert_holds(&writer.catalog().snapshot(), &on_disk.items, "after the failure");
    std::fs::remove_dir(&partial).expect("an empty folder");
    writer.compact().expect("room again");
    assert_eq!(writer.num_compactions(), 1);
    drop(writer);
    let reopened = Catalog::open(&on_disk.path()).expect("a sound catalog");
    assert_holds(&reopened.snapshot(), &on_disk.items, "reopened");
}

#[test]
fn a_process_killed_at_any_instant_leaves_a_whole_number_of_batches() {
    let mut rng = fastrand::Rng::with_seed(10);
    let num_changes = 400_000;
    let on_disk = OnDisk::new(10);
    let lines: String = (0..num_changes)
        .map(|n| format!("{{\"put\": {{\"item\": \"n{n}\", \"sid\": [{}, 1, 1]}}}}\n", n % 60_000))
        .collect();
    let changes = on_disk.folder.path().join("changes.jsonl");
    std::fs::write(&changes, lines).expect("a writable folder");
    let (mut least, mut most) = (usize::MAX, 0);
    for _ in 0..6 {
        let _ = std::fs::remove_file(change_log::path_of(&on_disk.path()));
        let mut child = Command::new(env!("CARGO_BIN_EXE_sidereal"))
            .args(["catalog", "change"])
            .arg(on_disk.path())
            .arg("--changes")
            .arg(&changes)
            .stderr(Stdio::null())
            .spawn()
            .expect("the command");
        let log = change_log::path_of(&on_disk.path());
        while !log.exists() && child.try_wait().expect("a child").is_none() {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(rng.u64(0..150)));
        child.kill().expect("a child");
        child.wait().expect("a child");
        let reopened = on_disk.writer();
        let added = reopened.catalog().snapshot().num_items() - on_disk.items.len();
        let batches = reopened.catalog().snapshot().number() as usize - 1;
        assert!(added == batches * 10_000 || added == num_changes, "{added} in {batches}");
        for n in (0..added).step_by(997) {
            assert!(reopened.catalog().snapshot().find(&format!("n{n}")).is_some());
        }
        (least, most) = (least.min(added), most.max(added));
    }
    assert!(least < num_changes, "no process was killed in the middle: {least} to {most}");
}

// Tokenising.

/// The nearest entry at each level, in plain f64.
fn truth(codebooks: &[Vec<Vec<f32>>], embedding: &[f32]) -> Vec<u16> {
    let mut rest: Vec<f64> = embedding.iter().map(|&x| x.into()).collect();
    let mut codes = Vec::new();
    for codebook in codebooks {
        let distance = |entry: &Vec<f32>| -> f64 {
            entry.iter().zip(&rest).map(|(&e, x)| (f64::from(e) - x) * (f64::from(e) - x)).sum()
        };
        let distances: Vec<f64> = codebook.iter().map(distance).collect();
        let least = distances.iter().copied().fold(f64::INFINITY, f64::min);
        let code = distances.iter().position(|&d| d == least).expect("one of them");
        rest.iter_mut().zip(&codebook[code]).for_each(|(x, &e)| *x -= f64::from(e));
        codes.push(code as u16);
    }
    codes
}

fn random_rows(rng: &mut fastrand::Rng, rows: usize, dim: usize) -> Vec<Vec<f32>> {
    (0..rows).map(|_| (0..dim).map(|_| 2.0 * rng.f32() - 1.0).collect()).collect()
}

fn save_tensors(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    let views = tensors.iter().map(|(name, shape, values)| {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.clone(), view.expect("a consistent tensor"))
    });
    let bytes = safetensors::serialize(views, None).expect("plain tensors");
    std::fs::write(path, bytes).expect("a writable folder");
}

#[test]
fn codes_are_the_nearest_entries_in_every_layout_of_a_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("rq.safetensors");
    for seed in 0..20 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (levels, codes, dim) = (rng.usize(1..5), rng.usize(1..40), rng.usize(1..20));
        let codebooks: Vec<Vec<Vec<f32>>> =
            (0..levels).map(|_| random_rows(&mut rng, codes, dim)).collect();
        let one = |level: usize| codebooks[level].concat();
        let names = ["codebooks.{}", "codebook_{}", "rq.vq_layers.{}.embedding.weight"];
        let mut tensors: Vec<_> = match names.get(rng.usize(0..4)) {
            None => {
                vec![("codebooks".into(), vec![levels, codes, dim], codebooks.concat().concat())]
            }
            Some(name) => (0..levels)
                .map(|level| (name.replace("{}", &level.to_string()), vec![codes, dim], one(level)))
                .collect(),
        };
        // An encoder as LC-Rec has it, and its decoder, which nobody asks for.
        let hidden = rng.usize(1..9);
        let (first, second) =
            (random_rows(&mut rng, hidden, 6), random_rows(&mut rng, dim, hidden));
        let has_encoder = rng.bool();
        if has_encoder {
            let bias = |len: usize| vec![0.25; len];
            let layer = |n: usize, rows: &Vec<Vec<f32>>| {
                let shape = vec![rows.len(), rows[0].len()];
                [
                    (format!("encoder.mlp_layers.{n}.weight"), shape, rows.concat()),
                    (format!("encoder.mlp_layers.{n}.bias"), vec![rows.len()], bias(rows.len())),
                ]
            };
            tensors.extend(layer(1, &first));
            tensors.extend(layer(10, &second));
            tensors.push(("decoder.mlp_layers.1.weight".into(), vec![2, 2], vec![0.0; 4]));
        }
        save_tensors(&path, &tensors);
        let quantizer = Quantizer::open(&path).expect("sound codebooks");
        let dim_in = if has_encoder { 6 } else { dim };
        assert_eq!((quantizer.num_levels(), quantizer.dim()), (levels, dim_in));
        for embedding in random_rows(&mut rng, 20, dim_in) {
            let mut vector = embedding.clone();
            if has_encoder {
                for (rows, is_last) in [(&first, false), (&second, true)] {
                    let product = |row: &Vec<f32>| {
                        let products = row.iter().zip(&vector).map(|(w, x)| f64::from(w * x));
                        let sum = products.sum::<f64>() + 0.25;
                        if is_last { sum as f32 } else { sum.max(0.0) as f32 }
                    };
                    vector = rows.iter().map(product).collect();
                }
            }
            let expected = truth(&codebooks, &vector);
            assert_eq!(quantizer.codes(&embedding).expect("finite"), expected, "seed {seed}");
        }
    }
}

#[test]
fn fitted_codebooks_are_repeatable_and_each_level_leaves_less() {
    let mut rng = fastrand::Rng::with_seed(1);
    // Sixty clumps: what k-means is for.
    let clumps = random_rows(&mut rng, 60, 8);
    let embeddings: Vec<f32> = (0..3000)
        .flat_map(|n| clumps[n % 60].iter().map(|x| x + 0.05 * rng.f32()).collect::<Vec<_>>())
        .collect();
    let options = FitOptions { levels: 3, codes: 100, seed: 7, max_rounds: 40 };
    let mut errors = vec![Vec::new(); 3];
    let fitted = Quantizer::fit(&embeddings, 8, &options, |round| {
        errors[round.level].push(round.error);
    });
    let fitted = fitted.expect("sound embeddings");
    for level in &errors {
        assert!(level.windows(2).all(|pair| pair[1] <= pair[0] * 1.001), "{level:?}");
    }
    let last = |level: usize| *errors[level].last().expect("a round");
    // Noise of 0.05 leaves 8 * 0.05² / 12 around the clumps' means.
    assert!(last(0) < 3.0 * 8.0 * 0.05 * 0.05 / 12.0, "{errors:?}");
    assert!(last(1) < 0.8 * last(0) && last(2) < 0.8 * last(1), "{errors:?}");

    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("rq.safetensors");
    fitted.save(&path).expect("a writable folder");
    let (opened, again) = (
        Quantizer::open(&path).expect("just written"),
        Quantizer::fit(&embeddings, 8, &options, |_| {}).expect("sound"),
    );
    let sids = fitted.sids(&embeddings, Collision::Share).expect("finite");
    assert_eq!(opened.sids(&embeddings, Collision::Share).expect("finite"), sids);
    assert_eq!(again.sids(&embeddings, Collision::Share).expect("finite"), sids);
    let other = FitOptions { seed: 8, ..options };
    let other = Quantizer::fit(&embeddings, 8, &other, |_| {}).expect("sound");
    assert_ne!(other.sids(&embeddings, Collision::Share).expect("finite"), sids);
    let unique = fitted.sids(&embeddings, Collision::Append).expect("finite");
    assert_eq!(unique.iter().collect::<BTreeSet<_>>().len(), 3000);
}

#[test]
fn a_cold_item_is_put_by_its_embedding_in_one_call() {
    let mut rng = fastrand::Rng::with_seed(2);
    let embeddings = random_rows(&mut rng, 50, 4);
    let options = FitOptions { levels: 2, codes: 8, ..FitOptions::default() };
    let quantizer = Quantizer::fit(&embeddings.concat(), 4, &options, |_| {}).expect("sound");
    for collision in [Collision::Share, Collision::Append] {
        let sids = quantizer.sids(&embeddings.concat(), collision).expect("finite");
        let items: Vec<Item> =
            sids.iter().enumerate().map(|(n, sid)| Item::new(n.to_string(), *sid)).collect();
        let catalog = Arc::new(built(&items));
        let writer = writer_of(&catalog, None);
        let put = |name: &str| {
            let mut item = Item::new(name, Sid::default());
            item.tags.push("cold".into());
            writer.put_embedded(item, &embeddings[3], &quantizer, collision).expect("finite")
        };
        let (first, second) = (put("cold 1"), put("cold 2"));
        assert_eq!(first.codes()[..2], quantizer.codes(&embeddings[3]).expect("finite"));
        assert_eq!(first == second, collision == Collision::Share);
        let snapshot = catalog.snapshot();
        let cold = snapshot.find("cold 2").expect("just put");
        assert_eq!((snapshot.sid(cold), snapshot.tags(cold)), (second, vec!["cold".to_string()]));
        if collision == Collision::Append {
            assert!(items.iter().all(|item| item.sid != first && item.sid != second));
            // Put again, an item keeps its place; what was deleted makes room.
            assert_eq!(put("cold 2"), second);
            writer.apply(&[Change::Delete { item: "cold 1".into() }]).expect("sound");
            assert_eq!(put("cold 3"), first);
        }
    }
}

#[test]
fn impossible_codebooks_and_embeddings_are_errors() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("rq.safetensors");
    let tensor = |name: &str, shape: &[usize]| {
        (name.to_string(), shape.to_vec(), vec![0.5; shape.iter().product()])
    };
    for (tensors, words) in [
        (vec![tensor("weights", &[4, 2])], "no codebooks"),
        (vec![tensor("codebooks.0", &[4, 2]), tensor("codebooks.2", &[4, 2])], "missing"),
        (vec![tensor("codebooks.0", &[4, 2]), tensor("codebooks.1", &[4, 3])], "3 numbers"),
        (vec![tensor("codebooks", &[4, 2])], "[levels, codes, dim]"),
        (vec![tensor("codebooks", &[9, 4, 2])], "at most 8"),
        (vec![tensor("codebooks", &[2, 0, 2])], "no codebooks"),
        (vec![tensor("codebooks.0", &[0, 2])], "0 codes"),
        (
            vec![
                tensor("codebooks", &[1, 4, 2]),
                tensor("encoder.mlp_layers.1.weight", &[3, 5]),
                tensor("encoder.mlp_layers.1.bias", &[3]),
            ],
            "gives 3 numbers, the next takes 2",
        ),
        (
            vec![
                tensor("codebooks", &[1, 4, 2]),
                tensor("encoder.mlp_layers.1.weight", &[2, 5]),
                tensor("encoder.mlp_layers.1.bias", &[2]),
                tensor("encoder.mlp_layers.2.running_mean", &[2]),
            ],
            "linear layers",
        ),
    ] {
        save_tensors(&path, &tensors);
        let error = Quantizer::open(&path).err().unwrap_or_else(|| panic!("{words}: opened"));
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
    save_tensors(&path, &[tensor("codebooks", &[1, 4, 2])]);
    let quantizer = Quantizer::open(&path).expect("sound codebooks");
    assert!(quantizer.codes(&[0.0]).is_err());
    assert!(quantizer.codes(&[0.0, f32::NAN]).is_err());
    assert!(quantizer.sids(&[0.0, 1.0, f32::INFINITY, 0.0], Collision::Share).is_err());
    let fit = |embeddings: &[f32], dim, levels, codes| {
        let options = FitOptions { levels, codes, ..FitOptions::default() };
        Quantizer::fit(embeddings, dim, &options, |_| {}).is_err()
    };
    assert!(fit(&[], 2, 1, 1) && fit(&[1.0; 3], 2, 1, 1) && fit(&[f32::NAN; 2], 2, 1, 1));
    assert!(fit(&[1.0; 4], 0, 1, 1) && fit(&[1.0; 4], 2, 0, 1) && fit(&[1.0; 4], 2, 9, 1));
    assert!(fit(&[1.0; 4], 2, 1, 0) && fit(&[1.0; 4], 2, 1, 70_000));
    // Fewer embeddings than codes, all of them equal: nothing is wrong with that.
    assert!(!fit(&[1.0; 4], 2, 3, 256));
}
