//! Many strings in one array of bytes, and the index from a name to its number.

use xxhash_rust::xxh3::xxh3_64;

use super::column::Column;

/// Strings by number.
pub(super) struct Texts {
    pub bytes: Column<u8>,
    /// `[count + 1]`; string `i` is `bytes[start[i]..start[i + 1]]`, valid UTF-8.
    pub start: Column<u64>,
}

impl Texts {
    pub fn len(&self) -> usize {
        self.start.len() - 1
    }

    pub fn get(&self, index: u32) -> &str {
        let bytes = self.start[index as usize] as usize..self.start[index as usize + 1] as usize;
        std::str::from_utf8(&self.bytes[bytes]).expect("checked when the catalog was opened")
    }

    /// The first defect of arrays that come from a file.
    pub fn defect(&self, count: usize) -> Option<&'static str> {
        let covers = self.start.len() == count + 1
            && self.start[0] == 0
            && self.start[count] == self.bytes.len() as u64
            && self.start.is_sorted();
        if !covers {
            return Some("a table of texts does not cover its bytes");
        }
        // Each text must be whole: no boundary may split a character.
        let Ok(text) = std::str::from_utf8(&self.bytes) else {
            return Some("a text is not UTF-8");
        };
        let whole = self.start.iter().all(|&start| text.is_char_boundary(start as usize));
        (!whole).then_some("a text starts inside a character")
    }
}

/// Collects strings.
pub(super) struct TextsBuilder {
    bytes: Vec<u8>,
    start: Vec<u64>,
}

impl Default for TextsBuilder {
    fn default() -> TextsBuilder {
        TextsBuilder { bytes: Vec::new(), start: vec![0] }
    }
}

impl TextsBuilder {
    pub fn with_capacity(count: usize, bytes: usize) -> TextsBuilder {
        let mut start = Vec::with_capacity(count + 1);
        start.push(0);
        TextsBuilder { bytes: Vec::with_capacity(bytes), start }
    }

    pub fn push(&mut self, text: &str) {
        self.bytes.extend_from_slice(text.as_bytes());
        self.start.push(self.bytes.len() as u64);
    }

    pub fn len(&self) -> usize {
        self.start.len() - 1
    }

    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub fn get(&self, index: u32) -> &str {
        let bytes = self.start[index as usize] as usize..self.start[index as usize + 1] as usize;
        std::str::from_utf8(&self.bytes[bytes]).expect("pushed as a text")
    }

    pub fn finish(self) -> Texts {
        Texts { bytes: self.bytes.into(), start: self.start.into() }
    }
}

/// From a name to its number: a hash table with open addressing, four bytes a bucket.
pub(super) struct NameIndex {
    /// The number plus one, in the first bucket that was free from the name's home on; zero where
    /// free.
    pub buckets: Column<u32>,
}

/// Buckets for every three names: at least a quarter stay free, so probe sequences are short.
const BUCKETS_PER_THREE_NAMES: usize = 4;

impl NameIndex {
    /// The index of distinct names.
    ///
    /// # Errors
    /// The number of a name that occurs twice.
    pub fn build(names: &Texts) -> Result<NameIndex, u32> {
        let mut buckets = vec![0; num_buckets(names.len())];
        for number in 0..names.len() as u32 {
            let name = names.get(number);
            let mut bucket = home(hash(name), buckets.len());
            while buckets[bucket] != 0 {
                if names.get(buckets[bucket] - 1) == name {
                    return Err(number);
                }
                bucket = next(bucket, buckets.len());
            }
            buckets[bucket] = number + 1;
        }
        Ok(NameIndex { buckets: buckets.into() })
    }

    pub fn find(&self, names: &Texts, name: &str) -> Option<u32> {
        let mut bucket = home(hash(name), self.buckets.len());
        loop {
            let number = self.buckets[bucket].checked_sub(1)?;
            if names.get(number) == name {
                return Some(number);
            }
            bucket = next(bucket, self.buckets.len());
        }
    }

    /// The first defect of a table that comes from a file. Without one, every lookup ends.
    pub fn defect(&self, count: usize) -> Option<&'static str> {
        let fits = self.buckets.len() == num_buckets(count)
            && self.buckets.iter().all(|&bucket| bucket as usize <= count)
            && self.buckets.iter().filter(|&&bucket| bucket != 0).count() == count;
        (!fits).then_some("the index of names does not fit the names")
    }
}

pub(super) fn hash(name: &str) -> u64 {
    xxh3_64(name.as_bytes())
}

fn num_buckets(count: usize) -> usize {
    count * BUCKETS_PER_THREE_NAMES / 3 + 2
}

fn home(hash: u64, num_buckets: usize) -> usize {
    ((u128::from(hash) * num_buckets as u128) >> 64) as usize
}

fn next(bucket: usize, num_buckets: usize) -> usize {
    if bucket + 1 == num_buckets { 0 } else { bucket + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[String]) -> Texts {
        let mut builder = TextsBuilder::default();
        texts.iter().for_each(|text| builder.push(text));
        builder.finish()
    }

    #[test]
    fn every_name_is_found_and_no_other() {
        for count in [0, 1, 2, 3, 1000] {
            let names: Vec<String> = (0..count).map(|number| format!("item {number}")).collect();
            let texts = texts(&names);
            let index = NameIndex::build(&texts).expect("distinct names");
            assert_eq!((index.defect(count), texts.defect(count)), (None, None));
            for (number, name) in names.iter().enumerate() {
                assert_eq!(index.find(&texts, name), Some(number as u32));
            }
            assert_eq!(index.find(&texts, "another"), None);
        }
    }

    #[test]
    fn a_name_that_occurs_twice_is_an_error_with_its_number() {
        let names = texts(&["a".into(), "b".into(), "a".into()]);
        assert_eq!(NameIndex::build(&names).err(), Some(2));
    }
}
