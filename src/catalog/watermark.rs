//! How far a feed has been applied: an offset for each partition of each source.
//!
//! A feed that delivers at least once repeats itself after a restart. A batch that carries a
//! watermark says where in its feed it ends; the catalog stores the furthest one of each partition
//! with the batch, so changes and watermark survive together, and a repeated batch is known.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The most bytes of a source's name.
const MAX_SOURCE_BYTES: usize = 255;
/// The most partitions of all sources: the catalog copies their offsets with each batch.
const MAX_PARTITIONS: usize = 4096;

/// The end of a batch in its feed. As text: `source/partition@offset`, such as `items/0@41`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watermark {
    /// The feed, such as a Kafka topic.
    pub source: String,
    /// The partition of the feed.
    pub partition: u32,
    /// The offset of the last message in the batch (not of the next one to read).
    pub offset: u64,
}

impl Watermark {
    /// The watermark of a partition of a source.
    pub fn new(source: impl Into<String>, partition: u32, offset: u64) -> Watermark {
        Watermark { source: source.into(), partition, offset }
    }
}

impl fmt::Display for Watermark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}@{}", self.source, self.partition, self.offset)
    }
}

impl FromStr for Watermark {
    type Err = Error;

    /// Reads `source/partition@offset`. The source may itself contain `/` and `@`.
    fn from_str(text: &str) -> Result<Watermark> {
        let parts = text.rsplit_once('@').and_then(|(before, offset)| {
            let (source, partition) = before.rsplit_once('/')?;
            Some(Watermark::new(source, partition.parse().ok()?, offset.parse().ok()?))
        });
        let watermark = parts.ok_or_else(|| Error::InvalidField {
            field: "watermark",
            reason: format!("{text:?} is not source/partition@offset, such as items/0@41"),
        })?;
        check_source(&watermark.source)?;
        Ok(watermark)
    }
}

fn check_source(source: &str) -> Result<()> {
    if (1..=MAX_SOURCE_BYTES).contains(&source.len()) {
        return Ok(());
    }
    let len = source.len();
    let reason = format!("the source has {len} bytes, 1 to {MAX_SOURCE_BYTES} are possible");
    Err(Error::InvalidField { field: "watermark", reason })
}

/// The furthest watermark of each partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watermarks {
    offsets: BTreeMap<String, BTreeMap<u32, u64>>,
}

impl Watermarks {
    /// The furthest offset of a partition, where there is one.
    pub fn offset(&self, source: &str, partition: u32) -> Option<u64> {
        self.offsets.get(source)?.get(&partition).copied()
    }

    /// Whether the catalog has the batch that ends at `watermark`.
    pub fn covers(&self, watermark: &Watermark) -> bool {
        let offset = self.offset(&watermark.source, watermark.partition);
        offset.is_some_and(|offset| watermark.offset <= offset)
    }

    /// The watermarks by source and partition.
    pub fn iter(&self) -> impl Iterator<Item = Watermark> + '_ {
        self.offsets.iter().flat_map(|(source, partitions)| {
            let watermark = move |(&partition, &offset)| Watermark::new(source, partition, offset);
            partitions.iter().map(watermark)
        })
    }

    /// The number of partitions of all sources.
    pub fn len(&self) -> usize {
        self.offsets.values().map(BTreeMap::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// Moves a partition's offset forward; one that is behind changes nothing.
    pub(crate) fn advance(&mut self, watermark: &Watermark) {
        let partitions = self.offsets.entry(watermark.source.clone()).or_default();
        let offset = partitions.entry(watermark.partition).or_default();
        *offset = watermark.offset.max(*offset);
    }

    /// The watermarks with one more.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for a source without a name or with a very long one;
    /// [`Error::LimitExceeded`] for more partitions than a catalog can have.
    pub(crate) fn with(&self, watermark: &Watermark) -> Result<Watermarks> {
        check_source(&watermark.source)?;
        let mut next = self.clone();
        next.advance(watermark);
        if next.len() > MAX_PARTITIONS {
            let (what, len) = ("partitions of watermarks", next.len());
            return Err(Error::LimitExceeded { what, len, max: MAX_PARTITIONS });
        }
        Ok(next)
    }

    /// The binary form of files and logs; empty where there are no watermarks.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        if self.is_empty() {
            return Vec::new();
        }
        let all: Vec<Watermark> = self.iter().collect();
        postcard::to_stdvec(&all).expect("a vector takes all bytes")
    }

    /// Reads the binary form.
    ///
    /// # Errors
    /// The reason why the bytes are not watermarks.
    pub(crate) fn from_bytes(bytes: &[u8]) -> std::result::Result<Watermarks, String> {
        let mut watermarks = Watermarks::default();
        if !bytes.is_empty() {
            let all: Vec<Watermark> = postcard::from_bytes(bytes)
                .map_err(|error| format!("the watermarks cannot be read ({error})"))?;
            all.iter().for_each(|watermark| watermarks.advance(watermark));
        }
        Ok(watermarks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watermark_reads_as_it_is_written() {
        for text in ["items/0@41", "a/b@c/4294967295@18446744073709551615"] {
            assert_eq!(text.parse::<Watermark>().expect("sound").to_string(), text);
        }
        for text in ["", "items", "items@1", "items/0", "items/x@1", "/0@1", "items/0@-1", "i/0@"] {
            let error = text.parse::<Watermark>().expect_err(text).to_string();
            assert!(error.contains("source"), "{error}");
        }
    }

    #[test]
    fn offsets_move_forward_only_and_bytes_keep_them() {
        let mut watermarks = Watermarks::default();
        assert_eq!(Watermarks::from_bytes(&watermarks.to_bytes()), Ok(watermarks.clone()));
        for (partition, offset) in [(0, 5), (1, 0), (0, 3)] {
            watermarks.advance(&Watermark::new("items", partition, offset));
        }
        assert_eq!(watermarks.offset("items", 0), Some(5));
        let covers =
            |partition, offset| watermarks.covers(&Watermark::new("items", partition, offset));
        assert!(covers(0, 5) && covers(0, 0) && covers(1, 0));
        assert!(!covers(0, 6) && !covers(1, 1) && !covers(2, 0));
        assert_eq!(Watermarks::from_bytes(&watermarks.to_bytes()), Ok(watermarks));
        assert!(Watermarks::from_bytes(b"\xff\xff").is_err());
    }

    #[test]
    fn the_number_of_partitions_is_bounded() {
        let mut watermarks = Watermarks::default();
        for partition in 0..MAX_PARTITIONS as u32 {
            watermarks.advance(&Watermark::new("items", partition, 0));
        }
        assert!(watermarks.with(&Watermark::new("items", 0, 9)).is_ok());
        let error = watermarks.with(&Watermark::new("prices", 0, 9)).expect_err("one too many");
        assert!(matches!(error, Error::LimitExceeded { .. }), "{error}");
        assert!(watermarks.with(&Watermark::new("", 0, 9)).is_err());
    }
}
