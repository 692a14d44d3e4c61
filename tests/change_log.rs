//! No acknowledged change is lost, and no damage passes unnoticed, whatever happens to the files of a
//! catalog and to the processes that write it.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::tiny::{random_change, random_item};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{
    Catalog, CatalogBuilder, Change, Item, Snapshot, Watermark, change_log, check,
};
use sidereal::{CatalogWriter, Durability, Error, ErrorKind, WriterOptions};
use tempfile::TempDir;

fn item(name: &str) -> Item {
    Item::new(name, Sid::new(&[1, 2, 3]).expect("three codes"))
}

fn put(name: &str) -> Change {
    Change::Put(item(name))
}

fn built(items: &[Item]) -> Catalog {
    let mut builder = CatalogBuilder::default();
    items.iter().for_each(|item| builder.add(item.clone()).expect("levels agree"));
    builder.build().expect("names are unique")
}

fn options() -> WriterOptions {
    WriterOptions::default().with_compact_at(usize::MAX)
}

fn open(path: &Path) -> CatalogWriter {
    CatalogWriter::open(path, &options()).expect("a sound catalog")
}

/// A catalog of three items in a folder of its own.
fn catalog_file() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().canonicalize().expect("a folder").join("c.sidereal");
    built(&["one", "two", "three"].map(item)).save(&path).expect("a writable folder");
    (folder, path)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

/// The items by name, in a form that can be compared.
fn contents(snapshot: &Snapshot) -> BTreeMap<String, String> {
    let items = snapshot.all_items().map(|item| snapshot.item(item));
    items.map(|item| (item.name.clone(), format!("{item:?}"))).collect()
}

fn has(path: &Path, name: &str) -> bool {
    Catalog::open(path).expect("a sound catalog").snapshot().find(name).is_some()
}

fn error_of<T>(result: Result<T, Error>) -> Error {
    result.err().expect("an error")
}

// Damage and torn tails.

/// Random batches, some with watermarks; returns the items and the log's length after each.
fn random_log(path: &Path, batches: usize) -> Vec<(BTreeMap<String, String>, u64)> {
    let mut rng = fastrand::Rng::with_seed(4);
    let writer = open(path);
    let state =
        |writer: &CatalogWriter| (contents(&writer.catalog().snapshot()), writer.log_bytes());
    let mut states = vec![state(&writer)];
    for batch in 0..batches {
        let mut changes: Vec<Change> =
            (0..rng.usize(0..3)).map(|_| random_change(&mut rng, 9, 3, 5)).collect();
        changes.push(put(&format!("of batch {batch}"))); // every batch changes something
        match rng.bool() {
            true => drop(writer.apply(&changes).expect("sound changes")),
            false => {
                let mark = Watermark::new("items", 0, batch as u64);
                writer.apply_from(&mark, &changes).expect("sound changes");
            }
        }
        states.push(state(&writer));
    }
    states
}

#[test]
fn a_log_cut_at_any_byte_opens_with_every_whole_batch_or_says_what_is_missing() {
    let (_folder, path) = catalog_file();
    let states = random_log(&path, 5);
    let log = change_log::path_of(&path);
    let bytes = fs::read(&log).expect("the log");
    let lock = fs::read(beside(&path, ".lock")).expect("the lock");
    for len in states[0].1 as usize..=bytes.len() {
        // What follows is not there, or was never written to the disk.
        for tail in [vec![], vec![0; bytes.len() - len], vec![0; 5000]] {
            let cut = [&bytes[..len], &tail].concat();
            let is_whole = |(_, end): &(_, u64)| cut.starts_with(&bytes[..*end as usize]);
            let whole = states.iter().rposition(is_whole).expect("the header");
            let what = format!("cut at {len}, {} zeros", tail.len());
            fs::write(&log, &cut).expect("a writable folder");
            // Everything was acknowledged: the lock knows.
            fs::write(beside(&path, ".lock"), &lock).expect("a writable folder");
            let reader = Catalog::open(&path);
            let writer = CatalogWriter::open(&path, &options());
            if whole < 5 {
                for error in [error_of(reader), error_of(writer)] {
                    assert!(error.to_string().contains("were acknowledged"), "{what}: {error}");
                }
                let report = check::check(&path).expect("readable");
                assert!(!report.is_whole(), "{what}");
                assert_eq!(report.batches, whole, "{what}");
            } else {
                reader.expect(&what);
                writer.expect(&what);
            }
            // Without the lock, and for a log that was put back from a backup, the end is torn.
            fs::write(&log, &cut).expect("a writable folder");
            fs::write(beside(&path, ".lock"), b"").expect("a writable folder");
            let reader = Catalog::open(&path).expect(&what);
            assert_eq!(contents(&reader.snapshot()), states[whole].0, "{what}");
            let writer = open(&path);
            let snapshot = writer.catalog().snapshot();
            assert_eq!(contents(&snapshot), states[whole].0, "{what}");
            assert_eq!(
                (snapshot.number(), writer.log_bytes()),
                (1 + whole as u64, states[whole].1)
            );
            if len % 5 == 0 {
                writer.apply(&[put("after")]).expect("a sound change");
                drop(writer);
                assert!(has(&path, "after"), "{what}");
            }
        }
    }
}

