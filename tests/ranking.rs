//! Ranking of candidates through its doors: company that changes nothing, tables in files of their own,
//! requests and folders that are wrong, the command line. That scores are the published network's own is
//! told by `golden.rs`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize};
use serde_json::{Map, Value, json};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Item};
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{Answer, Error, Ranker, RecommenderOptions, Request, Result};
use tempfile::TempDir;

const SMALL: &str = "models/dlrm_hstu/small";
const ODD: &str = "models/dlrm_hstu/odd";
const TABLE: &str = "_embedding_collection.embeddings.item_id.weight";

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn open(folder: &Path) -> Result<Ranker> {
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl")).expect("items"));
    Ranker::open(folder, catalog, &RecommenderOptions::new("cpu").with_threads(2))
}

fn request(fields: Value) -> Request {
    let Value::Object(fields) = fields else { panic!("a request is an object") };
    let line = RequestLine::from_fields(fields).expect("a request");
    line.to_request(&RequestDefaults::default()).expect("a request")
}

/// A request that the small folder answers.
fn small() -> Value {
    json!({
        "history": [
            {"item": "3", "time": 1000, "action": 3, "category": 2},
            {"item": "7", "time": 5000, "action": 0, "category": 4}
        ],
        "candidates": [{"item": "1", "category": 0}, {"item": "2", "category": 3}],
        "time": 9000,
        "features": {"user_id": 4, "country": 1}
    })
}

fn scores(answer: &Answer) -> HashMap<&str, Vec<f32>> {
    let of_item =
        |found: &sidereal::Recommendation| found.tasks.iter().map(|task| task.score).collect();
    answer.items.iter().map(|found| (&*found.item, of_item(found))).collect()
}

/// A copy of a folder, to be changed.
fn copy(case: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["sidereal.json", "model.safetensors", "items.jsonl"] {
        std::fs::copy(root(case).join(name), folder.path().join(name)).expect("a checkpoint");
    }
    folder
}

/// The tensors of a folder, in f32.
fn tensors(folder: &Path) -> HashMap<String, (Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(folder.join("model.safetensors")).expect("a checkpoint");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let own = |(name, view): (String, TensorView<'_>)| {
        (name, (view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(own).collect()
}

fn write_tensors(folder: &Path, tensors: &HashMap<String, (Vec<usize>, Vec<u8>)>) {
    let view = |(name, (shape, data)): (&String, &(Vec<usize>, Vec<u8>))| {
        (name.clone(), (Dtype::F32, shape.clone(), data.clone()))
    };
    let owned: Vec<_> = tensors.iter().map(view).collect();
    let views = owned.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).expect("a tensor"))
    });
    let bytes = serialize(views, None).expect("tensors");
    std::fs::write(folder.join("model.safetensors"), bytes).expect("a writable folder");
}

/// A file of `numpy.save`.
fn npy(rows: usize, columns: usize, bytes: &[u8]) -> Vec<u8> {
    let header =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let header = format!("{header:<117}\n");
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(bytes);
    file
}

/// A folder like `odd` with this many rows of items, in a file of their own, and a catalog of as many
/// items.
fn wide(num_items: usize, max_items: usize) -> (TempDir, Arc<Catalog>) {
    let folder = copy(ODD);
    let mut all = tensors(folder.path());
    let (shape, _) = all.remove(TABLE).expect("the items");
    let mut rng = fastrand::Rng::with_seed(9);
    let mut rows: Vec<u8> = Vec::new();
    for _ in 0..num_items * shape[1] {
        rows.extend((rng.f32() - 0.5).to_le_bytes());
    }
    write_tensors(folder.path(), &all);
    std::fs::create_dir(folder.path().join("tables")).expect("a writable folder");
    let path = folder.path().join("tables/item_id.npy");
    std::fs::write(path, npy(num_items, shape[1], &rows)).expect("a writable folder");
    let mut layout = layout(folder.path());
    layout["max_items"] = json!(max_items);
    std::fs::write(folder.path().join("sidereal.json"), layout.to_string()).expect("writable");
    let mut builder = CatalogBuilder::default();
    for item in 0..num_items as u16 {
        let sid = Sid::new(&[item / 64, item % 64]).expect("a semantic ID");
        builder.add(Item::new(item.to_string(), sid)).expect("a new item");
    }
    (folder, Arc::new(builder.build().expect("a catalog")))
}

