//! Doors of networks that write no semantic IDs: dense retrieval, in which the history becomes a query
//! vector and the best of the items' vectors come back, and ranking, in which candidates are scored.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `retriever` | the door: a folder, a catalog, requests in, answers out |
//! | `encoder` | histories become query vectors on a device |
//! | `ranker` | the door of ranking |
//! | `scorer` | candidates become scores on a device |
//! | `item_rows` | which row of the item matrix an item is |

mod encoder;
mod item_rows;
mod ranker;
#[allow(clippy::module_inception)] // the module's main type has the module's name
mod retriever;
mod scorer;

pub use ranker::Ranker;
pub use retriever::Retriever;
