//! `sidereal inspect`: what it says of a folder, and the file that it writes.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Map, Value, json};

#[path = "common/folders.rs"]
mod folders;

use folders::{Folder, QWEN3};

fn sidereal(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidereal"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.output().expect("the binary of this build")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A checkpoint whose levels are named by added tokens alone.
fn without_layout() -> Folder {
    let folder = Folder::of(QWEN3);
    let layout: Value = serde_json::from_slice(&folder.read("sidereal.json")).expect("JSON");
    let mut added = Map::new();
    for (name, level) in ["a", "b", "c"].iter().zip(layout["levels"].as_array().expect("levels")) {
        let first = level["first_token"].as_u64().expect("a token");
        for code in 0..level["size"].as_u64().expect("a size") {
            added.insert(format!("<{name}_{code}>"), json!(first + code));
        }
    }
    for extra in 0..3 {
        added.insert(format!("<extra_id_{extra}>"), json!(5 + extra));
    }
    folder.write("added_tokens.json", Value::from(added).to_string());
    folder.write("spiece.model", "not read");
    folder.remove("sidereal.json");
    folder
}

const CATALOG: &str = "models/catalogs/industrial.index.json";

fn plain(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn a_folder_without_a_layout_is_understood_and_the_file_is_written_once() {
    let folder = without_layout();
    let model = plain(folder.path());
    let request = r#"{"history": ["168"]}"#;
    let arguments =
        ["inspect", model, "--catalog", CATALOG, "--request", request, "--json", "--write"];
    let output = sidereal(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let templates: Vec<&str> = report["levels"]
        .as_array()
        .expect("levels")
        .iter()
        .map(|level| level["template"].as_str().expect("a template"))
        .collect();
    assert_eq!(templates, ["<a_{}>", "<b_{}>", "<c_{}>"]);
    assert_eq!(report["prompt"]["tokens"].as_array().map(Vec::len), Some(3));
    let prompt = report["prompt"]["text"].as_str().expect("texts of tokens");
    assert!(prompt.starts_with("<a_"), "{prompt}");
    let ignored = report["ignored"].to_string();
    for word in ["spiece.model", "save_pretrained", "<extra_id_{}>"] {
        assert!(ignored.contains(word), "{ignored}");
    }
    let written: Value = serde_json::from_slice(&folder.read("sidereal.json")).expect("JSON");
    assert_eq!(written["levels"][1]["template"], "<b_{}>");
    folder.open().expect("the file that was written");
    let again = sidereal(&arguments);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("kept"), "{}", text(&again.stderr));
    let shown = text(&sidereal(&["inspect", model, "--catalog", CATALOG]).stdout);
    for word in ["Qwen3ForCausalLM", "<a_{}> 256 codes", "catalog: "] {
        assert!(shown.contains(word), "{shown}");
    }
}

#[test]
fn the_first_complaint_is_about_what_stops_the_user() {
    let folder = Folder::of(QWEN3);
    folder.remove("sidereal.json");
    let requests = folder.write("requests.jsonl", "{\"history\": []}\n");
    let recommend = |model: &str| {
        let output = sidereal(&["recommend", "--model", model, "--requests", plain(&requests)]);
        assert_eq!(output.status.code(), Some(2));
        text(&output.stderr)
    };
    let missing = recommend(plain(folder.path()));
    assert!(missing.contains("there is no sidereal.json"), "{missing}");
    let hub = recommend("Qwen/Qwen3-0.6B");
    assert!(hub.contains("hf download Qwen/Qwen3-0.6B"), "{hub}");
    let unknown = sidereal(&["inspect", "models/industrial", "--write", "--project", "hstu"]);
    assert!(text(&unknown.stderr).contains("minionerec"), "{}", text(&unknown.stderr));
}

#[test]
fn the_file_that_fits_weights_of_grid_is_written_from_their_shapes() {
    let from = folders::models().join("t5/grid");
    let folder = folders::temp();
    std::fs::copy(from.join("last.ckpt"), folder.path().join("last.ckpt")).expect("a checkpoint");
    let model = plain(folder.path());
    let output = sidereal(&["inspect", model, "--project", "minionerec", "--write"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("weights of GRID"), "{}", text(&output.stderr));
    let written = folder.path().join("sidereal.json");
    assert!(!written.exists());
    let output = sidereal(&["inspect", model, "--project", "grid", "--write"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let read = |path: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
    };
    assert_eq!(read(&written), read(&from.join("sidereal.json")));
    let output = sidereal(&["inspect", model, "--write"]);
    assert!(text(&output.stderr).contains("is kept"), "{}", text(&output.stderr));
}
