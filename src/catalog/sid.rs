//! A semantic ID: the few discrete codes that name an item.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};

/// The most levels of a semantic ID: a limit of the rank trie and its file.
pub const MAX_LEVELS: usize = 8;

/// The codes of one semantic ID, first level first.
///
/// The order is that of the codes. Within a catalog, all semantic IDs have one number of levels.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<u16>", into = "Vec<u16>")]
pub struct Sid {
    codes: [u16; MAX_LEVELS],
    num_levels: u8,
}

impl Sid {
    /// A semantic ID of 1 to [`MAX_LEVELS`] codes.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for another number of codes.
    pub fn new(codes: &[u16]) -> Result<Sid> {
        if codes.is_empty() || codes.len() > MAX_LEVELS {
            return Err(Error::InvalidField {
                field: "sid",
                reason: format!("has {} levels, 1 to {MAX_LEVELS} are possible", codes.len()),
            });
        }
        let mut sid = Sid { codes: [0; MAX_LEVELS], num_levels: codes.len() as u8 };
        sid.codes[..codes.len()].copy_from_slice(codes);
        Ok(sid)
    }

    /// Two codes made of a name, for an item that has none of its own: a model that writes phrases
    /// needs none.
    pub(crate) fn of_name(name: &str) -> Sid {
        let hash = xxh3_64(name.as_bytes());
        let codes = [(hash >> 16) as u16, hash as u16];
        Sid::new(&codes).expect("two codes are possible")
    }

    /// The codes, first level first.
    pub fn codes(&self) -> &[u16] {
        &self.codes[..usize::from(self.num_levels)]
    }

    /// The number of codes.
    pub fn num_levels(&self) -> usize {
        usize::from(self.num_levels)
    }
}

impl TryFrom<Vec<u16>> for Sid {
    type Error = Error;

    fn try_from(codes: Vec<u16>) -> Result<Sid> {
        Sid::new(&codes)
    }
}

impl From<Sid> for Vec<u16> {
    fn from(sid: Sid) -> Vec<u16> {
        sid.codes().to_vec()
    }
}

impl std::fmt::Debug for Sid {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:?}", self.codes())
    }
}
