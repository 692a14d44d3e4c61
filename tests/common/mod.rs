//! What several tests need.
#![allow(dead_code)] // each test file uses a part

pub mod emulator;
pub mod kernels;
pub mod operations;
pub mod tiny;
pub mod truth;
pub mod walk;