#[test]
fn any_flipped_bit_of_a_log_is_an_error() {
    let (_folder, path) = catalog_file();
    random_log(&path, 4);
    let log = change_log::path_of(&path);
    let bytes = fs::read(&log).expect("the log");
    let lock = fs::read(beside(&path, ".lock")).expect("the lock");
    for bit in 0..8 * bytes.len() {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&log, &damaged).expect("a writable folder");
        // By what the lock knows, and by the record itself.
        for lock in [&lock[..], b""] {
            fs::write(beside(&path, ".lock"), lock).expect("a writable folder");
            let errors =
                [Catalog::open(&path).map(drop), CatalogWriter::open(&path, &options()).map(drop)];
            for error in errors.map(error_of) {
                assert!(matches!(error, Error::ChangeLog { .. }), "bit {bit}: {error}");
            }
        }
        assert_eq!(fs::read(&log).expect("the log"), damaged, "bit {bit}: the log was changed");
        let report = check::check(&path).expect("readable");
        assert!(!report.is_whole(), "bit {bit}");
    }
}

#[test]
fn any_flipped_bit_of_a_lock_changes_nothing() {
    let (_folder, path) = catalog_file();
    let states = random_log(&path, 3);
    let lock = beside(&path, ".lock");
    let bytes = fs::read(&lock).expect("the lock");
    for bit in 0..8 * bytes.len() {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&lock, &damaged).expect("a writable folder");
        let read = Catalog::open(&path).expect("a sound catalog");
        assert_eq!(contents(&read.snapshot()), states[3].0, "bit {bit}");
    }
}

#[test]
fn a_log_of_version_1_opens_and_is_rewritten() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("log-of-format-1");
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    for name in ["log-of-format-1", "log-of-format-1.changes"] {
        fs::copy(from.join(name), folder.path().join(name)).expect("a file");
    }
    let look = |snapshot: &Snapshot| {
        assert_eq!((snapshot.number(), snapshot.num_items()), (3, 3));
        assert!(snapshot.find("chair").is_none());
        let desk = snapshot.find("desk").expect("an item");
        assert!(!snapshot.is_available(desk));
        assert_eq!(snapshot.tags(snapshot.find("lamp").expect("an item")), ["sale"]);
    };
    look(&Catalog::open(&path).expect("an old log").snapshot());
    assert!(check::check(&path).expect("readable").is_whole());
    let writer = open(&path);
    look(&writer.catalog().snapshot());
    let log = fs::read(change_log::path_of(&path)).expect("the log");
    let parsed = change_log::parse(&log).expect("a sound log");
    assert_eq!((parsed.version, parsed.batches.len()), (2, 2));
    writer
        .apply(&[Change::Put(Item::new("new", Sid::new(&[1, 1]).expect("two")))])
        .expect("a sound change");
    drop(writer);
    assert!(has(&path, "new"));
}

#[test]
fn a_log_that_ends_before_its_catalog_is_begun_again() {
    let (_folder, path) = catalog_file();
    let log = change_log::path_of(&path);
    let writer = open(&path);
    writer.apply(&[put("a")]).expect("sound");
    drop(writer);
    let backup = fs::read(&log).expect("the log");
    let writer = open(&path);
    writer.apply(&[put("b")]).expect("sound");
    writer.apply(&[put("c")]).expect("sound");
    writer.compact().expect("a writable folder");
    drop(writer);
    // Put back by rename, as the page on catalogs says.
    fs::write(beside(&path, ".backup"), backup).expect("a writable folder");
    fs::rename(beside(&path, ".backup"), &log).expect("a writable folder");
    let report = check::check(&path).expect("readable");
    assert!(report.is_whole() && report.notes.len() == 1, "{report:?}");
    let writer = open(&path);
    writer.apply(&[put("d")]).expect("sound");
    drop(writer);
    for name in ["a", "b", "c", "d"] {
        assert!(has(&path, name), "{name}");
    }
}

#[test]
fn a_log_that_is_moved_or_removed_under_its_writer_takes_no_change() {
    for is_moved in [false, true] {
        let (_folder, path) = catalog_file();
        let log = change_log::path_of(&path);
        let writer = open(&path);
        writer.apply(&[put("a")]).expect("sound");
        match is_moved {
            true => fs::rename(&log, beside(&log, ".old")).expect("a writable folder"),
            false => fs::remove_file(&log).expect("a writable folder"),
        }
        for name in ["b", "c"] {
            let error = error_of(writer.apply(&[put(name)]));
            assert!(error.to_string().contains("open the catalog again"), "{error}");
        }
        assert!(writer.sync().is_err());
        assert!(writer.catalog().snapshot().find("b").is_none());
        drop(writer);
        assert!(!has(&path, "b"));
        open(&path).apply(&[put("d")]).expect("sound");
        assert!(has(&path, "d"));
    }
}

// Check and salvage.

#[test]
fn salvage_saves_everything_that_can_be_read() {
    let (folder, path) = catalog_file();
    let writer = open(&path);
    let mut ends = vec![writer.log_bytes()];
    for name in ["a", "b", "c", "d"] {
        writer.apply(&[put(name)]).expect("sound");
        ends.push(writer.log_bytes());
    }
    drop(writer);
    let log = change_log::path_of(&path);
    let mut bytes = fs::read(&log).expect("the log");
    bytes[ends[1] as usize + 26] ^= 4; // in the batch of b
    fs::write(&log, bytes).expect("a writable folder");
    let new = folder.path().join("new.sidereal");
    let report = check::salvage(&path, &new).expect("readable");
    assert!(!report.is_whole());
    assert!(report.findings[0].lost.contains("the batch of snapshot 3"), "{report:?}");
    for (name, is_there) in [("one", true), ("a", true), ("b", false), ("c", true), ("d", true)] {
        assert_eq!(has(&new, name), is_there, "{name}");
    }
    assert!(check::check(&new).expect("readable").is_whole());
    let itself = error_of(check::salvage(&path, &path));
    assert!(itself.to_string().contains("name another file"), "{itself}");
}

