//! What several tests need.
#![allow(dead_code)] // each test file uses a part

pub mod cases;
pub mod tiny;
pub mod truth;
pub mod world;
