//! Dense retrieval through its doors: filters, changes of the catalog, folders that are wrong, the
//! command line. That vectors and scores are the published networks' own is told by `golden.rs`, and
//! that the best of a matrix are those of brute force by `src/vectors/top_products.rs`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use serde_json::{Value, json};
use sidereal::catalog::{Catalog, Change};
use sidereal::{
    Answer, CatalogWriter, Error, Input, NamedToken, RecommenderOptions, Request, Result,
    Retriever, UnknownItems, WriterOptions,
};
use tempfile::TempDir;

const SASREC: &str = "models/sasrec/recbole-small";

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn open_with(folder: &Path, catalog: Arc<Catalog>) -> Result<Retriever> {
    Retriever::open(folder, catalog, &RecommenderOptions::new("cpu").with_threads(2))
}

fn catalog_of(folder: &Path) -> Arc<Catalog> {
    Arc::new(Catalog::open(&folder.join("items.jsonl")).expect("items"))
}

fn open(folder: &Path) -> Result<Retriever> {
    open_with(folder, catalog_of(folder))
}

fn names(answer: &Answer) -> Vec<(String, f32)> {
    answer.items.iter().map(|found| (found.item.clone(), found.score)).collect()
}

fn history() -> Request {
    Request::from_history(["i7", "i14", "i3"]).with_top_k(1000)
}

#[test]
fn filters_exclusions_and_lists_leave_the_rest_in_its_order() {
    let retriever = open(&root(SASREC)).expect("a checkpoint");
    let all = names(&retriever.recommend(&history()).expect("a sound request"));
    assert_eq!(all.len(), 40);
    let snapshot = retriever.catalog().snapshot();
    let is_even = |name: &str| {
        snapshot.tags(snapshot.find(name).expect("an item")).contains(&"even".to_string())
    };
    let mut rng = fastrand::Rng::with_seed(8);
    for _ in 0..200 {
        let mut request = history().with_top_k(rng.usize(1..50));
        let mut expected = all.clone();
        if rng.bool() {
            let negated = rng.bool();
            request = request.with_filter(if negated { "!tag:even" } else { "tag:even" });
            expected.retain(|(name, _)| is_even(name) != negated);
        }
        let mut some = || {
            let count = rng.usize(0..12);
            (0..count).map(|_| all[rng.usize(..40)].0.clone()).collect::<Vec<_>>()
        };
        let (excluded, only) = (some(), some());
        expected.retain(|(name, _)| !excluded.contains(name));
        request = request.with_exclude(excluded);
        if rng.bool() {
            expected.retain(|(name, _)| only.contains(name));
            request = request.with_only(only);
        }
        if rng.bool() {
            expected.retain(|(name, _)| !["i7", "i14", "i3"].contains(&&**name));
            request = request.with_exclude_history(true);
        }
        expected.truncate(request.top_k);
        let answer = retriever.recommend(&request).expect("a sound request");
        assert_eq!(names(&answer), expected, "{request:?}");
    }
    let groups = history().with_groups(["tag:even", "!tag:even"]).with_top_k(3);
    let answer = retriever.recommend(&groups).expect("a sound request");
    for (group, is_wanted) in answer.groups.iter().zip([true, false]) {
        let best = all.iter().filter(|(name, _)| is_even(name) == is_wanted).take(3);
        let found = group.items.iter().map(|found| &found.item);
        assert!(found.eq(best.map(|(name, _)| name)), "{}", group.filter);
    }
}