fn layout(folder: &Path) -> Value {
    let text = std::fs::read(folder.join("sidereal.json")).expect("a file");
    serde_json::from_slice(&text).expect("JSON")
}

/// A history and candidates that take several passes each.
#[test]
fn a_candidate_scores_the_same_alone_and_among_two_thousand() {
    let (folder, catalog) = wide(2500, 1300);
    let open = |threads| {
        let options = RecommenderOptions::new("cpu").with_threads(threads);
        Ranker::open(folder.path(), Arc::clone(&catalog), &options).expect("a folder")
    };
    let (one, two) = (open(1), open(2));
    let mut rng = fastrand::Rng::with_seed(4);
    for num_history in [0, 1, 511, 512, 513, 1300] {
        let history: Vec<Value> = (0..num_history)
            .map(|at| json!({"item": rng.usize(0..2500), "time": 100 * at}))
            .collect();
        let candidates: Vec<usize> = rng.choose_multiple(0..2500, 2048);
        let of = |candidates: &[usize]| {
            let fields = json!({"history": history, "candidates": candidates, "time": 200_000});
            request(fields)
        };
        let all = two.recommend(&of(&candidates)).expect("a sound request");
        assert_eq!(all.items.len(), 2048);
        assert!(all.items.is_sorted_by(|a, b| a.score >= b.score));
        let all = scores(&all);
        for &candidate in candidates.iter().take(5).chain(candidates.iter().rev().take(5)) {
            let alone = one.recommend(&of(&[candidate])).expect("a sound request");
            let alone = scores(&alone);
            let name = candidate.to_string();
            assert_eq!(alone[&*name], all[&*name], "{name} behind {num_history}");
        }
    }
}

#[test]
fn a_table_in_a_file_gives_the_scores_of_a_tensor() {
    let folder = copy(SMALL);
    let expected = open(folder.path()).expect("a folder").recommend(&request(small()));
    let mut all = tensors(folder.path());
    let (shape, bytes) = all.remove(TABLE).expect("the items");
    write_tensors(folder.path(), &all);
    let error = open(folder.path()).err().expect("no table").to_string();
    assert!(error.contains(TABLE) && error.contains("tables/item_id.npy"), "{error}");
    std::fs::create_dir(folder.path().join("tables")).expect("a writable folder");
    let path = folder.path().join("tables/item_id.npy");
    std::fs::write(&path, npy(shape[0], shape[1], &bytes)).expect("a writable folder");
    let found = open(folder.path()).expect("a folder").recommend(&request(small()));
    assert_eq!(found.expect("a sound request"), expected.expect("a sound request"));
    std::fs::write(&path, npy(shape[0] / 2, 2 * shape[1], &bytes)).expect("a writable folder");
    let error = open(folder.path()).err().expect("other columns").to_string();
    assert!(error.contains("item_id") || error.contains("category"), "{error}");
}

/// Numbers beyond a table are errors, unless the folder says that they are hashed.
#[test]
fn hashed_numbers_are_taken_modulo_the_rows() {
    let folder = copy(SMALL);
    let with_user = |user: i64| {
        let mut fields = small();
        fields["features"]["user_id"] = json!(user);
        request(fields)
    };
    let ranker = open(folder.path()).expect("a folder");
    let error = ranker.recommend(&with_user(9)).expect_err("9 rows").to_string();
    assert!(error.contains("user_id") && error.contains("0 to 8"), "{error}");
    assert!(ranker.recommend(&with_user(-1)).is_err());
    let mut layout = layout(folder.path());
    layout["hashed"] = json!(["user_id"]);
    std::fs::write(folder.path().join("sidereal.json"), layout.to_string()).expect("writable");
    let hashed = open(folder.path()).expect("a folder");
    let expected = ranker.recommend(&with_user(4)).expect("a row");
    for user in [4, 13, -5, 4 + 9 * 1_000_000_007] {
        let found = hashed.recommend(&with_user(user)).expect("any number");
        assert_eq!(found.items, expected.items, "{user}");
    }
}