#[test]
fn salvage_does_without_titles_and_without_the_whole_file() {
    let (folder, path) = catalog_file();
    let mut titled = item("four");
    titled.title = "a title that is looked for".into();
    titled.tags = vec!["a tag".into()];
    let writer = open(&path);
    writer.apply(&[Change::Put(titled)]).expect("sound");
    writer.compact().expect("a writable folder");
    writer.apply(&[put("five"), Change::Delete { item: "one".into() }]).expect("sound");
    drop(writer);
    let bytes = fs::read(&path).expect("the catalog");
    let at = |text: &[u8]| {
        bytes.windows(text.len()).position(|window| window == text).expect("in the file")
    };
    let new = folder.path().join("new.sidereal");
    let damage = |at: usize| {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        fs::write(&path, damaged).expect("a writable folder");
        check::salvage(&path, &new).expect("readable")
    };
    let report = damage(at(b"looked for"));
    assert_eq!(report.findings[0].lost, "all titles", "{report:?}");
    let saved = Catalog::open(&new).expect("a sound catalog").snapshot();
    let four = saved.find("four").expect("saved");
    assert_eq!((saved.title(four), saved.tags(four)), (None, vec!["a tag".to_string()]));
    assert!(saved.find("five").is_some() && saved.find("one").is_none());
    // Of a file without names only the log is left.
    let report = damage(at(b"three"));
    assert!(report.findings[0].lost.contains("that the log does not put"), "{report:?}");
    let saved = Catalog::open(&new).expect("a sound catalog").snapshot();
    assert_eq!(contents(&saved).into_keys().collect::<Vec<_>>(), ["five"]);
    fs::remove_file(change_log::path_of(&path)).expect("a log");
    assert!(matches!(check::salvage(&path, &new), Err(Error::CatalogFile { .. })));
}

#[test]
fn any_flipped_bit_of_a_catalog_is_found_by_check() {
    let (_folder, path) = catalog_file();
    let bytes = fs::read(&path).expect("the catalog");
    for byte in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[byte] ^= 1 << (byte % 8);
        fs::write(&path, damaged).expect("a writable folder");
        assert!(!check::check(&path).expect("readable").is_whole(), "byte {byte}");
    }
}

// Names, modes and locks.

#[cfg(unix)]
#[test]
fn two_names_by_symbolic_links_are_one_catalog() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let (folder, path) = catalog_file();
    let link = folder.path().join("link.sidereal");
    let chain = folder.path().join("chain.sidereal");
    symlink(&path, &link).expect("a writable folder");
    symlink("link.sidereal", &chain).expect("a writable folder");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("our file");
    let writer = open(&chain);
    assert!(matches!(CatalogWriter::open(&path, &options()), Err(Error::CatalogInUse { .. })));
    writer.apply(&[put("a")]).expect("sound");
    assert!(has(&path, "a") && has(&link, "a") && has(&chain, "a"));
    writer.compact().expect("a writable folder");
    writer.apply(&[put("b")]).expect("sound");
    drop(writer);
    for name in [&link, &chain] {
        assert!(name.symlink_metadata().expect("a link").is_symlink(), "{name:?} was replaced");
        assert!(has(name, "a") && has(name, "b"));
    }
    // A link to a file that is not there yet is followed when the file is built.
    let (later, to_later) = (folder.path().join("later.sidereal"), folder.path().join("to_later"));
    symlink("later.sidereal", &to_later).expect("a writable folder");
    built(&[item("x")]).save(&to_later).expect("a writable folder");
    assert!(has(&later, "x") && to_later.symlink_metadata().expect("a link").is_symlink());
    for suffix in ["", ".changes", ".lock"] {
        let file = beside(&path, suffix);
        let mode = fs::metadata(&file).expect("a file").permissions().mode() & 0o777;
        assert_eq!(mode, 0o640, "{file:?}");
    }
    // Nobody's mode: as the folder's user would make any file.
    let other = fs::File::create(folder.path().join("other")).expect("a writable folder");
    let usual = other.metadata().expect("a file").permissions().mode();
    assert_eq!(fs::metadata(&later).expect("a file").permissions().mode(), usual);
}

#[test]
fn a_catalog_that_a_writer_has_open_is_not_built_over() {
    let (folder, path) = catalog_file();
    let writer = open(&path);
    let error = error_of(built(&[item("new")]).save(&path));
    assert!(matches!(error, Error::CatalogInUse { .. }), "{error}");
    assert!(error.to_string().contains("another writer"), "{error}");
    let items = folder.path().join("items.jsonl");
    fs::write(&items, "{\"item\": \"new\", \"sid\": [1, 2, 3]}\n").expect("a writable folder");
    let build = ["catalog", "build", "--items", text(&items), "--output", text(&path)];
    let output = sidereal(&build);
    assert_eq!(output.status.code(), Some(2));
    writer.apply(&[put("a")]).expect("sound");
    drop(writer);
    assert!(has(&path, "a") && !has(&path, "new"));
    // Changes that are not compiled in are in the way, an empty log is not.
    let error = error_of(built(&[item("new")]).save(&path));
    assert!(error.to_string().contains("holds changes that the catalog there lacks"), "{error}");
    assert_eq!(sidereal(&build).status.code(), Some(2));
    open(&path).compact().expect("a writable folder");
    assert_eq!(sidereal(&build).status.code(), Some(0));
    assert!(has(&path, "new") && !has(&path, "a"));
    open(&path).apply(&[put("b")]).expect("sound");
    assert!(has(&path, "b"));
}

