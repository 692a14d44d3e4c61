//! The demo model is worth what its folder says.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn evaluation_equals_that_of_the_training_framework() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/industrial");
    let expected = std::fs::read(folder.join("metrics.json")).expect("the framework's figures");
    let expected: Value = serde_json::from_slice(&expected).expect("JSON");
    let output = Command::new(env!("CARGO_BIN_EXE_sidereal"))
        .args(["evaluate", "--beams", "20", "--json", "--model"])
        .arg(&folder)
        .arg("--requests")
        .arg(folder.join("test.jsonl"))
        .output()
        .expect("the binary of this build");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(found["requests"], expected["rows"]);
    for kind in ["by_sid", "by_item"] {
        let metrics = expected[kind].as_object().expect("six figures");
        assert_eq!(metrics.len(), 6);
        for (name, expected) in metrics {
            let expected = expected.as_f64().expect("a number");
            let found = found[kind][name].as_f64().expect("a number");
            assert!((found - expected).abs() < 0.0005, "{kind} {name}: {found}, not {expected}");
        }
    }
}