#[test]
fn what_a_folder_knows_of_items_stands_in_for_what_a_request_leaves_out() {
    let folder = copy(SMALL);
    let mut bare = small();
    bare["candidates"] = json!(["1", "2"]);
    let error = open(folder.path()).expect("a folder").recommend(&request(bare.clone()));
    let error = error.expect_err("no category").to_string();
    assert!(error.contains("category") && error.contains("item_features.jsonl"), "{error}");
    let known = "{\"item\": \"1\", \"category\": 0}\n\n{\"item\": \"2\", \"category\": 3}\n";
    std::fs::write(folder.path().join("item_features.jsonl"), known).expect("writable");
    let ranker = open(folder.path()).expect("a folder");
    let found = ranker.recommend(&request(bare)).expect("a sound request");
    assert_eq!(found.items, ranker.recommend(&request(small())).expect("the same").items);
    std::fs::write(folder.path().join("item_features.jsonl"), "{\"item\": 5}\n").expect("writable");
    let error = open(folder.path()).err().expect("a name is a text").to_string();
    assert!(error.contains("item_features.jsonl") && error.contains("line 1"), "{error}");
}

#[test]
fn requests_that_are_wrong_are_told_what_is_missing() {
    let ranker = open(&root(SMALL)).expect("a folder");
    let refusal = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut fields = small();
        change(fields.as_object_mut().expect("an object"));
        match ranker.recommend(&request(fields)) {
            Err(error) => error.to_string(),
            Ok(answer) => panic!("answered with {answer:?}"),
        }
    };
    let set = |field: &'static str, value: Value| {
        refusal(&|fields| drop(fields.insert(field.into(), value.clone())))
    };
    let without = |field: &'static str| refusal(&|fields| drop(fields.remove(field)));
    for (error, words) in [
        (without("time"), ["time", "1700000000"]),
        (without("candidates"), ["candidates", "this network scores"]),
        (set("history", json!(["3"])), ["history", "\"category\""]),
        (set("history", json!([{"item": "3", "category": 1}])), ["history", "\"time\""]),
        (
            set("history", json!([{"item": "3", "category": 1, "time": 5}])),
            ["history", "\"action\""],
        ),
        (
            set("history", json!([{"item": "3", "category": 9, "time": 5, "action": 1}])),
            ["category", "0 to 4"],
        ),
        (
            set("history", json!([{"item": "3", "category": "x", "time": 5, "action": 1}])),
            ["category", "whole number"],
        ),
        (
            set("history", json!([{"item": "300", "category": 1, "time": 5, "action": 1}])),
            ["300", "0 to 29"],
        ),
        (
            set("history", json!([{"item": "x", "category": 1, "time": 5, "action": 1}])),
            ["history", "x"],
        ),
        (set("features", json!({"user_id": 1.5})), ["user_id", "1.5"]),
        (set("filter", json!("tag:a")), ["filter", "search"]),
        (set("seed", json!(4)), ["seed", "search"]),
        (
            refusal(&|fields| {
                fields.remove("history");
                fields.insert("tokens".into(), json!([4]));
            }),
            ["history", "tokens"],
        ),
    ] {
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    }
    // What is not known of the user is a row without an embedding.
    let mut fields = small();
    fields["features"] = json!({});
    assert!(ranker.recommend(&request(fields)).is_ok());
    // Candidates that the catalog does not have are left out and told, once each.
    let mut fields = small();
    fields["candidates"] =
        json!([{"item": "1", "category": 0}, {"item": "zzz"}, {"item": "1", "category": 2}]);
    let answer = ranker.recommend(&request(fields.clone())).expect("one is known");
    assert_eq!(answer.items.len(), 1);
    assert_eq!(answer.unknown_items.candidates.names, ["zzz"]);
    fields["unknown_items"] = json!("error");
    assert!(matches!(ranker.recommend(&request(fields)), Err(Error::UnknownItem { .. })));
    let features = sidereal::Features::default().with_history(vec![Map::new()]);
    let uneven = request(small()).with_features(features);
    let error = ranker.recommend(&uneven).expect_err("one of two").to_string();
    assert!(error.contains("2 entries and features of 1"), "{error}");
}