#[test]
fn items_appear_and_vanish_with_the_catalog() {
    let folder = root(SASREC);
    let catalog = catalog_of(&folder);
    let retriever = open_with(&folder, Arc::clone(&catalog)).expect("a checkpoint");
    let writer = CatalogWriter::in_memory(catalog, &WriterOptions::default()).expect("a thread");
    let all = names(&retriever.recommend(&history()).expect("a sound request"));
    let (best, second) = (all[0].0.clone(), all[1].0.clone());
    let gone = [
        Change::Delete { item: best.clone() },
        Change::Availability { item: second.clone(), available: false },
    ];
    writer.apply(&gone).expect("sound changes");
    let found = names(&retriever.recommend(&history()).expect("a sound request"));
    assert_eq!(found, all[2..]);
    // What is not available is not ranked, and what is deleted is unknown.
    let candidates = history().with_candidates([&*best, &*second, &*all[5].0]);
    let ranked = retriever.recommend(&candidates).expect("a sound request");
    assert_eq!(names(&ranked), all[5..6]);
    assert_eq!(ranked.unknown_items.candidates.names, [&*best]);
    // An item without a vector never comes back; one that returns has its own.
    let put = |name: &str| {
        let item = json!({"put": {"item": name, "sid": [1, 99]}});
        serde_json::from_value::<Change>(item).expect("a change")
    };
    writer.apply(&[put("stranger"), put(&best)]).expect("sound changes");
    let found = names(&retriever.recommend(&history()).expect("a sound request"));
    assert_eq!(found[0], all[0]);
    assert_eq!(found[1..], all[2..]);
    let request = history().with_candidates(["stranger", &best]);
    let ranked = retriever.recommend(&request).expect("a sound request");
    assert_eq!(names(&ranked), all[..1]);
    assert_eq!(ranked.unknown_items.candidates.names, ["stranger"]);
    let strict = retriever.recommend(&request.with_unknown_items(UnknownItems::Error));
    assert!(matches!(strict, Err(Error::UnknownItem { field: "candidates", .. })));
}

#[test]
fn requests_that_no_vector_answers_are_refused() {
    let retriever = open(&root(SASREC)).expect("a checkpoint");
    let field = |request: Request| match retriever.recommend(&request) {
        Err(Error::InvalidField { field, .. }) => field,
        other => panic!("{request:?} gave {other:?}"),
    };
    assert_eq!(field(Request::from_tokens([1, 2])), "tokens");
    assert_eq!(field(history().with_seed(7)), "seed");
    assert_eq!(field(history().with_log_probs(true)), "log_probs");
    assert_eq!(field(history().with_temperature(0.5)), "temperature");
    assert_eq!(field(history().with_per_sid(1)), "per_sid");
    assert_eq!(field(history().with_read([NamedToken::Id(3)])), "read");
    assert_eq!(field(history().with_candidates(["i7"]).with_filter("all")), "filter");
    assert_eq!(field(history().with_filter("tag:")), "filter");
    let none = retriever.recommend(&Request::new(Input::History(Vec::new())));
    assert!(matches!(none, Err(Error::EmptyInput)));
    let unknown = retriever.recommend(&Request::from_history(["nobody"]));
    assert!(matches!(unknown, Err(Error::UnknownItem { field: "history", .. })));
    assert!(matches!(retriever.recommend(&history().with_top_k(0)), Err(Error::TopK { .. })));
    let many = vec!["i7"; 5000];
    let many = retriever.recommend(&history().with_candidates(many));
    assert!(matches!(many, Err(Error::LimitExceeded { .. })));

    // Only the newest items are read, and unknown ones among them left out.
    let long: Vec<String> = (0..20).map(|at| format!("i{}", at % 40 + 1)).collect();
    let cut = retriever.recommend(&Request::from_history(&long[..])).expect("a sound request");
    let newest = Request::from_history(&long[long.len() - retriever.max_items()..]);
    assert_eq!(cut.items, retriever.recommend(&newest).expect("a sound request").items);
    assert_eq!(cut.skipped_items, 20 - retriever.max_items());
    let with_unknown = Request::from_history(["i7", "nobody", "i14", "i3"]).with_top_k(1000);
    let answer = retriever.recommend(&with_unknown).expect("a sound request");
    assert_eq!(answer.unknown_items.history.names, ["nobody"]);
    assert_eq!(answer.items, retriever.recommend(&history()).expect("a sound request").items);
}

/// A copy of a folder, to be damaged.
fn copy(case: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["sidereal.json", "model.safetensors", "item_rows.json", "items.jsonl"] {
        std::fs::copy(root(case).join(name), folder.path().join(name)).expect("a checkpoint");
    }
    folder
}

