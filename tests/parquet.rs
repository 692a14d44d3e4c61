//! Files of items in Parquet, as pyarrow writes them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parquet::data_type::{ByteArrayType, DoubleType, Int32Type};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use sidereal::Error;
use sidereal::catalog::Catalog;

#[path = "common/folders.rs"]
mod folders;

use folders::{INDUSTRIAL, models, temp, write};

fn open(name: &str) -> Catalog {
    Catalog::open(&models().join("catalogs").join(name)).expect("a sound file")
}

#[test]
fn a_parquet_file_is_read_as_the_index_that_it_was_made_of() {
    let (found, expected) = (open("industrial.parquet").snapshot(), INDUSTRIAL.snapshot());
    assert_eq!(found.num_items(), expected.num_items());
    let mut unavailable = 0;
    for item in expected.all_items() {
        let other = found.find(expected.name(item)).expect("the same items");
        assert_eq!(found.sid(other), expected.sid(item));
        let tags = found.tags(other);
        assert!(tags.contains(&"even".into()) != tags.contains(&"odd".into()), "{tags:?}");
        unavailable += u32::from(!found.is_available(other));
    }
    // Every 21st is not available, and where the file is silent an item is.
    assert_eq!(unavailable, expected.num_items().div_ceil(21) as u32);
    let tags = found.base().tags().expect("sound sets");
    let tenth = expected.num_items().div_ceil(10) as u64;
    assert!(tags.contains(&("tenth".to_string(), tenth)), "{tags:?}");
}

#[test]
fn codes_may_stand_in_a_column_a_level_and_names_be_numbers() {
    let catalog = open("by_level.parquet").snapshot();
    let item = |name: &str| catalog.find(name).expect("an item");
    assert_eq!(catalog.sid(item("7")).codes(), [1, 5]);
    assert_eq!(catalog.sid(item("8")).codes(), [2, 6]);
    assert_eq!(catalog.sid(item("9")), catalog.sid(item("7")));
    assert_eq!((catalog.title(item("8")), catalog.title(item("9"))), (None, Some("é")));
}

/// A file of items `0`, `1` and so on, all of one semantic ID, with these weights.
fn file_with_weights(weights: &[Option<f64>]) -> Vec<u8> {
    let schema = "message items {
        required binary item (UTF8); required int32 sid_0; optional double weight;
    }";
    let schema = parse_message_type(schema).expect("a sound schema");
    let writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::default());
    let mut writer = writer.expect("memory takes all bytes");
    let mut group = writer.next_row_group().expect("a file that is not closed");
    let names: Vec<_> = (0..weights.len()).map(|n| n.to_string().as_str().into()).collect();
    write_column::<ByteArrayType>(&mut group, &names, None);
    write_column::<Int32Type>(&mut group, &vec![7; weights.len()], None);
    let levels: Vec<i16> = weights.iter().map(|weight| weight.is_some().into()).collect();
    let weights: Vec<f64> = weights.iter().copied().flatten().collect();
    write_column::<DoubleType>(&mut group, &weights, Some(&levels));
    group.close().expect("all columns are written");
    writer.into_inner().expect("a whole file")
}

fn write_column<T: parquet::data_type::DataType>(
    group: &mut SerializedRowGroupWriter<'_, Vec<u8>>,
    values: &[T::T],
    levels: Option<&[i16]>,
) {
    let mut column = group.next_column().expect("a sound group").expect("a further column");
    column.typed::<T>().write_batch(values, levels, None).expect("values of the column's type");
    column.close().expect("a whole column");
}

#[test]
fn weights_are_a_column_and_where_it_is_null_an_item_has_none() {
    let folder = temp();
    let open = |weights: &[Option<f64>]| {
        let path = write(&folder, "items.parquet", file_with_weights(weights));
        Catalog::open(Path::new(&path))
    };
    let catalog = open(&[None, Some(2.5), Some(-1.0)]).expect("a sound file").snapshot();
    let leaf = catalog.cursor(&[7]).expect("the items' semantic ID");
    let items = catalog.items(leaf, 1).map(|item| (catalog.name(item), catalog.weight(item).get()));
    assert_eq!(items.collect::<Vec<_>>(), [("1", 2.5), ("0", 0.0), ("2", -1.0)]);
    for bad in [f64::NAN, f64::INFINITY, 1e300] {
        let error = open(&[None, Some(bad)]).err().expect("not finite in 32 bits").to_string();
        assert!(error.contains("row 1") && error.contains("weight"), "{error}");
    }
}

#[test]
fn a_damaged_parquet_file_is_an_error() {
    let folder = temp();
    let bytes = std::fs::read(models().join("catalogs/by_level.parquet")).expect("a file");
    let opened = |bytes: &[u8]| -> Result<(), Error> {
        let path = write(&folder, "items.parquet", bytes);
        Catalog::open(Path::new(&path)).map(|_| ())
    };
    assert!(opened(&bytes).is_ok());
    for len in (0..bytes.len()).step_by(7) {
        assert!(matches!(opened(&bytes[..len]), Err(Error::ItemsFile { .. })), "cut at {len}");
    }
}

/// Bytes changed, lost, put in, repeated or made large, each time another few.
fn damaged(sound: &[u8], rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for _ in 0..rng.usize(1..5) {
        // Half of the damage goes to the end, where the file says what it holds.
        let start = if rng.bool() { bytes.len() - bytes.len() / 3 } else { 0 };
        let at = rng.usize(start..bytes.len());
        match rng.u8(0..6) {
            0 => bytes[at] = rng.u8(..),
            1 => bytes[at] ^= 1 << rng.u8(0..8),
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, rng.u8(..)),
            4 => bytes[at] = 0xff,
            _ => {
                let from = rng.usize(0..bytes.len());
                let len = rng.usize(0..20).min(bytes.len() - at.max(from));
                bytes.copy_within(from..from + len, at);
            }
        }
    }
    bytes
}

#[test]
fn a_crafted_parquet_file_is_an_error_without_a_panic_and_its_report() {
    // A report would come from the hook that is set when the parser panics.
    static REPORTS: AtomicUsize = AtomicUsize::new(0);
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_some_and(|location| location.file().contains("parquet")) {
            REPORTS.fetch_add(1, Ordering::Relaxed);
        }
    }));
    let folder = temp();
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut sound, mut broken_off) = (0, 0);
    for name in ["by_level.parquet", "industrial.parquet"] {
        let bytes = std::fs::read(models().join("catalogs").join(name)).expect("a file");
        let rounds = if name.starts_with("by_level") { 20_000 } else { 300 };
        for round in 0..rounds {
            let path = write(&folder, "items.parquet", damaged(&bytes, &mut rng));
            match Catalog::open(Path::new(&path)) {
                Ok(_) => sound += 1,
                Err(error @ Error::ItemsFile { .. }) => {
                    broken_off += usize::from(error.to_string().contains("its parser broke off"));
                }
                Err(other) => panic!("{name}, round {round}: {other}"),
            }
        }
    }
    assert!(sound > 0 && broken_off > 0, "{sound} files are sound, {broken_off} panicked");
    assert_eq!(REPORTS.load(Ordering::Relaxed), 0);
}