#[test]
fn a_lock_that_is_removed_and_made_again_is_still_one_lock() {
    let (_folder, path) = catalog_file();
    let writer = open(&path);
    let error = error_of(CatalogWriter::open(&path, &options()));
    assert!(matches!(error, Error::CatalogInUse { .. }), "{error}");
    drop(writer);
    fs::remove_file(beside(&path, ".lock")).expect("a file");
    let writer = open(&path);
    assert!(CatalogWriter::open(&path, &options()).is_err());
    writer.apply(&[put("a")]).expect("sound");
}

#[cfg(unix)]
#[test]
fn a_log_that_is_a_link_stays_one() {
    let (folder, path) = catalog_file();
    let elsewhere = folder.path().join("logs");
    fs::create_dir(&elsewhere).expect("a writable folder");
    open(&path).apply(&[put("a")]).expect("sound");
    let (log, target) = (beside(&path, ".changes"), elsewhere.join("c.changes"));
    fs::rename(&log, &target).expect("a writable folder");
    std::os::unix::fs::symlink(&target, &log).expect("a writable folder");
    for name in ["b", "c"] {
        let writer = open(&path);
        writer.apply(&[put(name)]).expect("sound");
        writer.compact().expect("a writable folder");
        writer.apply(&[put(&format!("after {name}"))]).expect("sound");
        drop(writer);
        assert!(log.symlink_metadata().expect("a link").is_symlink(), "the link was replaced");
        assert!(["a", name, &format!("after {name}")].iter().all(|name| has(&path, name)));
        assert!(check::check(&path).expect("readable").is_whole());
    }
    assert_eq!(fs::read_dir(&elsewhere).expect("a folder").count(), 1);
}

#[cfg(unix)]
#[test]
fn a_pipe_in_the_place_of_a_file_is_an_error_and_is_not_waited_for() {
    let (_folder, path) = catalog_file();
    for suffix in [".changes", ".lock", ""] {
        let file = beside(&path, suffix);
        let kept = fs::read(&file).ok();
        let _ = fs::remove_file(&file);
        let made = Command::new("mkfifo").arg(&file).status().expect("mkfifo is everywhere");
        assert!(made.success());
        let error = error_of(CatalogWriter::open(&path, &options()));
        assert!(error.to_string().contains("no file"), "{suffix}: {error}");
        if suffix != ".lock" {
            // A reader needs no lock.
            let errors = [Catalog::open(&path).map(drop), check::check(&path).map(drop)];
            for error in errors.map(error_of) {
                assert!(error.to_string().contains("no file"), "{suffix}: {error}");
            }
        }
        fs::remove_file(&file).expect("our file");
        if let Some(bytes) = kept {
            fs::write(&file, bytes).expect("a writable folder");
        }
    }
    open(&path).apply(&[put("a")]).expect("sound");
}

/// A backup that takes the inode of the file whose place it takes is still another file.
#[test]
fn a_backup_can_be_put_back_again_and_again() {
    let (folder, path) = catalog_file();
    open(&path).apply(&[put("a")]).expect("sound");
    let backup = |suffix: &str| folder.path().join(format!("backup{suffix}"));
    for suffix in ["", ".changes"] {
        fs::copy(beside(&path, suffix), backup(suffix)).expect("a writable folder");
    }
    for round in 0..6 {
        let name = format!("later {round}");
        open(&path).apply(&[put(&name)]).expect("sound");
        for suffix in [".changes", ""] {
            let new = folder.path().join("new");
            fs::copy(backup(suffix), &new).expect("a writable folder");
            fs::rename(&new, beside(&path, suffix)).expect("a writable folder");
        }
        assert!(has(&path, "a") && !has(&path, &name), "round {round}");
        assert!(check::check(&path).expect("readable").is_whole(), "round {round}");
    }
}

#[test]
fn what_is_left_of_a_shortened_catalog_is_saved() {
    let (folder, path) = catalog_file();
    let named = |name: &str| Item { title: format!("Title of {name}"), ..item(name) };
    built(&["one", "two", "three"].map(named)).save(&path).expect("a writable folder");
    open(&path).apply(&[put("four")]).expect("sound");
    let bytes = fs::read(&path).expect("the file");
    let mut saved = 0;
    for len in (0..bytes.len()).rev() {
        fs::write(&path, &bytes[..len]).expect("a writable folder");
        assert!(matches!(Catalog::open(&path), Err(Error::CatalogFile { .. })), "{len} bytes");
        let new = folder.path().join("saved.sidereal");
        let report = check::salvage(&path, &new).expect("the log alone has an item");
        assert!(!report.is_whole() && report.items >= 1, "{len} bytes: {report:?}");
        saved += usize::from(report.items == 4);
        let names = contents(&Catalog::open(&new).expect("sound").snapshot());
        assert_eq!(names.len(), report.items, "{len} bytes");
        fs::remove_file(&new).expect("our file");
    }
    assert!(saved > 50, "the items were saved of {saved} lengths");
}

#[test]
fn a_catalog_that_is_not_there_gets_no_lock() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("c.sidereal");
    assert!(matches!(CatalogWriter::open(&path, &options()), Err(Error::Io { .. })));
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
}

#[test]
fn a_callback_that_panics_leaves_the_writer_whole() {
    let (_folder, path) = catalog_file();
    let writer = open(&path);
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let panics = || writer.apply_with(|_| panic!("the caller's own"));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics));
    std::panic::set_hook(quiet);
    assert!(outcome.is_err());
    writer.apply(&[put("a")]).expect("sound");
    writer.compact().expect("a writable folder");
    writer.sync().expect("a disk");
    drop(writer);
    assert!(has(&path, "a"));
}