fn refusal(case: &str, damage: impl Fn(&Path, &mut Value)) -> String {
    let folder = copy(case);
    let path = folder.path().join("sidereal.json");
    let text = std::fs::read(&path).expect("a file");
    let mut layout: Value = serde_json::from_slice(&text).expect("JSON");
    damage(folder.path(), &mut layout);
    std::fs::write(&path, layout.to_string()).expect("a writable folder");
    match open(folder.path()) {
        Ok(_) => panic!("{case} was taken with {layout}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_folder_that_lacks_something_says_what() {
    const PMIXER: &str = "models/sasrec/pmixer-after";
    let without = |case: &str, key: &str| {
        let error =
            refusal(case, |_, layout| drop(layout.as_object_mut().expect("an object").remove(key)));
        assert!(error.contains(&format!("{key:?} is missing")), "{error}");
    };
    without(SASREC, "num_heads");
    without("models/bert4rec/small", "num_heads");
    without(PMIXER, "norm_first");
    without("models/gru4rec/small", "max_items");
    let with = |key: &str, value: Value, expected: &str| {
        let error = refusal(SASREC, |_, layout| layout[key] = value.clone());
        assert!(error.contains(expected), "{error}");
    };
    with("num_heads", json!(5), "does not divide 12 columns");
    with("num_heads", json!(0), "num_heads");
    with("family", json!("sasrecs"), "\"sasrecs\"");
    with("family", json!("gru4rec"), "\"max_items\" is missing");
    with("hidden_act", json!("sinus"), "sinus");
    with("metric", json!("cosine"), "\"dot\" and \"l2\"");
    with("window", json!(3), "\"window\"");
    with("items", json!("elsewhere.json"), "elsewhere.json is missing");
    let rows = |rows: Value, expected: &str| {
        let error = refusal(SASREC, |folder, _| {
            std::fs::write(folder.join("item_rows.json"), rows.to_string()).expect("writable");
        });
        assert!(error.contains(expected), "{error}");
    };
    rows(json!(["i7"]), "the padding's");
    rows(json!({"i7": 41}), "41 rows");
    rows(json!({"i7": 1, "i14": 1}), "row 1");
    rows(json!([null, "i7", "i7"]), "two rows");
    rows(json!([null]), "names no item");
    rows(json!("i7"), "item_rows.json");
    let error = refusal(SASREC, |folder, _| {
        std::fs::write(folder.join("model.safetensors"), b"damaged").expect("writable");
    });
    assert!(error.contains("model.safetensors"), "{error}");
    let error = refusal(SASREC, |folder, _| {
        let other = root("models/gru4rec/small/model.safetensors");
        std::fs::copy(other, folder.join("model.safetensors")).expect("a checkpoint");
    });
    assert!(error.contains("position_embedding.weight"), "{error}");
    assert!(!Retriever::serves(&root("models/t5/relu-tied")).expect("a folder"));
    assert!(matches!(
        open_with(&root("models/t5/relu-tied"), catalog_of(&root(SASREC))),
        Err(Error::Unsupported { .. })
    ));
}

/// An embedding that is beyond f32 once the network has scaled it.
#[test]
fn a_history_without_a_finite_vector_fails_alone() {
    let folder = copy("models/sasrec/pmixer-before");
    let path = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("a checkpoint");
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).expect("a header");
    let items = &header["item_emb.weight"];
    let columns = items["shape"][1].as_u64().expect("a number") as usize;
    let start = 8 + len + items["data_offsets"][0].as_u64().expect("a number") as usize;
    let row = &mut bytes[start + 4 * columns..start + 8 * columns];
    row.chunks_exact_mut(4).for_each(|number| number.copy_from_slice(&3e38f32.to_le_bytes()));
    std::fs::write(&path, bytes).expect("writable");
    let rows = std::fs::read(folder.path().join("item_rows.json")).expect("a file");
    let rows: Value = serde_json::from_slice(&rows).expect("JSON");
    let name = match &rows {
        Value::Array(names) => names[1].as_str().expect("a name"),
        rows => {
            let mut rows = rows.as_object().expect("an object").iter();
            rows.find(|(_, row)| **row == json!(1)).expect("the first row").0
        }
    };
    let retriever = open(folder.path()).expect("finite weights");
    let other = ["i7", "i14", "i3"].map(|item| if item == name { "i20" } else { item });
    let sound = Request::from_history(other).with_exclude([name]);
    let requests = [sound.clone(), Request::from_history([name, other[0]]), sound];
    let mut answers = retriever.recommend_all(&requests).into_iter();
    let mut next = || answers.next().expect("an answer for each");
    let first = next().expect("a sound request");
    assert!(matches!(next(), Err(Error::NonFiniteScores { .. })));
    assert_eq!(first.items, next().expect("a sound request").items);
    assert!(matches!(retriever.query_vector(&requests[1]), Err(Error::NonFiniteScores { .. })));
}

/// A file of `numpy.save`.
fn npy(rows: usize, columns: usize, values: &[f32]) -> Vec<u8> {
    let header =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let header = format!("{header:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

#[test]
fn items_may_have_vectors_of_their_own() {
    let mut rng = fastrand::Rng::with_seed(21);
    let values: Vec<f32> = (0..41 * 12).map(|_| 2.0 * rng.f32() - 1.0).collect();
    for metric in ["dot", "l2"] {
        let folder = copy(SASREC);
        std::fs::write(folder.path().join("vectors.npy"), npy(41, 12, &values)).expect("writable");
        let layout = json!({"family": "sasrec", "num_heads": 2, "item_vectors": "vectors.npy",
            "metric": metric});
        std::fs::write(folder.path().join("sidereal.json"), layout.to_string()).expect("writable");
        let retriever = open(folder.path()).expect("a folder");
        let query = retriever.query_vector(&history()).expect("a sound request");
        let text = std::fs::read(folder.path().join("item_rows.json")).expect("a file");
        let names: Vec<Option<String>> = serde_json::from_slice(&text).expect("a list");
        let mut expected: Vec<(f64, &str)> = values
            .chunks_exact(12)
            .zip(&names)
            .filter_map(|(row, name)| {
                let pairs = query.iter().zip(row).map(|(a, b)| (f64::from(*a), f64::from(*b)));
                let score = match metric {
                    "dot" => pairs.map(|(a, b)| a * b).sum(),
                    _ => -pairs.map(|(a, b)| (a - b) * (a - b)).sum::<f64>(),
                };
                Some((score, name.as_deref()?))
            })
            .collect();
        expected.sort_by(|a, b| b.0.total_cmp(&a.0));
        let answer = retriever.recommend(&history()).expect("a sound request");
        assert_eq!(answer.items.len(), expected.len());
        for (found, (score, name)) in answer.items.iter().zip(expected) {
            assert_eq!(found.item, name, "{metric}");
            assert!((f64::from(found.score) - score).abs() < 1e-4, "{metric}: {name}");
        }
    }
    let error = refusal(SASREC, |folder, layout| {
        std::fs::write(folder.join("vectors.npy"), npy(40, 12, &values[12..])).expect("writable");
        layout["item_vectors"] = json!("vectors.npy");
    });
    assert!(error.contains("40 x 12"), "{error}");
}

/// What PyTorch measured on the trained checkpoints is what the same rows give here.
#[test]
fn trained_networks_find_what_their_training_framework_finds() {
    let catalog = Arc::new(Catalog::open(&root("models/industrial/items.jsonl")).expect("items"));
    let text = std::fs::read_to_string(root("models/industrial/test.jsonl")).expect("the rows");
    let rows: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for network in ["sasrec", "hstu"] {
        let folder = root("models/retrieval").join(network);
        let retriever = open_with(&folder, Arc::clone(&catalog)).expect("a checkpoint");
        let request = |row: &Value| {
            let history = row["history"].as_array().expect("a history").iter();
            Request::from_history(history.map(|item| item.as_str().expect("a name"))).with_top_k(10)
        };
        let (mut found, mut gain) = (0, 0.0);
        for rows in rows.chunks(256) {
            let requests: Vec<Request> = rows.iter().map(request).collect();
            for (row, answer) in rows.iter().zip(retriever.recommend_all(&requests)) {
                let items = answer.expect("a sound request").items;
                if let Some(rank) = items.iter().position(|item| row["target"] == *item.item) {
                    found += 1;
                    gain += 1.0 / (rank as f64 + 2.0).log2();
                }
            }
        }
        let text = std::fs::read(folder.join("metrics.json")).expect("the metrics");
        let metrics: Value = serde_json::from_slice(&text).expect("JSON");
        for (name, value) in [("recall_at_10", f64::from(found)), ("ndcg_at_10", gain)] {
            let (found, expected) = (value / rows.len() as f64, metrics[name].as_f64());
            let difference = (found - expected.expect("a number")).abs();
            // Two items whose scores are equal but for rounding may change places.
            assert!(difference < 3e-4, "{network}: {name} is {found}, not {expected:?}");
        }
    }
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
fn the_command_line_retrieves_ranks_and_evaluates() {
    let requests = "{\"id\": \"u1\", \"history\": [\"i7\", \"i14\", \"i3\"], \"target\": \"i20\"}\n\
                    {\"id\": \"u2\", \"history\": [], \"target\": \"i20\"}\n\
                    {\"id\": \"u3\", \"history\": [\"i1\"], \"candidates\": [\"i20\", \"i2\"], \"target\": \"i2\"}\n";
    let retriever = open(&root(SASREC)).expect("a checkpoint");
    let output = sidereal(
        &["retrieve", "--model", SASREC, "--requests", "-", "--top-k", "5", "--threads", "1"],
        requests,
    );
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let lines: Vec<Value> = output
        .stdout
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).expect("JSON lines"))
        .collect();
    assert_eq!(lines.len(), 3);
    let best = retriever.recommend(&history().with_top_k(5)).expect("a sound request");
    let found = lines[0]["items"].as_array().expect("items");
    assert_eq!(found.len(), 5);
    for (line, found) in found.iter().zip(&best.items) {
        assert_eq!(line["item"], found.item.as_str());
        assert_eq!(line["score"].as_f64().map(|score| score as f32), Some(found.score));
    }
    assert_eq!(lines[1]["error"]["code"], "empty_input");
    assert_eq!(lines[2]["items"].as_array().map(Vec::len), Some(2));

    let ranked = sidereal(&["rank", "--model", SASREC, "--requests", "-"], requests);
    let text = String::from_utf8_lossy(&ranked.stdout).into_owned();
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(text.lines().next().is_some_and(|line| line.contains("candidates")), "{text}");
    let third: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
    assert_eq!(third["items"], lines[2]["items"]);

    let first = requests.lines().next().expect("a line");
    let arguments = ["evaluate", "--model", SASREC, "--requests", "-", "--at", "40", "--json"];
    let report = sidereal(&arguments, first);
    let report: Value = serde_json::from_slice(&report.stdout).expect("a report");
    assert_eq!(report["by_item"]["recall_at_40"], 1.0, "{report}");
    assert!(report.get("beams").is_none(), "{report}");

    let table =
        sidereal(&["retrieve", "--model", SASREC, "--requests", "-", "--format", "table"], first);
    assert!(!String::from_utf8_lossy(&table.stdout).contains("probability"), "{table:?}");

    let inspected = sidereal(&["inspect", SASREC], "");
    assert!(inspected.status.success(), "{inspected:?}");
    let text = String::from_utf8_lossy(&inspected.stdout).into_owned();
    assert!(text.contains("gives vectors") && text.contains("[41,12]"), "{text}");
    for (arguments, expected) in [
        (["recommend", "--model", SASREC, "--requests", "-"], "sidereal retrieve"),
        (["retrieve", "--model", "models/industrial", "--requests", "-"], "sidereal recommend"),
        (["evaluate", "--model", SASREC, "--requests=-", "--widths=5"], "--widths"),
        (["retrieve", "--model", SASREC, "--requests=-", "--device=cuda"], "cpu"),
    ] {
        let output = sidereal(&arguments, requests);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}
