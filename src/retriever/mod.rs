//! Dense retrieval: the history becomes a query vector, and the best of the items' vectors come back.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `retriever` | the door: a folder, a catalog, requests in, answers out |
//! | `encoder` | histories become query vectors on a device |
//! | `item_rows` | which row of the item matrix an item is |

mod encoder;
mod item_rows;
#[allow(clippy::module_inception)] // the module's main type has the module's name
mod retriever;

pub use retriever::Retriever;
