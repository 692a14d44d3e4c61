//! Files of items in Parquet, as pyarrow writes them.

use std::path::Path;

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