#[test]
fn a_folder_that_lacks_something_says_what() {
    let refusal = |change: &dyn Fn(&mut Map<String, Value>)| {
        let folder = copy(SMALL);
        let mut layout = layout(folder.path());
        change(layout.as_object_mut().expect("an object"));
        std::fs::write(folder.path().join("sidereal.json"), layout.to_string()).expect("writable");
        match open(folder.path()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{layout} was taken"),
        }
    };
    for key in ["num_heads", "max_items", "attention_divisor", "item_features", "tasks", "action"] {
        let error = refusal(&|layout| drop(layout.remove(key)));
        assert!(error.contains(&format!("{key:?}")), "{key}: {error}");
    }
    let with = |key: &'static str, value: Value, word: &str| {
        let error = refusal(&|layout| drop(layout.insert(key.into(), value.clone())));
        assert!(error.contains(word), "{key}: {error}");
    };
    with("num_heads", json!(5), "5 heads do not fit");
    with("item_features", json!(["item_id"]), "network for 1 more");
    with("item_features", json!(["item_id", "category", "color"]), "color");
    with("context_features", json!(["user_id"]), "_batched_contextual_linear_weights");
    with("context_features", json!([4]), "context_features");
    with("action_bits", json!([1, 2]), "3 actions");
    with("attention_divisor", json!(0), "attention_divisor");
    with("tasks", json!([]), "tasks");
    with("tasks", json!([{"name": "a", "kind": "value"}, {"name": "b"}]), "probabilities first");
    with("hashed", json!(["item"]), "hashed");
    with("familly", json!("x"), "familly");
    let error = refusal(&|layout| drop(layout.insert("tasks".into(), json!([{"name": "one"}]))));
    assert!(error.contains("_prediction_module"), "{error}");
    assert!(Ranker::serves(&root(SMALL)).expect("a folder"));
    assert!(!Ranker::serves(&root("models/hstu/small")).expect("a folder"));
}

fn sidereal(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidereal"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary of this build");
    let mut stdin = child.stdin.take().expect("piped");
    // A child that refuses its arguments ends before it has read anything.
    let _ = std::io::Write::write_all(&mut stdin, input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("the child ends")
}

#[test]
fn the_command_line_ranks_and_evaluates() {
    let mut line = small();
    line["target"] = json!("2");
    let output = sidereal(&["rank", "--model", SMALL, "--requests", "-"], &line.to_string());
    assert!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("a line of JSON");
    let expected = open(&root(SMALL)).expect("a folder").recommend(&request(small()));
    for (line, found) in
        answer["items"].as_array().expect("items").iter().zip(expected.expect("sound").items)
    {
        assert_eq!(line["item"], found.item.as_str());
        for task in &found.tasks {
            let score = line["tasks"][&*task.task].as_f64().map(|score| score as f32);
            assert_eq!(score, Some(task.score), "{line}");
        }
    }
    let output = sidereal(&["evaluate", "--model", SMALL, "--requests", "-"], &line.to_string());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("NDCG"), "{output:?}");
    let output = sidereal(&["inspect", SMALL, "--json"], "");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["family"], "dlrm_hstu");
    assert_eq!(report["tasks"][2], json!({"name": "seconds", "is_probability": false}));
    // Other doors say where such a folder belongs.
    for command in ["recommend", "retrieve"] {
        let output = sidereal(&[command, "--model", SMALL, "--requests", "-"], &line.to_string());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("sidereal rank"), "{command}: {text}");
    }
}