#[test]
fn try_apply_says_that_the_writer_is_busy() {
    // The one put of the first batch starts a compaction, during which eight may wait.
    let catalog = Arc::new(built(&(0..40_000).map(|n| item(&n.to_string())).collect::<Vec<_>>()));
    let options = WriterOptions::default().with_compact_at(1);
    let writer = CatalogWriter::in_memory(catalog, &options).expect("a thread");
    let mut busy = None;
    for n in 0..100_000 {
        if let Err(error) = writer.try_apply(&[put(&format!("new {n}"))]) {
            busy = Some(error);
            break;
        }
    }
    let busy = busy.expect("a compaction is slower than a put");
    assert_eq!(busy.kind(), ErrorKind::Overloaded, "{busy}");
    writer.apply(&[put("waits")]).expect("sound");
}

// Watermarks and new bases.

#[test]
fn a_watermark_is_stored_with_its_batch_and_a_repeated_batch_is_skipped() {
    let (_folder, path) = catalog_file();
    let mark = |partition, offset| Watermark::new("items", partition, offset);
    let writer = open(&path);
    assert!(!writer.apply_from(&mark(0, 5), &[put("a")]).expect("sound").is_repeated);
    writer.apply(&[Change::Delete { item: "a".into() }]).expect("sound");
    let look = |writer: &CatalogWriter, what: &str| {
        let before = writer.catalog().snapshot();
        for repeated in [mark(0, 5), mark(0, 0)] {
            let applied = writer.apply_from(&repeated, &[put("a")]).expect("sound");
            assert!(applied.is_repeated, "{what}");
            assert_eq!(applied.snapshot, before.number(), "{what}");
        }
        assert!(writer.catalog().snapshot().find("a").is_none(), "{what}");
        assert_eq!(before.watermarks().offset("items", 0), Some(5), "{what}");
    };
    look(&writer, "at once");
    drop(writer);
    let writer = open(&path);
    look(&writer, "reopened");
    writer.compact().expect("a writable folder");
    look(&writer, "compacted");
    drop(writer);
    fs::remove_file(change_log::path_of(&path)).expect("a log");
    let writer = open(&path);
    look(&writer, "compacted, and without the log");
    // An empty batch moves the watermark; one that cannot be moves nothing.
    assert!(!writer.apply_from(&mark(0, 6), &[]).expect("sound").is_repeated);
    let short = Change::Put(Item::new("short", Sid::new(&[1]).expect("one")));
    assert!(writer.apply_from(&mark(0, 7), &[short]).is_err());
    drop(writer);
    let watermarks = Catalog::open(&path).expect("sound").snapshot().watermarks().clone();
    assert_eq!(watermarks.iter().collect::<Vec<_>>(), [mark(0, 6)]);
}

#[test]
fn a_new_base_keeps_what_comes_after_its_watermark() {
    let mark = |offset| Watermark::new("items", 0, offset);
    for is_compacted in [false, true] {
        let (_folder, path) = catalog_file();
        let writer = open(&path);
        for offset in 0..10 {
            writer.apply_from(&mark(offset), &[put(&format!("n{offset}"))]).expect("sound");
        }
        if is_compacted {
            writer.compact().expect("a writable folder");
        }
        writer.apply(&[put("by hand")]).expect("sound");
        // As of offset 4; it lacks what came before, so that one sees what was kept.
        let base = built(&[item("base")]);
        base.set_watermarks(&[mark(4)]).expect("sound");
        let before = writer.catalog().snapshot().number();
        let replaced = writer.replace_base(&base).expect("sound");
        assert!(replaced.snapshot > before);
        assert_eq!(replaced.kept_batches, 6);
        writer.apply_from(&mark(10), &[put("n10")]).expect("sound");
        let expected = ["base", "by hand", "n10", "n5", "n6", "n7", "n8", "n9"];
        let names = |snapshot: &Snapshot| contents(snapshot).into_keys().collect::<Vec<_>>();
        assert_eq!(names(&writer.catalog().snapshot()), expected);
        // A base that is ahead of the feed wins over what the feed repeats.
        let ahead = built(&[item("ahead")]);
        ahead.set_watermarks(&[mark(20)]).expect("sound");
        let number = writer.catalog().snapshot().number();
        drop(writer);
        let read = Catalog::open(&path).expect("sound").snapshot();
        assert_eq!((names(&read), read.number()), (expected.map(String::from).to_vec(), number));
        let writer = open(&path);
        writer.replace_base(&ahead).expect("sound");
        assert!(writer.apply_from(&mark(15), &[put("n15")]).expect("sound").is_repeated);
        assert_eq!(names(&writer.catalog().snapshot()), ["ahead"]);
        // One that lacks changes which the log has no longer is refused.
        let writer_error = |base: &Catalog| error_of(writer.replace_base(base));
        let options_error = writer_error(&built(&[item("no watermark")]));
        assert!(matches!(options_error, Error::StaleBase { .. }), "{options_error}");
        let levels = built(&[Item::new("short", Sid::new(&[1]).expect("one"))]);
        assert!(matches!(writer_error(&levels), Error::LevelsMismatch { .. }));
        drop(writer);
        assert!(check::check(&path).expect("readable").is_whole());
    }
}

