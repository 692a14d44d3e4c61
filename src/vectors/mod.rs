//! Items as vectors: the matrix that query vectors are scored against, and the exact best of it.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `matrix` | the items' vectors, mapped from the folder's file |
//! | `top_products` | the best rows for each query vector |
//! | `products` | the inner loops |
//! | `codes` | a copy in 8 bits, by which most rows are ruled out |

mod codes;
mod matrix;
mod products;
mod top_products;

pub use matrix::{ItemMatrix, Metric};
pub use top_products::{Found, Rows, score_rows, top_products};
