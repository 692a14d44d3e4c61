#![no_main]

#[path = "../../common/fuzzed.rs"]
#[allow(dead_code)]
mod fuzzed;

thread_local! {
    static FOLDER: tempfile::TempDir = tempfile::tempdir().expect("a temporary folder");
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    FOLDER.with(|folder| fuzzed::torch(data, folder.path()));
});