#[test]
fn a_new_base_whose_process_dies_before_the_log_is_begun_again_loses_nothing() {
    let mark = |offset| Watermark::new("items", 0, offset);
    let names = |path: &Path| {
        let snapshot = Catalog::open(path).expect("sound").snapshot();
        contents(&snapshot).into_keys().collect::<Vec<_>>()
    };
    for (as_of, expected) in [(3, &["base", "n4", "n5"][..]), (9, &["base"])] {
        let (_folder, path) = catalog_file();
        let log = change_log::path_of(&path);
        let writer = open(&path);
        for offset in 0..6 {
            writer.apply_from(&mark(offset), &[put(&format!("n{offset}"))]).expect("sound");
        }
        let old_log = fs::read(&log).expect("the log");
        let base = |as_of| {
            let base = built(&[item("base")]);
            base.set_watermarks(&[mark(as_of)]).expect("sound");
            base
        };
        writer.replace_base(&base(as_of)).expect("sound");
        drop(writer);
        fs::write(beside(&path, ".old"), old_log).expect("a writable folder");
        fs::rename(beside(&path, ".old"), &log).expect("a writable folder");
        assert_eq!(names(&path), expected);
        // What the feed sent between 5 and 9 came with the base alone.
        let writer = open(&path);
        let older = writer.replace_base(&base(as_of - 1));
        assert_eq!(matches!(older, Err(Error::StaleBase { .. })), as_of == 9, "{older:?}");
        writer.apply_from(&mark(10), &[put("n10")]).expect("sound");
        drop(writer);
        let last: &[&str] =
            if as_of == 9 { &["base", "n10"] } else { &["base", "n10", "n3", "n4", "n5"] };
        assert_eq!(names(&path), last);
    }
}

#[test]
fn a_new_base_in_memory_must_have_all_that_was_applied() {
    let writer = CatalogWriter::in_memory(built(&[item("old")]).into(), &options());
    let writer = writer.expect("a thread");
    let mark = |offset| Watermark::new("items", 0, offset);
    writer.apply_from(&mark(5), &[put("a")]).expect("sound");
    let base = |offset| {
        let base = built(&[item("base")]);
        base.set_watermarks(&[mark(offset)]).expect("sound");
        base
    };
    assert!(matches!(writer.replace_base(&base(4)), Err(Error::StaleBase { .. })));
    let number = writer.catalog().snapshot().number();
    let replaced = writer.replace_base(&base(5)).expect("sound");
    assert!(replaced.snapshot > number && replaced.kept_batches == 0);
    assert_eq!(contents(&writer.catalog().snapshot()).into_keys().collect::<Vec<_>>(), ["base"]);
}

#[test]
fn a_new_base_comes_while_changes_and_searches_go_on() {
    let (_folder, path) = catalog_file();
    let writer = open(&path);
    let mark = |offset| Watermark::new("items", 0, offset);
    std::thread::scope(|scope| {
        let feed = scope.spawn(|| {
            for offset in 0..400 {
                writer.apply_from(&mark(offset), &[put(&format!("n{offset}"))]).expect("sound");
            }
        });
        while !feed.is_finished() {
            let snapshot = writer.catalog().snapshot();
            let base = built(&snapshot.all_items().map(|at| snapshot.item(at)).collect::<Vec<_>>());
            base.set_watermarks(&snapshot.watermarks().iter().collect::<Vec<_>>()).expect("sound");
            writer.replace_base(&base).expect("sound");
        }
    });
    let expected = contents(&writer.catalog().snapshot());
    assert_eq!(expected.len(), 403);
    drop(writer);
    assert_eq!(contents(&Catalog::open(&path).expect("sound").snapshot()), expected);
}

#[test]
fn a_feed_that_repeats_itself_at_random_gives_equal_catalogs() {
    for seed in 0..10 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let items: Vec<Item> =
            (0..8).map(|n| random_item(&mut rng, &n.to_string(), 3, 5)).collect();
        let feed: Vec<Vec<Change>> = (0..60)
            .map(|_| (0..rng.usize(0..4)).map(|_| random_change(&mut rng, 14, 3, 5)).collect())
            .collect();
        let in_memory = |repeat: bool, rng: &mut fastrand::Rng| {
            let options = WriterOptions::default().with_compact_at(usize::MAX);
            let writer = CatalogWriter::in_memory(built(&items).into(), &options);
            let writer = writer.expect("a thread");
            for end in 1..=feed.len() {
                // Without watermarks, a repeat is harmless where it goes on to the end.
                let start = if repeat { end - 1 - rng.usize(0..end.min(5)) } else { end - 1 };
                for batch in &feed[start..end] {
                    writer.apply(batch).expect("sound changes");
                }
            }
            contents(&writer.catalog().snapshot())
        };
        let once = in_memory(false, &mut rng);
        assert_eq!(in_memory(true, &mut rng), once, "seed {seed}, without watermarks");
        // With watermarks: any repeat, in any order, with restarts and compactions between.
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("c.sidereal");
        built(&items).save(&path).expect("a writable folder");
        let mut writer = open(&path);
        let mut next = 0;
        while next < feed.len() {
            let at = rng.usize(0..=next);
            let mark = Watermark::new("items", 7, at as u64);
            let applied = writer.apply_from(&mark, &feed[at]).expect("sound changes");
            assert_eq!(applied.is_repeated, at < next, "seed {seed}");
            next += usize::from(at == next);
            match rng.u8(0..12) {
                0 => {
                    drop(writer);
                    writer = open(&path);
                }
                1 => writer.compact().expect("a writable folder"),
                _ => {}
            }
        }
        assert_eq!(contents(&writer.catalog().snapshot()), once, "seed {seed}");
        drop(writer);
        assert_eq!(contents(&Catalog::open(&path).expect("sound").snapshot()), once);
    }
}

