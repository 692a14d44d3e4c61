//! The committed header is what the source says.

use std::fs;
use std::path::Path;

/// Writes the header anew instead of comparing it.
const WRITE: &str = "SIDEREAL_WRITE_HEADER";

#[test]
fn the_header_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("a sound file");
    let sources =
        ["text", "error", "recommender", "request", "answer", "call", "catalog", "weights"];
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in sources {
        builder = builder.with_src(root.join(format!("src/{source}.rs")));
    }
    let mut made = Vec::new();
    builder.generate().expect("sources that cbindgen reads").write(&mut made);
    let path = root.join("include/sidereal.h");
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &made).expect("a writable folder");
    }
    let committed = fs::read(&path).unwrap_or_default();
    assert!(committed == made, "{} is old; run the test with {WRITE}=1", path.display());
}
