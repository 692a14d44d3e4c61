//! A catalog that changes while it is searched: new items, tags, deleted items, snapshots.
//!
//! `cargo run --release --example catalog_changes`

use std::path::Path;
use std::sync::Arc;

use sidereal::catalog::{Catalog, Change, Item};
use sidereal::{CatalogWriter, Recommender, RecommenderOptions, Request, Result, WriterOptions};

/// Changes the catalog under a running engine.
///
/// # Errors
/// Those of the files, of the changes and of the requests.
pub fn main() -> Result<()> {
    let folder = Path::new("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
    // `CatalogWriter::open` changes a compiled file and logs each change beside it.
    let writer = CatalogWriter::in_memory(Arc::clone(&catalog), &WriterOptions::default())?;
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let recommender = Recommender::open(folder, Arc::clone(&catalog), &options)?;

    let request = Request::from_history(["550", "812", "1568"]).with_beams(20).with_top_k(3);
    let before = recommender.recommend(&request)?;
    let (best, second) = (&before.items[0], &before.items[1]);
    println!("snapshot {}: {} leads", before.snapshot.number(), best.item);

    // An item like the best one appears, with a tag; the second one is sold out for now.
    let mut successor = Item::new("successor", best.sid);
    successor.tags.push("new".into());
    let number = writer.apply(&[
        Change::Put(successor),
        Change::Delete { item: best.item.clone() },
        Change::Availability { item: second.item.clone(), available: false },
    ])?;

    let after = recommender.recommend(&request)?;
    println!("snapshot {}: {} leads", after.snapshot.number(), after.items[0].item);
    assert_eq!(after.snapshot.number(), number);
    assert_eq!((after.items[0].item.as_str(), after.items[0].score), ("successor", best.score));
    assert!(after.items.iter().all(|found| found.item != second.item));

    // Filters combine tags.
    let new = recommender.recommend(&request.clone().with_filter("tag:new"))?;
    assert_eq!(new.items.len(), 1);

    // A batch is applied as a whole or not at all: its second change has a level too many.
    let sid = sidereal::catalog::sid::Sid::new(&[1, 2, 3, 4])?;
    let refused = writer.apply(&[
        Change::Delete { item: "successor".into() },
        Change::Put(Item::new("misfit", sid)),
    ]);
    println!("refused: {}", refused.expect_err("the model writes three levels"));
    assert!(catalog.snapshot().find("successor").is_some());

    // An answer keeps the snapshot that it saw.
    assert!(before.snapshot.find(&best.item).is_some());
    Ok(())
}