// The command line, and several processes at once.

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn sidereal(arguments: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_sidereal"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the binary of this build");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("panicked"), "{errors}");
    output
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Puts items with the command; whether it said that all went well.
fn change(path: &Path, file: &Path, names: &[String], more: &[&str]) -> bool {
    let lines: String = names
        .iter()
        .map(|name| format!("{{\"put\": {{\"item\": \"{name}\", \"sid\": [1, 2, 3]}}}}\n"))
        .collect();
    fs::write(file, lines).expect("a writable folder");
    let arguments = ["catalog", "change", text(path), "--changes", text(file)];
    let output = sidereal(&[&arguments[..], more].concat());
    match output.status.code() {
        Some(0) => true,
        Some(2) if errors(&output).contains("another writer") => false,
        code => panic!("{code:?}: {}", errors(&output)),
    }
}

#[test]
fn two_processes_that_begin_the_log_together_lose_nothing() {
    let (folder, path) = catalog_file();
    for round in 0..75 {
        for suffix in [".changes", ".lock"] {
            let _ = fs::remove_file(beside(&path, suffix));
        }
        let acknowledged: Vec<String> = std::thread::scope(|scope| {
            let processes = [0, 1].map(|process| {
                let name = format!("r{round}p{process}");
                let (path, file) = (&path, folder.path().join(format!("{process}.jsonl")));
                scope.spawn(move || {
                    change(path, &file, std::slice::from_ref(&name), &[]).then_some(name)
                })
            });
            processes.into_iter().filter_map(|it| it.join().expect("no panic")).collect()
        });
        assert!(!acknowledged.is_empty(), "round {round}");
        for name in &acknowledged {
            assert!(has(&path, name), "round {round}: {name} of {acknowledged:?} is lost");
        }
    }
}

#[test]
fn four_processes_of_which_two_compact_lose_nothing() {
    let (folder, path) = catalog_file();
    let refused = AtomicUsize::new(0);
    let acknowledged: Vec<String> = std::thread::scope(|scope| {
        let processes: Vec<_> = (0..4)
            .map(|process| {
                let (path, refused) = (&path, &refused);
                let file = folder.path().join(format!("{process}.jsonl"));
                scope.spawn(move || {
                    let more: &[&str] = if process % 2 == 0 { &["--compact"] } else { &[] };
                    let mut acknowledged = Vec::new();
                    for round in 0..75 {
                        let name = format!("r{round}p{process}");
                        match change(path, &file, std::slice::from_ref(&name), more) {
                            true => acknowledged.push(name),
                            false => drop(refused.fetch_add(1, Ordering::Relaxed)),
                        }
                    }
                    acknowledged
                })
            })
            .collect();
        processes.into_iter().flat_map(|it| it.join().expect("no panic")).collect()
    });
    let snapshot = Catalog::open(&path).expect("a sound catalog").snapshot();
    assert_eq!(acknowledged.len() + refused.into_inner(), 300);
    assert!(acknowledged.len() > 10, "{} were acknowledged", acknowledged.len());
    for name in &acknowledged {
        assert!(snapshot.find(name).is_some(), "{name} is lost");
    }
    assert_eq!(snapshot.num_items(), 3 + acknowledged.len());
    assert!(check::check(&path).expect("readable").is_whole());
}

#[test]
fn a_file_of_changes_with_a_bad_line_changes_nothing_and_names_the_line() {
    let (folder, path) = catalog_file();
    let line = |n: usize| match n {
        15_001 => "{\"put\": {\"item\": \"bad\", \"sid\": [1, 2]}}\n".to_string(),
        _ => format!("{{\"put\": {{\"item\": \"n{n}\", \"sid\": [1, 2, 3]}}}}\n"),
    };
    let file = folder.path().join("changes.jsonl");
    fs::write(&file, (1..=15_020).map(line).collect::<String>()).expect("a writable folder");
    let output = sidereal(&["catalog", "change", text(&path), "--changes", text(&file)]);
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("line 15001"), "{}", errors(&output));
    let snapshot = Catalog::open(&path).expect("sound").snapshot();
    assert_eq!((snapshot.number(), snapshot.num_items()), (1, 3));
}

#[test]
fn the_command_line_keeps_watermarks_and_checks_catalogs() {
    let (folder, path) = catalog_file();
    let file = folder.path().join("changes.jsonl");
    let names = ["a".to_string()];
    let mark = |mark: &'static str| ["--watermark", mark];
    assert!(change(&path, &file, &names, &mark("items/0@7")));
    let arguments = ["catalog", "change", text(&path), "--changes", text(&file)];
    let again = sidereal(&[&arguments[..], &mark("items/0@7")].concat());
    assert_eq!(again.status.code(), Some(0));
    assert!(errors(&again).contains("applied already"), "{}", errors(&again));
    let bad = sidereal(&[&arguments[..], &mark("items@7")].concat());
    assert_eq!(bad.status.code(), Some(2));
    let json = |arguments: &[&str], code: i32| -> serde_json::Value {
        let output = sidereal(arguments);
        assert_eq!(output.status.code(), Some(code), "{}", errors(&output));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let inspected = json(&["catalog", "inspect", text(&path), "--json"], 0);
    let expected = serde_json::json!([{"source": "items", "partition": 0, "offset": 7}]);
    assert_eq!(inspected["watermarks"], expected);
    // A full file as of an earlier offset keeps the later changes.
    let items = folder.path().join("items.jsonl");
    fs::write(&items, "{\"item\": \"new\", \"sid\": [1, 2, 3]}\n").expect("a writable folder");
    let build = ["catalog", "build", "--items", text(&items), "--output", text(&path)];
    assert_eq!(sidereal(&build).status.code(), Some(2));
    assert_eq!(sidereal(&[&build[..], &mark("items/0@6")].concat()).status.code(), Some(0));
    assert!(has(&path, "new") && has(&path, "a") && !has(&path, "one"));
    let report = json(&["catalog", "check", text(&path), "--json"], 0);
    assert_eq!((&report["items"], &report["findings"]), (&2.into(), &serde_json::json!([])));
    let mut bytes = fs::read(&path).expect("the catalog");
    *bytes.last_mut().expect("a byte") ^= 1;
    fs::write(&path, bytes).expect("a writable folder");
    let new = folder.path().join("new.sidereal");
    let output = sidereal(&["catalog", "check", text(&path), "--salvage", text(&new)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("damaged"));
    assert!(has(&new, "a"));
}

// The k-th operation on files fails.

/// What a child says of its steps, on lines that begin with this.
const SAYS: &str = "@ ";

/// Changes a catalog in all ways, going on after each error, and says what was acknowledged.
#[test]
#[ignore = "a child of the test below runs it, with operations that fail"]
fn child_that_changes_a_catalog() {
    let path = PathBuf::from(std::env::var_os("CHILD_CATALOG").expect("the parent's"));
    let durability = match std::env::var("CHILD_DURABILITY").as_deref() {
        Ok("machine") => Durability::Machine,
        _ => Durability::Process,
    };
    let options = options().with_durability(durability);
    for round in ["first", "second"] {
        let writer = match CatalogWriter::open(&path, &options) {
            Ok(writer) => writer,
            Err(error) => {
                println!("{SAYS}refused {error}");
                continue;
            }
        };
        let mut offset = 0;
        let mut change = |step: &str| {
            let name = format!("{round}-{step}");
            offset += 1;
            let mark = Watermark::new(round, 0, offset);
            let outcome = match offset % 2 {
                0 => writer.apply_from(&mark, &[put(&name)]).map(drop),
                _ => writer.apply(&[put(&name)]).map(drop),
            };
            let outcome = match outcome {
                Ok(()) => "acknowledged",
                Err(Error::MayBeLogged { .. }) => "perhaps",
                Err(_) => "refused",
            };
            println!("{SAYS}{outcome} {name}");
        };
        change("a");
        change("b");
        let _ = writer.compact();
        change("c");
        change("d");
        let _ = writer.sync();
        let snapshot = writer.catalog().snapshot();
        let base = built(&snapshot.all_items().map(|at| snapshot.item(at)).collect::<Vec<_>>());
        base.set_watermarks(&snapshot.watermarks().iter().collect::<Vec<_>>()).expect("sound");
        change("e");
        let _ = writer.replace_base(&base);
        change("f");
        change("g");
    }
}

#[cfg_attr(not(all(target_os = "linux", cpp_compiler)), ignore = "needs gcc on x86-64 Linux")]
#[test]
fn whichever_operation_fails_nothing_acknowledged_is_lost_and_nothing_refused_is_there() {
    let folder = match Path::new("/dev/shm").is_dir() {
        true => tempfile::tempdir_in("/dev/shm"), // without waiting for a disk
        false => tempfile::tempdir(),
    };
    let folder = folder.expect("a temporary folder");
    let shim = folder.path().join("faults.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/faults.c");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o", text(&shim), text(&source), "-ldl"])
        .status();
    assert!(compiled.expect("a C compiler").success());
    for durability in ["process", "machine"] {
        for how in ["once", "on", "done", "short"] {
            let mut fired = 0;
            for at in 1.. {
                let what = format!("operation {at} fails ({how}), durability {durability}");
                if !fail_at(folder.path(), &shim, at, how, durability, &what) {
                    break;
                }
                fired += 1;
            }
            assert!(fired > 50, "only {fired} operations failed ({how}, {durability})");
        }
    }
}

/// Runs a child whose operation `at` fails and compares what is there with what it said. Whether the
/// child came as far as that operation.
fn fail_at(folder: &Path, shim: &Path, at: usize, how: &str, durability: &str, what: &str) -> bool {
    let (files, fired) = (folder.join("files"), folder.join("fired"));
    let _ = fs::remove_dir_all(&files);
    let _ = fs::remove_file(&fired);
    fs::create_dir(&files).expect("a writable folder");
    let path = files.join("c.sidereal");
    built(&["one", "two", "three"].map(item)).save(&path).expect("a writable folder");
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child_that_changes_a_catalog", "--ignored", "--nocapture"])
        .env("CHILD_CATALOG", &path)
        .env("CHILD_DURABILITY", durability)
        .env("LD_PRELOAD", shim)
        .env("FAULT_FOLDER", &files)
        .env("FAULT_AT", at.to_string())
        .env("FAULT_HOW", how)
        .env("FAULT_FIRED", &fired)
        .output()
        .expect("this test");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{what}: {said}{}", errors(&output));
    let report = check::check(&path).expect("readable");
    assert!(report.is_whole(), "{what}: {report:?}\n{said}");
    let reopened = Catalog::open(&path).unwrap_or_else(|error| panic!("{what}: {error}\n{said}"));
    let snapshot = reopened.snapshot();
    for line in said.lines().filter_map(|line| line.split(SAYS).nth(1)) {
        let (outcome, name) = line.split_once(' ').expect("two words");
        let is_there = snapshot.find(name).is_some();
        match outcome {
            "acknowledged" => assert!(is_there, "{what}: {name} is lost\n{said}"),
            "refused" => assert!(!is_there, "{what}: {name} is there\n{said}"),
            _ => {}
        }
    }
    let writer = open(&path);
    assert_eq!(contents(&writer.catalog().snapshot()), contents(&snapshot), "{what}");
    writer.apply(&[put("after")]).expect("a sound change");
    drop(writer);
    assert!(has(&path, "after"), "{what}");
    fired.exists()
}
