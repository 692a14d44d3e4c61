//! The command line is a contract: scripts rely on what it prints and how it ends.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use sidereal::Request;

#[path = "common/folders.rs"]
mod folders;

use folders::{Folder, temp, write};

const MODEL: &str = "models/decoder_only/qwen3-tied";
const CATALOG: &str = "models/catalogs/industrial.index.json";

fn sidereal(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidereal"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(arguments: &[&str]) -> Output {
    run_with(arguments, b"")
}

fn run_with(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = sidereal(arguments).spawn().expect("the binary of this build");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input).expect("the child reads or has ended");
    drop(stdin);
    let output = child.wait_with_output().expect("the child ends");
    assert!(!errors(&output).contains("panicked"), "{}", errors(&output));
    output
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("an exit code")
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn lines(bytes: &[u8]) -> Vec<Value> {
    let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).expect("JSON lines")).collect()
}

/// The lines as they are, each with its end.
fn raw_lines(bytes: &[u8]) -> Vec<&[u8]> {
    bytes.split_inclusive(|&byte| byte == b'\n').collect()
}

fn items(line: &Value) -> &[Value] {
    line["items"].as_array().expect("an answer with items")
}

fn names(line: &Value) -> Vec<&str> {
    items(line).iter().map(|item| item["item"].as_str().expect("a name")).collect()
}

fn plain(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn recommend(input: &[u8], more: &[&str]) -> Output {
    let fixed = ["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"];
    run_with(&[&fixed[..], more].concat(), input)
}

/// Answers of a model of few tokens, whose catalog is found beside it.
fn recommend_small(small: &Folder, input: &str, more: &[&str]) -> Vec<Value> {
    let fixed = ["recommend", "--model", plain(small.path()), "--requests", "-"];
    let output = run_with(&[&fixed[..], more].concat(), input.as_bytes());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    lines(&output.stdout)
}

fn request_lines(count: usize) -> String {
    let mut rng = fastrand::Rng::with_seed(5);
    let line = |id| {
        let history: Vec<String> =
            (0..rng.usize(1..9)).map(|_| rng.u32(0..3686).to_string()).collect();
        json!({"id": id, "history": history, "beams": rng.usize(1..40)}).to_string() + "\n"
    };
    (0..count).map(line).collect()
}

/// A program that writes a line and waits for its answer gets it.
#[test]
fn lines_are_answered_as_they_come() {
    for command in ["recommend", "rank"] {
        let arguments = [command, "--model", MODEL, "--catalog", CATALOG, "--requests", "-"];
        let mut child = sidereal(&arguments).spawn().expect("the binary of this build");
        let mut stdin = child.stdin.take().expect("piped");
        let mut answers = BufReader::new(child.stdout.take().expect("piped")).lines();
        for id in 0..4 {
            let line = json!({"id": id, "history": ["1"], "candidates": ["2"], "beams": 4});
            let line = if id == 2 { r#"{"id": 2, "beams": "x"}"#.into() } else { line.to_string() };
            writeln!(stdin, "{line}").expect("the child reads");
            stdin.flush().expect("the child reads");
            let answer = answers.next().expect("an answer").expect("text");
            let answer: Value = serde_json::from_str(&answer).expect("JSON");
            assert_eq!((&answer["id"], answer.get("error").is_some()), (&json!(id), id == 2));
        }
        drop(stdin);
        assert!(answers.next().is_none());
        assert_eq!(child.wait().expect("the child ends").code(), Some(1));
    }
}

/// More lines than are held at a time, some of them bad, long and blank.
#[test]
fn answers_come_in_the_order_of_their_lines() {
    let mut input = String::new();
    for id in 0..1500 {
        match id % 7 {
            0 => input += &format!("{{\"id\": {id}, \"history\": []}}\n\n"),
            1 => input += &format!("{{\"id\": {id}, \"nonsense\": 1}}\n"),
            _ => input += &format!("{{\"id\": {id}, \"history\": [\"{id}\"], \"beams\": 2}}\n"),
        }
    }
    let output = recommend(input.as_bytes(), &[]);
    assert_eq!(code(&output), 1, "{}", errors(&output));
    let ids: Vec<u64> =
        lines(&output.stdout).iter().map(|line| line["id"].as_u64().expect("an id")).collect();
    assert_eq!(ids, (0..1500).collect::<Vec<u64>>());
}

#[cfg(target_os = "linux")]
#[test]
fn an_output_that_fails_ends_a_command_whose_input_goes_on() {
    let mut full =
        sidereal(&["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"]);
    full.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it"));
    let mut child = full.spawn().expect("the binary of this build");
    // The input stays open: the command does not wait for its end.
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(b"{\"history\": [\"1\"], \"beams\": 2}\n").expect("the child reads");
    let status = child.wait().expect("the child ends");
    drop(stdin);
    assert_eq!(status.code(), Some(2));
}

// Catalogs.

#[test]
fn a_catalog_is_built_and_inspected() {
    let folder = temp();
    let path = folder.path().join("c.sidereal");
    for _ in 0..2 {
        // The second time over the first.
        let arguments = ["catalog", "build", "--items", CATALOG, "--output", plain(&path)];
        let built = run(&arguments);
        assert_eq!((code(&built), built.stdout.len()), (0, 0), "{}", errors(&built));
        let beside = std::fs::read_dir(folder.path()).expect("the folder").count();
        assert_eq!(beside, 1, "only the catalog is left behind");
    }
    let inspected = run(&["catalog", "inspect", plain(&path), "--json"]);
    assert_eq!(code(&inspected), 0, "{}", errors(&inspected));
    let summary: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    for (key, value) in [
        ("items", json!(3686)),
        ("sids", json!(3670)),
        ("levels", json!(3)),
        ("codes_in_use", json!([48, 256, 256])),
        ("collisions", json!(31)),
        ("largest_collision", json!(3)),
        ("file_bytes", json!(std::fs::metadata(&path).expect("the catalog").len())),
    ] {
        assert_eq!(summary[key], value, "{key}");
    }
    let trie_bytes = summary["trie_bytes"].as_f64().expect("a number");
    assert!(trie_bytes > 0.0);
    assert_eq!(summary["trie_bytes_per_item"].as_f64(), Some(trie_bytes / 3686.0));
    let text = run(&["catalog", "inspect", plain(&path)]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("3670 of 3 levels"));

    // A file of items tells the same, less the size that it does not have.
    let of_items = run(&["catalog", "inspect", CATALOG, "--json"]);
    let mut of_items: Value = serde_json::from_slice(&of_items.stdout).expect("JSON");
    assert_eq!(of_items["file_bytes"], Value::Null);
    of_items["file_bytes"] = summary["file_bytes"].clone();
    assert_eq!(of_items, summary);

    let requests = request_lines(5);
    let arguments = ["recommend", "--model", MODEL, "--catalog", plain(&path), "--requests", "-"];
    let compiled = run_with(&arguments, requests.as_bytes());
    assert_eq!(compiled.stdout, recommend(requests.as_bytes(), &[]).stdout);
}

#[test]
fn a_catalog_is_changed_and_answers_with_what_is_there_now() {
    let small = Folder::small();
    let path = small.path().join("catalog.sidereal");
    let items_file = small.path().join("items.jsonl");
    let build = ["catalog", "build", "--items", plain(&items_file), "--output", plain(&path)];
    assert_eq!(code(&run(&build)), 0);
    let line = json!({"history": ["i3", "i4"], "groups": ["tag:new", "!tag:new"]}).to_string();
    let wide = ["--beams", "216", "--top-k", "1000"];
    let before = recommend_small(&small, &line, &wide).remove(0);
    assert_eq!(before["groups"][0], json!({"filter": "tag:new", "items": []}));
    assert_eq!(before["items"], json!([]));
    let old = before["groups"][1]["items"].as_array().expect("the others").len();
    assert_eq!(old, small.catalog().num_items());

    let changes = small.write(
        "changes.jsonl",
        "{\"put\": {\"item\": \"fresh\", \"sid\": [5, 5, 5], \"tags\": [\"new\"], \"title\": \"A lamp\"}}\n\
         {\"tag\": {\"item\": \"i7\", \"add\": [\"new\"]}}\n\n\
         {\"delete\": {\"item\": \"i8\"}}\n{\"delete\": {\"item\": \"unheard of\"}}\n\
         {\"availability\": {\"item\": \"i9\", \"available\": false}}\n",
    );
    let change = ["catalog", "change", plain(&path), "--changes", plain(&changes)];
    let changed = run(&change);
    assert_eq!(code(&changed), 0, "{}", errors(&changed));
    assert!(errors(&changed).contains("5 changes applied (1 named"), "{}", errors(&changed));
    // From the log first, then from the file compiled anew: the answers are the same.
    let mut answers = Vec::new();
    for compact in [false, true] {
        if compact {
            small.write("none.jsonl", "");
            let none = small.path().join("none.jsonl");
            let change =
                ["catalog", "change", plain(&path), "--changes", plain(&none), "--compact"];
            assert_eq!(code(&run(&change)), 0);
        }
        let inspected = run(&["catalog", "inspect", plain(&path), "--json"]);
        let summary: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
        assert_eq!(summary["snapshot"], 2);
        assert_eq!(summary["items"], old);
        assert_eq!(summary["unavailable"], 1);
        // One item is new, one replaced, one gone: what is there and what is compiled are counted
        // apart.
        assert_eq!(summary["compiled_items"], old);
        let since = if compact { (0, 0) } else { (2, 2) };
        assert_eq!(summary["put"], since.0);
        assert_eq!(summary["deleted"], since.1);
        assert_eq!(summary["changed"] == 0, compact);
        let text = run(&["catalog", "inspect", plain(&path)]);
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        assert_eq!(text.contains("since then 2 put, 2 deleted or replaced"), !compact, "{text}");
        let answer = recommend_small(&small, &line, &wide).remove(0);
        let mut new = names(&answer["groups"][0]);
        new.sort_unstable();
        assert_eq!(new, ["fresh", "i7"]);
        let rest = names(&answer["groups"][1]);
        assert_eq!(rest.len(), old - 3);
        assert!(!rest.contains(&"i8") && !rest.contains(&"i9"));
        assert_eq!(answer["snapshot"], 2);
        // What is not available may stand in a history; what was deleted may not.
        let lines = "{\"history\": [\"i9\"], \"filter\": \"tag:new\"}\n{\"history\": [\"i8\"]}\n";
        let arguments = ["recommend", "--model", plain(small.path()), "--requests", "-"];
        let output = run_with(&arguments, lines.as_bytes());
        assert_eq!(code(&output), 1);
        let lines = self::lines(&output.stdout);
        assert_eq!(names(&lines[0]).len(), 2);
        assert_eq!(lines[1]["error"]["code"], "unknown_item");
        answers.push(answer);
    }
    assert_eq!(answers[0], answers[1]);
    // A catalog with changes beside it is not built over.
    small.write("changes.jsonl", "{\"delete\": {\"item\": \"i1\"}}");
    assert_eq!(code(&run(&change)), 0);
    let built = run(&build);
    assert_eq!(code(&built), 2);
    assert!(errors(&built).contains("--compact"), "{}", errors(&built));
}

#[test]
fn items_of_one_sid_come_by_weight_as_many_as_are_asked_for_and_repeats_change_nothing() {
    let small = Folder::small();
    let path = small.path().join("catalog.sidereal");
    let items_file = small.path().join("items.jsonl");
    let build = ["catalog", "build", "--items", plain(&items_file), "--output", plain(&path)];
    assert_eq!(code(&run(&build)), 0);
    let put = |name: &str, weight: f32| json!({"put": {"item": name, "sid": [5, 5, 5], "tags": ["twin"], "weight": weight}});
    let changes = [put("a", 0.0), put("b", 2.0), put("c", 0.0)].map(|line| line.to_string() + "\n");
    let changes = small.write("changes.jsonl", changes.concat());
    let change = ["catalog", "change", plain(&path), "--changes", plain(&changes)];
    let ask = |fields: &str, more: &[&str]| {
        let line = format!("{{\"history\": [\"i3\"], \"filter\": \"tag:twin\"{fields}}}\n");
        let answer =
            recommend_small(&small, &line, &[&["--beams", "216"], more].concat()).remove(0);
        assert_eq!(answer["snapshot"], 2);
        names(&answer).join(" ")
    };
    for _ in 0..3 {
        assert_eq!(code(&run(&change)), 0);
        assert_eq!(ask("", &[]), "b a c");
    }
    assert_eq!(ask("", &["--per-sid", "2"]), "b a");
    assert_eq!(ask(", \"per_sid\": 1", &["--per-sid", "2"]), "b");
    assert_eq!(ask(", \"per_sid\": 2, \"top_k\": 1", &[]), "b");
    assert_eq!(ask(", \"per_sid\": 2, \"exclude\": [\"b\"]", &[]), "a c");
    assert_eq!(ask(", \"shared_sid\": \"all\"", &["--per-sid", "2"]), "b a c");
    assert_eq!(ask(", \"min_snapshot\": 2", &[]), "b a c");
    let inspected = run(&["catalog", "inspect", plain(&path), "--json"]);
    let summary: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert_eq!((&summary["weighted"], &summary["put"]), (&json!(1), &json!(3)));

    small.write("changes.jsonl", "{\"weight\": {\"item\": \"c\", \"weight\": 3}}\n");
    assert_eq!(code(&run(&change)), 0);
    let lines = "{\"history\": [\"i3\"], \"filter\": \"tag:twin\", \"min_snapshot\": 3}\n\
                 {\"history\": [\"i3\"], \"min_snapshot\": 4}\n{\"history\": [\"i3\"], \"per_sid\": 0}\n";
    let arguments = ["recommend", "--model", plain(small.path()), "--requests", "-"];
    let output = run_with(&arguments, lines.as_bytes());
    assert_eq!(code(&output), 1);
    let lines = self::lines(&output.stdout);
    assert_eq!(names(&lines[0]), ["c", "b", "a"]);
    assert_eq!(lines[1]["error"]["code"], "catalog_behind");
    let message = lines[1]["error"]["message"].as_str().expect("a text");
    assert!(message.contains("snapshot 3") && message.contains("for 4"), "{message}");
    assert_eq!(lines[2]["error"]["code"], "invalid_field");
    let refused = run_with(&[&arguments[..], &["--per-sid", "0"]].concat(), b"");
    assert_eq!(code(&refused), 2, "{}", errors(&refused));
}

#[test]
fn a_bad_line_of_changes_changes_nothing() {
    let small = Folder::small();
    let path = small.path().join("c.sidereal");
    let items_file = small.path().join("items.jsonl");
    run(&["catalog", "build", "--items", plain(&items_file), "--output", plain(&path)]);
    for (bad, words) in [
        ("{\"put\": {\"item\": \"x\"}}", "sid"),
        ("{\"put\": {\"item\": \"x\", \"sid\": [1]}}", "1 levels"),
        ("{\"remove\": {\"item\": \"x\"}}", "unknown variant"),
        ("delete i1", "line 2"),
    ] {
        let text = format!("{{\"delete\": {{\"item\": \"i1\"}}}}\n{bad}\n");
        let changes = small.write("changes.jsonl", text);
        let changed = run(&["catalog", "change", plain(&path), "--changes", plain(&changes)]);
        assert_eq!(code(&changed), 2, "{bad}");
        assert!(errors(&changed).contains(words), "{bad}: {}", errors(&changed));
        let inspected = run(&["catalog", "inspect", plain(&path), "--json"]);
        let summary: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
        assert_eq!(summary["snapshot"], 1, "{bad}");
    }
}

#[test]
fn codebooks_are_fitted_and_items_assigned_and_built() {
    let folder = temp();
    let mut rng = fastrand::Rng::with_seed(6);
    let values: Vec<u8> = (0..300 * 4).flat_map(|_| rng.f32().to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![300, 4], &values);
    let view = view.expect("a consistent tensor");
    let bytes = safetensors::serialize([("embeddings", view)], None).expect("a plain tensor");
    let embeddings = write(&folder, "e.safetensors", bytes);
    let names: String = (0..300).map(|item| format!("item {item}\n")).collect();
    let names = write(&folder, "names.txt", names);
    let at = |name: &str| folder.path().join(name);
    let (codebooks, items, catalog) = (at("rq.safetensors"), at("items.jsonl"), at("c.sidereal"));
    let fit = |output: &Path| {
        let from = ["catalog", "fit", "--embeddings", plain(&embeddings), "--levels", "2"];
        run(&[&from[..], &["--codes", "16", "--output", plain(output)]].concat())
    };
    let fitted = fit(&codebooks);
    assert_eq!(code(&fitted), 0, "{}", errors(&fitted));
    assert_eq!(code(&fit(&at("again.safetensors"))), 0);
    let read = |path: &Path| std::fs::read(path).expect("codebooks");
    assert_eq!(read(&codebooks), read(&at("again.safetensors")), "equal seeds, equal codebooks");
    let assigned =
        run(
            &[
                &[
                    "catalog",
                    "assign",
                    "--embeddings",
                    plain(&embeddings),
                    "--names",
                    plain(&names),
                ][..],
                &[
                    "--codebooks",
                    plain(&codebooks),
                    "--collisions",
                    "append",
                    "--output",
                    plain(&items),
                ],
            ]
            .concat(),
        );
    assert_eq!(code(&assigned), 0, "{}", errors(&assigned));
    let build = ["catalog", "build", "--items", plain(&items), "--output", plain(&catalog)];
    assert_eq!(code(&run(&build)), 0);
    let inspected = run(&["catalog", "inspect", plain(&catalog), "--json"]);
    let summary: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert_eq!((&summary["items"], &summary["sids"]), (&json!(300), &json!(300)));
    assert_eq!(summary["levels"], 3);

    let short = write(&folder, "short.txt", "one\ntwo\n");
    let assigned =
        run(
            &[
                &[
                    "catalog",
                    "assign",
                    "--embeddings",
                    plain(&embeddings),
                    "--names",
                    plain(&short),
                ][..],
                &["--codebooks", plain(&codebooks), "--output", plain(&items)],
            ]
            .concat(),
        );
    assert_eq!(code(&assigned), 2);
    assert!(errors(&assigned).contains("2 lines for 300"), "{}", errors(&assigned));
    let wrong = run(&["catalog", "fit", "--embeddings", plain(&names), "--output", plain(&items)]);
    assert_eq!(code(&wrong), 2);
}

#[test]
fn a_bench_compares_latency_with_and_without_changes() {
    let arguments = ["bench", "--model", "models/industrial", "--history", "3", "--beams", "4"];
    let churn = ["--repeat", "2", "--threads", "1", "--churn", "5000", "--json"];
    let output = run(&[&arguments[..], &churn].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["requests"], 64);
    assert_eq!(report["churn"]["items"], 3686);
    assert!(report["churn"]["p99_ratio"].as_f64().is_some_and(|ratio| ratio > 0.0));
    let output = run(&[&arguments[..], &["--churn", "0"]].concat());
    assert_eq!(code(&output), 2);
    assert!(errors(&output).contains("above zero"), "{}", errors(&output));
}

#[test]
fn a_catalog_is_not_built_over_a_file_of_items() {
    let folder = temp();
    let path = folder.path().join("c.json");
    let built = run(&["catalog", "build", "--items", CATALOG, "--output", plain(&path)]);
    assert_eq!(code(&built), 2);
    assert!(errors(&built).contains("items.sidereal"), "{}", errors(&built));
    assert!(!path.exists());
}

#[test]
fn a_catalog_is_not_built_over_its_own_items() {
    let folder = temp();
    let line = "{\"item\": \"1\", \"sid\": [1, 2, 3]}\n";
    let path = write(&folder, "items.txt", line);
    let built = run(&["catalog", "build", "--items", plain(&path), "--output", plain(&path)]);
    let left = std::fs::read(&path).expect("the items");
    assert_eq!((code(&built), left == line.as_bytes()), (2, true), "the items must be left");
    assert!(errors(&built).contains("items.txt"), "{}", errors(&built));
}

#[test]
fn bad_files_of_items_end_with_two_and_leave_the_catalog() {
    let folder = temp();
    for (line, word) in [("{\"item\": \"1\"}", "line 1"), ("", "no items"), ("nonsense", "line 1")]
    {
        let path = write(&folder, "items.jsonl", line);
        let old = write(&folder, "c.sidereal", "the old one");
        let built = run(&["catalog", "build", "--items", plain(&path), "--output", plain(&old)]);
        assert_eq!(code(&built), 2);
        assert!(errors(&built).contains(word), "{}", errors(&built));
        assert_eq!(std::fs::read(&old).expect("the old one"), b"the old one");
        let inspected = run(&["catalog", "inspect", plain(&old)]);
        assert_eq!(code(&inspected), 2);
        assert!(errors(&inspected).contains("catalog build"), "{}", errors(&inspected));
    }
}

// Requests and answers.

#[test]
fn every_line_is_answered_in_its_place() {
    let good = [
        r#"{"id": "u1", "history": ["17", "4"], "top_k": 3}"#,
        r#"{"id": 7, "history": [17], "beams": 5, "exclude": ["4"]}"#,
        r#"{"tokens": [1, 200, 300], "beams": 2}"#,
    ];
    let too_long = json!({"id": "b5", "tokens": vec![5; 2047]}).to_string();
    let bad: [(&[u8], Value, &str, &str); 9] = [
        (
            b"{\"id\": \"b1\", \"history\": [\"no such item\"]}",
            json!("b1"),
            "unknown_item",
            "no such item",
        ),
        (b"{\"id\": \"b2\", \"beams\": \"ten\"}", json!("b2"), "malformed_request", "ten"),
        (b"not json", Value::Null, "malformed_request", "JSON object"),
        (b"{\"id\": \"\xff\"}", Value::Null, "malformed_request", "utf-8"),
        (too_long.as_bytes(), json!("b5"), "history_too_long", "2046"),
        (b"{\"id\": 6.5, \"history\": []}", json!(6.5), "empty_input", "at least one"),
        (b"{\"id\": -7, \"tokens\": [1], \"top_k\": 0}", json!(-7), "top_k", "at least 1"),
        (
            b"{\"id\": 8, \"history\": [17], \"filter\": \"a\"}",
            json!(8),
            "invalid_field",
            "tag:name",
        ),
        (b"{\"id\": 9, \"tokens\": [1], \"beams\": 4097}", json!(9), "beam_width", "4096"),
    ];
    let mut mixed: Vec<u8> = Vec::new();
    for (at, good) in good.iter().enumerate() {
        for (bad, ..) in &bad[3 * at..3 * at + 3] {
            mixed.extend_from_slice(bad);
            mixed.extend_from_slice([&b"\n"[..], b"\n  \n", b"\r\n\t\r\n"][at]);
        }
        mixed.extend_from_slice(good.as_bytes());
        mixed.push(b'\n');
    }
    mixed.pop(); // the last line may lack its end
    let mixed = recommend(&mixed, &[]);
    assert_eq!(code(&mixed), 1, "{}", errors(&mixed));
    let clean = recommend(good.join("\n").as_bytes(), &[]);
    assert_eq!(code(&clean), 0, "{}", errors(&clean));
    let (mixed_lines, clean_lines) = (raw_lines(&mixed.stdout), raw_lines(&clean.stdout));
    assert_eq!(mixed_lines.len(), 12);
    for (at, clean) in clean_lines.iter().enumerate() {
        assert_eq!(mixed_lines[4 * at + 3], *clean, "a good line among bad ones");
    }
    let failed = (0..12).filter(|line| line % 4 < 3).map(|line| mixed_lines[line]);
    for (line, (_, id, code, word)) in failed.zip(&bad) {
        let line: Value = serde_json::from_slice(line).expect("a line of JSON");
        assert_eq!((&line["id"], line["error"]["code"].as_str()), (id, Some(*code)), "{line}");
        let message = line["error"]["message"].as_str().expect("a text");
        assert!(message.contains(word), "{message}");
        assert!(line.get("items").is_none());
    }
    // Where an id is missing, the line's number in the file finds it.
    let third: Value = serde_json::from_slice(mixed_lines[2]).expect("a line of JSON");
    assert_eq!(third["line"], 3);
    let clean = lines(&clean.stdout);
    let ids: Vec<&Value> = clean.iter().map(|line| &line["id"]).collect();
    assert_eq!(ids, [&json!("u1"), &json!(7), &Value::Null]);
    assert_eq!(items(&clean[0]).len(), 3);
    assert!(!names(&clean[1]).contains(&"4"));
}

#[test]
fn only_bad_lines_are_some_failed_and_no_lines_are_none() {
    let failed = recommend(b"nonsense\n", &[]);
    assert_eq!((code(&failed), lines(&failed.stdout).len()), (1, 1));
    for nothing in ["", "\n", " \n\t\n"] {
        let output = recommend(nothing.as_bytes(), &[]);
        assert_eq!((code(&output), output.stdout.len()), (0, 0), "{}", errors(&output));
    }
}

#[test]
fn a_file_and_the_standard_input_are_answered_alike_wherever_the_answers_go() {
    let folder = temp();
    let requests = request_lines(4);
    let piped = recommend(requests.as_bytes(), &[]);
    assert_eq!((code(&piped), lines(&piped.stdout).len()), (0, 4));
    // Lines may end as they do on Windows.
    let requests = write(&folder, "r.jsonl", requests.replace('\n', "\r\n"));
    let fixed = ["recommend", "--model", MODEL, "--catalog", CATALOG];
    let from_file = ["--requests", plain(&requests)];
    assert_eq!(run(&[&fixed[..], &from_file].concat()).stdout, piped.stdout);
    let answers = folder.path().join("answers.jsonl");
    let to_file = ["--output", plain(&answers)];
    let filed = run(&[&fixed[..], &from_file, &to_file].concat());
    assert_eq!((code(&filed), filed.stdout.len()), (0, 0), "{}", errors(&filed));
    assert_eq!(std::fs::read(&answers).expect("the answers"), piped.stdout);
}

#[test]
fn a_dash_is_the_standard_input_and_output() {
    let folder = temp();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/industrial");
    let arguments = ["recommend", "--model", plain(&model), "--requests", "-", "--output", "-"];
    for _ in 0..2 {
        let mut command = sidereal(&arguments);
        let mut child =
            command.current_dir(folder.path()).spawn().expect("the binary of this build");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(b"{\"history\": [\"168\"]}\n").expect("the child reads");
        drop(stdin);
        let output = child.wait_with_output().expect("the child ends");
        assert_eq!((code(&output), lines(&output.stdout).len()), (0, 1), "{}", errors(&output));
    }
    let mut left = std::fs::read_dir(folder.path()).expect("a folder");
    assert!(left.next().is_none(), "no file is named -");
}

#[test]
fn requests_are_not_overwritten_by_their_answers() {
    let folder = temp();
    let requests = request_lines(3);
    let path = write(&folder, "r.jsonl", &requests);
    let fixed = ["recommend", "--model", MODEL, "--catalog", CATALOG];
    let files = ["--requests", plain(&path), "--output", plain(&path)];
    let output = run(&[&fixed[..], &files].concat());
    let left = std::fs::read(&path).expect("the requests");
    let is_left = left == requests.as_bytes();
    assert_eq!((code(&output), is_left), (2, true), "the requests must be left");
    assert!(errors(&output).contains("r.jsonl"), "{}", errors(&output));
}

#[test]
fn old_answers_are_left_where_nothing_can_run() {
    let folder = temp();
    let answers = write(&folder, "answers.jsonl", "old");
    let missing = folder.path().join("missing.jsonl");
    for (model, requests) in [("no/such/folder", "-"), (MODEL, plain(&missing))] {
        let fixed = ["recommend", "--model", model, "--catalog", CATALOG];
        let files = ["--requests", requests, "--output", plain(&answers)];
        assert_eq!(code(&run(&[&fixed[..], &files].concat())), 2);
        assert_eq!(std::fs::read(&answers).expect("the answers"), b"old", "{requests}");
    }
}

#[test]
fn scores_are_given_in_full_precision() {
    let answers = lines(&recommend(request_lines(3).as_bytes(), &[]).stdout);
    let mut engine = Folder::of(folders::QWEN3).open().expect("a sound checkpoint");
    for (line, request) in answers.iter().zip(lines(request_lines(3).as_bytes())) {
        let history = request["history"].as_array().expect("a history").iter();
        let history = history.map(|item| item.as_str().expect("a name"));
        let mut asked = Request::from_history(history.collect::<Vec<_>>());
        asked.beams = request["beams"].as_u64().expect("a width") as usize;
        let expected = engine.recommend(&asked).expect("a sound request").items;
        assert_eq!(items(line).len(), expected.len());
        for (item, expected) in items(line).iter().zip(expected) {
            assert_eq!(item["item"], expected.item);
            assert_eq!(item["sid"], json!(expected.sid.codes()));
            let text = item["score"].to_string();
            let score: f32 = text.parse().expect("a number");
            assert_eq!(score.to_bits(), expected.score.to_bits(), "{text}");
        }
    }
}

#[test]
fn answers_do_not_depend_on_threads_or_company() {
    let requests = request_lines(60);
    let together = recommend(requests.as_bytes(), &["--threads", "1"]).stdout;
    for threads in ["2", "4", "0"] {
        let output = recommend(requests.as_bytes(), &["--threads", threads]);
        assert_eq!(output.stdout, together, "{threads} threads");
    }
    for (line, answer) in requests.lines().zip(raw_lines(&together)).step_by(8) {
        assert_eq!(recommend(line.as_bytes(), &[]).stdout, answer, "{line} alone");
    }
    let backwards: Vec<&str> = requests.lines().rev().collect();
    let backwards = recommend(backwards.join("\n").as_bytes(), &[]).stdout;
    let forwards: Vec<&[u8]> = raw_lines(&backwards).into_iter().rev().collect();
    assert_eq!(forwards.concat(), together);
}

#[test]
fn a_line_overrides_the_flags() {
    let small = Folder::small();
    let bare = json!({"id": 1, "history": ["i1", "i2"]});
    for (key, value, flag) in [
        ("beams", json!(3), "--beams"),
        ("top_k", json!(2), "--top-k"),
        ("normalize", json!("level"), "--normalize"),
        ("constraint", json!("level"), "--constraint"),
        ("constraint", json!("occurring"), "--constraint"),
    ] {
        let mut line = bare.clone();
        line[key] = value.clone();
        let text = value.as_str().map_or(value.to_string(), str::to_string);
        let others = ["--beams", "7", "--top-k", "40", "--normalize", "children"];
        let by_line = recommend_small(&small, &line.to_string(), &others);
        let at = others.iter().position(|other| *other == flag);
        let mut flags: Vec<&str> = others.to_vec();
        match at {
            Some(at) => flags[at + 1] = &text,
            None => flags.extend([flag, &text]),
        }
        assert_eq!(by_line, recommend_small(&small, &bare.to_string(), &flags), "{key}");
        assert_ne!(by_line, recommend_small(&small, &bare.to_string(), &others), "{key}");
    }
}

#[test]
fn excluded_items_do_not_come_back_and_the_others_stay() {
    let small = Folder::small();
    let everything = ["--beams", "216", "--top-k", "1000"];
    let line = json!({"history": ["i3", "i4"]});
    let all = recommend_small(&small, &line.to_string(), &everything);
    assert_eq!(items(&all[0]).len(), small.catalog().num_items());
    // Every third item, so that some semantic IDs lose one of several, and some their last.
    let excluded: Vec<&str> = names(&all[0]).into_iter().step_by(3).collect();
    let line = json!({"history": ["i3", "i4"], "exclude": excluded});
    let rest = recommend_small(&small, &line.to_string(), &everything);
    let is_allowed = |item: &&Value| !excluded.iter().any(|name| item["item"] == *name);
    let expected: Vec<&Value> = items(&all[0]).iter().filter(is_allowed).collect();
    assert_eq!(items(&rest[0]).iter().collect::<Vec<_>>(), expected);
}

#[test]
fn candidates_are_ranked_and_the_bad_lines_are_answered_in_their_place() {
    let input = concat!(
        r#"{"id": 1, "history": ["17", "4"], "candidates": ["9", "12", "30", 9]}"#,
        "\n",
        r#"{"id": 2, "history": ["17", "4"]}"#,
        "\n",
        r#"{"id": 3, "history": ["17"], "candidates": ["no such item"]}"#,
        "\n",
        r#"{"id": 4, "history": ["17", "4"], "candidates": ["9"], "log_probs": true}"#,
    );
    let fixed = ["rank", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"];
    let output = run_with(&fixed, input.as_bytes());
    assert_eq!(code(&output), 1, "{}", errors(&output));
    let answers = lines(&output.stdout);
    let mut ranked = names(&answers[0]);
    let scores: Vec<f64> =
        items(&answers[0]).iter().map(|item| item["score"].as_f64().expect("a score")).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b));
    ranked.sort_unstable();
    assert_eq!(ranked, ["12", "30", "9"]);
    assert_eq!(answers[1]["error"]["code"], "invalid_field");
    assert_eq!(answers[2]["error"]["code"], "unknown_item");
    let alone = &items(&answers[3])[0];
    let in_company = items(&answers[0]).iter().find(|item| item["item"] == "9").expect("ranked");
    assert_eq!(alone["score"], in_company["score"]);
    let log_probs = alone["log_probs"]["vocabulary"].as_array().expect("a list");
    let sum: f64 = log_probs.iter().filter_map(Value::as_f64).sum();
    assert!((sum - alone["score"].as_f64().expect("a score")).abs() < 1e-4);
}

#[test]
fn named_tokens_are_read_instead_of_items_or_beside_them() {
    let small = Folder::small();
    small.write("tokenizer.json", r#"{"model": {"vocab": {"Yes": 3, "No": 4}}}"#);
    let input = r#"{"tokens": [1], "read": ["Yes", 4, "Yes"]}
        {"tokens": [1], "read": ["Yes"], "candidates": ["i0"], "forced": {"tokens": [5]}}"#;
    let answers = recommend_small(&small, input, &[]);
    let read = answers[0]["read"].as_array().expect("named tokens");
    assert!(items(&answers[0]).is_empty());
    let named: Vec<_> = read.iter().map(|read| (&read["token"], &read["text"])).collect();
    let (yes, no) = ((&json!(3), &json!("Yes")), (&json!(4), &Value::Null));
    assert_eq!(named, [yes, no, yes]);
    assert!(read[0]["log_prob"].as_f64().expect("a number") < 0.0);
    assert_eq!(read[0], read[2]);
    assert_eq!(names(&answers[1]), ["i0"]);
    assert_eq!(answers[1]["tokens"], 2, "the forced token extends the input");
    assert_ne!(answers[1]["read"][0]["log_prob"], read[0]["log_prob"]);

    let model = ["recommend", "--model", plain(small.path()), "--requests", "-"];
    let output = run_with(&[&model[..], &["--format", "table"]].concat(), input.as_bytes());
    let table = String::from_utf8(output.stdout).expect("text");
    assert_eq!(table.matches("log-probability").count(), 2, "{table}");
    assert_eq!(table.matches("semantic ID").count(), 1, "{table}");
    assert_eq!(table.matches("Yes").count(), 3, "{table}");

    // What has no one list of items would count as not found.
    for (input, field) in [
        (r#"{"tokens": [1], "read": ["Yes"], "target": "i0"}"#, "read"),
        (r#"{"history": ["i4"], "groups": ["all"], "target": "i0"}"#, "groups"),
    ] {
        let evaluate = ["evaluate", "--model", plain(small.path()), "--requests", "-"];
        let output = run_with(&evaluate, input.as_bytes());
        let refusal = format!("{field}: its answers have no list of items");
        assert!(errors(&output).contains(&refusal), "{}", errors(&output));
    }
}

#[test]
fn a_width_for_each_level_and_a_seed_are_taken_from_the_line() {
    let input = concat!(
        r#"{"history": ["17", "4"], "beams": [3, 5, 7], "top_k": 100, "shared_sid": "first"}"#,
        "\n",
        r#"{"history": ["17", "4"], "beams": [3, 5]}"#,
        "\n",
        r#"{"history": ["17", "4"], "beams": 4, "seed": 1}"#,
        "\n",
        r#"{"history": ["17", "4"], "beams": 4, "seed": 1}"#,
    );
    let output = recommend(input.as_bytes(), &[]);
    let answers = lines(&output.stdout);
    assert_eq!(items(&answers[0]).len(), 7);
    let message = answers[1]["error"]["message"].as_str().expect("a text");
    assert!(message.contains("3 levels"), "{message}");
    assert_eq!(names(&answers[2]), names(&answers[3]), "the same seed draws the same");
    assert!(answers[3]["cached_tokens"].is_u64());
}

#[test]
fn every_constraint_and_normalization_answers_with_items_of_the_catalog() {
    let small = Folder::small();
    let catalog = small.catalog();
    let line = json!({"history": ["i9", "i2", "i5"]}).to_string();
    let answer = |constraint: &str, normalize: &str| {
        let search = ["--constraint", constraint, "--normalize", normalize];
        let wide = ["--beams", "4096", "--top-k", "10000"];
        recommend_small(&small, &line, &[search, wide].concat()).remove(0)
    };
    let by_trie = ["vocabulary", "level", "children"].map(|normalize| answer("trie", normalize));
    // As wide as all paths, a search by level finds what the trie allows. A search by tokens keeps
    // the best paths only, so it finds the best of these items. Both rank children as their kin.
    for (constraint, normalize, truth, at_least) in [
        ("trie", "vocabulary", &by_trie[0], catalog.num_items()),
        ("trie", "level", &by_trie[1], catalog.num_items()),
        ("trie", "children", &by_trie[2], catalog.num_items()),
        ("level", "vocabulary", &by_trie[0], catalog.num_items()),
        ("level", "level", &by_trie[1], catalog.num_items()),
        ("level", "children", &by_trie[1], catalog.num_items()),
        ("none", "vocabulary", &by_trie[0], 10),
        ("none", "children", &by_trie[0], 10),
    ] {
        let answer = answer(constraint, normalize);
        let found = items(&answer).len();
        assert!(found >= at_least, "{constraint} {normalize}: {found} items");
        for (item, truth) in items(&answer).iter().zip(items(truth)) {
            let index = catalog.find(item["item"].as_str().expect("a name")).expect("an item");
            assert_eq!(item["sid"], json!(catalog.sid(index).codes()));
            assert_eq!(item["title"].as_str(), catalog.title(index));
            assert_eq!(item["item"], truth["item"], "{constraint} {normalize}");
            let score = |item: &Value| item["score"].as_f64().expect("a number");
            let difference = (score(item) - score(truth)).abs();
            assert!(difference < 1e-4, "{constraint} {normalize}: {item} for {truth}");
        }
    }
    let arguments = ["--constraint", "none", "--normalize", "level"];
    let contradiction = recommend(b"{\"history\": [17]}", &arguments);
    assert_eq!(code(&contradiction), 1);
    assert_eq!(lines(&contradiction.stdout)[0]["error"]["code"], "invalid_field");
}

#[test]
fn answers_look_readable_on_request() {
    let folder = temp();
    let items = write(
        &folder,
        "items.jsonl",
        "{\"item\": \"a\", \"sid\": [1, 2, 3], \"title\": \"A kettle\"}\n\
         {\"item\": \"b\", \"sid\": [1, 2, 4], \"title\": \"Zwölf Löffel\"}\n\
         {\"item\": \"c\", \"sid\": [1, 2, 5]}\n",
    );
    let arguments =
        ["recommend", "--model", MODEL, "--catalog", plain(&items), "--requests", "-", "--format"];
    let input = "{\"id\": \"anna\", \"history\": [\"a\"], \"target\": \"b\"}\n\
                 {\"id\": \"ben\", \"history\": [\"z\"]}";
    let seen = run_with(&[&arguments[..], &["table"]].concat(), input.as_bytes());
    assert_eq!(code(&seen), 1);
    let text = String::from_utf8(seen.stdout).expect("UTF-8");
    for word in ["anna", "A kettle", "Zwölf Löffel", "taken next", "[1, 2, 4]", "ben", "\"z\""] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    let seen = run_with(&[&arguments[..], &["jsonl"]].concat(), input.as_bytes());
    let titles: HashMap<&str, Option<&str>> =
        HashMap::from([("a", Some("A kettle")), ("b", Some("Zwölf Löffel")), ("c", None)]);
    let answers = lines(&seen.stdout);
    assert_eq!(answers[0]["items"].as_array().map(Vec::len), Some(3));
    for item in answers[0]["items"].as_array().expect("items") {
        let name = item["item"].as_str().expect("a name");
        assert_eq!(item.get("title").and_then(Value::as_str), titles[name]);
    }
}

// How it ends.

#[test]
fn what_cannot_run_ends_with_two() {
    let folder = temp();
    let empty = plain(folder.path());
    let nowhere = folder.path().join("no/such/place.jsonl");
    let sound = ["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"];
    let damaged = write(&folder, "damaged.sidereal", "SIDEREAL");
    for (arguments, word) in [
        (vec!["recommend", "--model", "no/such/folder", "--requests", "-"], "no/such/folder"),
        (
            vec!["recommend", "--model", empty, "--catalog", CATALOG, "--requests", "-"],
            "config.json",
        ),
        (vec!["recommend", "--model", MODEL, "--requests", "-"], "--catalog"),
        (vec!["recommend", "--requests", "-"], "--model"),
        (vec!["recommend", "--model", MODEL, "--catalog", CATALOG], "--requests"),
        ([&sound[..5], &["--requests", "missing.jsonl"]].concat(), "missing.jsonl"),
        ([&sound[..5], &["--requests", empty]].concat(), "directory"),
        ([&sound[..], &["--output", plain(&nowhere)]].concat(), "place.jsonl"),
        ([&sound[..], &["--device", "cuda:0"]].concat(), "\"cpu\""),
        ([&sound[..], &["--device", "abacus"]].concat(), "\"cpu\""),
        ([&sound[..], &["--device", "cuda:x"]].concat(), "\"cuda:0\""),
        ([&sound[..], &["--dtype", "f8"]].concat(), "bf16"),
        ([&sound[..], &["--beams", "0"]].concat(), "4096"),
        ([&sound[..], &["--beams", "9999"]].concat(), "4096"),
        ([&sound[..], &["--top-k", "0"]].concat(), "--top-k"),
        ([&sound[..], &["--threads", "-1"]].concat(), "-1"),
        ([&sound[..], &["--constraint", "tri"]].concat(), "trie"),
        ([&sound[..], &["--normalize", "softmax"]].concat(), "vocabulary"),
        ([&sound[..], &["--beems", "3"]].concat(), "--beams"),
        (vec!["catalog", "inspect", "missing.sidereal"], "missing.sidereal"),
        (vec!["catalog", "inspect", plain(&damaged)], "catalog build"),
        (vec!["catalog", "build", "--items", "missing.jsonl", "--output", empty], "missing.jsonl"),
        (vec!["catalog", "build", "--items", CATALOG, "--output", empty], "directory"),
        (vec!["bench", "--beams", "5"], "--model"),
        (vec!["bench", "--shape", "lion"], "tiger"),
        (vec!["bench", "--shape", "tiger", "--history", "0"], "--history"),
        (vec!["recommnd"], "recommend"),
        (vec![], "Usage"),
    ] {
        let output = run(&arguments);
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert!(errors(&output).contains(word), "{arguments:?}: {}", errors(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
    for catalog in ["missing.sidereal", "missing.jsonl", "missing.json"] {
        let arguments = ["recommend", "--model", MODEL, "--catalog", catalog, "--requests", "-"];
        let output = run(&arguments);
        assert_eq!(code(&output), 2);
        assert!(errors(&output).contains(catalog), "{}", errors(&output));
    }
}

/// The end of a pipe that nobody reads.
fn closed_pipe() -> Stdio {
    let (_, writer) = std::io::pipe().expect("a pipe");
    writer.into()
}

#[test]
fn a_reader_that_stops_early_is_no_failure() {
    let arguments = ["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"];
    let mut child = sidereal(&arguments).spawn().expect("the binary of this build");
    let mut stdin = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || stdin.write_all(request_lines(400).as_bytes()));
    // As `head -1` does: one line, and no more. What follows is longer than a pipe holds.
    let mut first = String::new();
    let mut stdout = BufReader::with_capacity(64, child.stdout.take().expect("piped"));
    stdout.read_line(&mut first).expect("UTF-8");
    drop(stdout);
    let output = child.wait_with_output().expect("the child ends");
    let _ = writer.join().expect("no panic"); // the child may end before it has read everything
    assert_eq!((code(&output), errors(&output).as_str()), (0, ""));
    let line = request_lines(1);
    assert_eq!(first.as_bytes(), recommend(line.as_bytes(), &[]).stdout);
}

#[test]
fn nobody_reading_is_no_failure() {
    let folder = temp();
    let line = "{\"history\": [\"17\"], \"target\": \"4\"}\n";
    let requests = write(&folder, "r.jsonl", line);
    let with_requests = ["--model", MODEL, "--catalog", CATALOG, "--requests", plain(&requests)];
    for arguments in [
        [&["recommend"], &with_requests[..]].concat(),
        [&["recommend"], &with_requests[..], &["--format", "table"]].concat(),
        [&["evaluate"], &with_requests[..]].concat(),
        [&["bench", "--beams", "2", "--repeat", "1"], &with_requests[..]].concat(),
        vec!["catalog", "inspect", CATALOG],
        vec!["--help"],
    ] {
        let output = sidereal(&arguments).stdout(closed_pipe()).output().expect("it ends");
        assert_eq!((code(&output), errors(&output).as_str()), (0, ""), "{arguments:?}");
    }
}

#[test]
fn errors_that_nobody_reads_change_no_exit_code() {
    let folder = temp();
    let line = "{\"history\": [\"no such item\"], \"target\": \"4\"}\n";
    let requests = write(&folder, "r.jsonl", line);
    let catalog = folder.path().join("c.sidereal");
    let with_requests = ["--model", MODEL, "--catalog", CATALOG, "--requests", plain(&requests)];
    let mut wrong = Vec::new();
    for (arguments, expected) in [
        (vec!["recommend", "--model", "no/such/folder", "--requests", "-"], 2),
        (vec!["recommend", "--beems"], 2),
        ([&["recommend"], &with_requests[..]].concat(), 1),
        ([&["evaluate"], &with_requests[..]].concat(), 1),
        (vec!["catalog", "build", "--items", CATALOG, "--output", plain(&catalog)], 0),
    ] {
        let output = sidereal(&arguments).stderr(closed_pipe()).output().expect("it ends");
        if code(&output) != expected {
            wrong.push(format!("{} for {expected}: {arguments:?}", code(&output)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[cfg(target_os = "linux")] // the device that is always full
#[test]
fn answers_that_cannot_be_written_end_with_two() {
    let full = || std::fs::File::create("/dev/full").expect("the device");
    let fixed = ["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"];
    let spawn = |mut command: Command| {
        let mut child = command.spawn().expect("the binary of this build");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(request_lines(2).as_bytes()).expect("the child reads");
        drop(stdin);
        child.wait_with_output().expect("the child ends")
    };
    let mut printed = sidereal(&fixed);
    printed.stdout(full());
    let printed = spawn(printed);
    let filed = spawn(sidereal(&[&fixed[..], &["--output", "/dev/full"]].concat()));
    for (output, place) in [(printed, "standard output"), (filed, "/dev/full")] {
        assert_eq!(code(&output), 2);
        assert!(errors(&output).contains(place), "{}", errors(&output));
    }
    let inspected = sidereal(&["catalog", "inspect", CATALOG]).stdout(full()).output();
    assert_eq!(code(&inspected.expect("it ends")), 2);
}

// Measurements.

#[test]
fn bench_reports_what_was_measured_and_where() {
    let arguments = ["bench", "--shape", "tiger", "--history", "5", "--repeat", "1", "--json"];
    let output = run(&[&arguments[..], &["--beams", "10", "--concurrency", "4"]].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let number = |pointer: &str| {
        let number = report.pointer(pointer).and_then(Value::as_f64);
        number.unwrap_or_else(|| panic!("{pointer} is no number in {report}"))
    };
    for pointer in [
        "/requests_per_second",
        "/latency_ms/p50",
        "/latency_ms/p95",
        "/latency_ms/p99",
        "/seconds/total",
        "/seconds/prefill",
        "/seconds/decode",
        "/seconds/search",
        "/matrix_gflops",
        "/matrix_share",
        "/machine/matrix_gflops",
        "/machine/matrix_gflops_per_cpu",
        "/machine/cores",
    ] {
        assert!(number(pointer) > 0.0, "{pointer} in {report}");
    }
    assert!(number("/latency_ms/p50") <= number("/latency_ms/p95"));
    assert!(number("/latency_ms/p95") <= number("/latency_ms/p99"));
    let rate = number("/requests") / number("/seconds/total");
    assert!((number("/requests_per_second") / rate - 1.0).abs() < 1e-9);
    // Not every system tells, but the key is there.
    assert!(report.get("peak_memory_bytes").is_some());
    assert!(report["machine"]["cpu"].is_string());
    let settings = &report["settings"];
    for (key, value) in [
        ("model", json!("tiger")),
        ("beams", json!(10)),
        ("concurrency", json!(4)),
        ("repeat", json!(1)),
    ] {
        assert_eq!(settings[key], value, "{key}");
    }
    assert_eq!(report["requests"], 16);
    assert!(number("/others_share") <= 1.0);
    assert!(report.get("rounds").is_none(), "one round has no median");
    let three = ["bench", "--shape", "tiger", "--history", "5", "--repeat", "3", "--beams", "5"];
    let output = run(&[&three[..], &["--json"]].concat());
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let rounds = &report["rounds"];
    let mut rates: Vec<f64> =
        serde_json::from_value(rounds["requests_per_second"].clone()).expect("numbers");
    rates.sort_by(f64::total_cmp);
    assert_eq!((rates.len(), &rounds["median_requests_per_second"]), (3, &json!(rates[1])));
}

#[test]
fn bench_takes_a_model_and_requests_as_well() {
    let folder = temp();
    let requests = write(&folder, "r.jsonl", request_lines(3));
    let fixed = ["bench", "--model", MODEL, "--catalog", CATALOG, "--repeat", "2"];
    let with_requests = [&fixed[..], &["--requests", plain(&requests)]].concat();
    let output = run(&[&with_requests[..], &["--json"]].concat());
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((code(&output), &report["requests"]), (0, &json!(6)));
    let text = run(&with_requests);
    let text = String::from_utf8(text.stdout).expect("UTF-8");
    for word in ["requests/s", "p50", "p95", "p99", "prefill", "decode"] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    let bad = write(&folder, "bad.jsonl", "{\"history\": [\"no such item\"]}\n");
    let output = run(&[&fixed[..], &["--requests", plain(&bad)]].concat());
    assert_eq!(code(&output), 2);
    assert!(errors(&output).contains("no such item"), "{}", errors(&output));
}

/// Recall and NDCG at 5, 10 and 20 of one target a request, by ranks from zero.
fn bench(more: &[&str]) -> Output {
    let model = ["bench", "--model", "models/industrial", "--history", "5", "--beams", "4"];
    run(&[&model[..], more].concat())
}

fn report(more: &[&str]) -> Value {
    let output = bench(&[more, &["--json"]].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn bench_is_a_load_tool() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plot = folder.path().join("latency.svg");
    let open = report(&["--rate", "200", "--seconds", "0.5", "--deadline", "5000"]);
    let load = &open["loads"][0];
    let count = |name: &str| load[name].as_u64().expect("a count");
    assert!((30..300).contains(&count("answered")), "{open}");
    assert_eq!((count("refused"), count("late")), (0, 0), "{open}");
    let ms = |quantile: &str| load["latency_ms"][quantile].as_f64().expect("a number");
    assert!(0.0 < ms("p50") && ms("p50") <= ms("p99") && ms("p99") <= ms("max"), "{open}");

    let callers =
        report(&["--concurrency", "4", "--repeat", "4", "--returning", "80", "--prefix-cache"]);
    assert_eq!(callers["requests"], 64);
    assert_eq!(callers["settings"]["concurrency"], 4);
    assert!(callers["gflop_per_request"].as_f64().is_some_and(|gflop| gflop > 0.0));
    let mixed =
        ["--batch", "8", "--repeat", "1", "--mixed-beams", "1,9", "--mixed-history", "2,30"];
    assert_eq!(report(&mixed)["settings"]["batch"], 8);
    assert_eq!(report(&["--candidates", "20", "--repeat", "1"])["requests"], 16);

    let output = bench(
        &[&["--sweep", "--seconds", "0.2", "--bound", "10000", "--plot", plain(&plot)][..]]
            .concat(),
    );
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let text = String::from_utf8_lossy(&output.stdout).to_string();
    assert!(text.contains("within the bound") && text.lines().count() >= 10, "{text}");
    let svg = std::fs::read_to_string(&plot).expect("a plot");
    assert!(svg.starts_with("<svg") && svg.contains("p99"));

    // One load has the fields of callers who wait, and nothing is said of what nobody measured.
    for (pointer, same) in [
        ("/latency_ms", "/loads/0/latency_ms"),
        ("/requests_per_second", "/loads/0/answered_per_second"),
    ] {
        assert!(
            open.pointer(pointer).is_some_and(|value| Some(value) == open.pointer(same)),
            "{open}"
        );
    }
}

#[test]
fn a_bench_without_an_answer_says_so_and_a_wrong_one_ends_at_once() {
    for load in [
        &["--repeat", "1"][..],
        &["--batch", "4", "--repeat", "1"],
        &["--rate", "100", "--seconds", "0.2"],
    ] {
        let never = [load, &["--deadline", "0.001"]].concat();
        let report = report(&never);
        assert!(report["latency_ms"].is_null(), "{never:?}: {report}");
        let load = report.pointer("/loads/0").unwrap_or(&report);
        let missed = |name| load[name].as_u64().unwrap_or(0);
        assert!(missed("late") + missed("refused") > 4, "{never:?}: {report}");
        let text = String::from_utf8(bench(&never).stdout).expect("UTF-8");
        assert!(text.contains("no request was answered") || text.contains("      -"), "{text}");
    }
    let nowhere = ["--sweep", "--seconds", "1", "--plot", "/no/such/folder/latency.svg"];
    let start = std::time::Instant::now();
    assert_eq!(code(&bench(&nowhere)), 2);
    assert!(start.elapsed().as_secs() < 8, "it was measured before the picture's place was tried");

    for wrong in [["--rate", "0"], ["--rate", "nan"], ["--returning", "101"]] {
        let output = bench(&wrong);
        assert_eq!(code(&output), 2, "{wrong:?}");
        assert!(!errors(&output).contains("panicked"), "{}", errors(&output));
    }
}

fn expected_metrics(ranks: &[Option<usize>]) -> [(String, f64); 6] {
    let mean = |gain: &dyn Fn(usize) -> f64| {
        ranks.iter().flatten().map(|&rank| gain(rank)).sum::<f64>() / ranks.len() as f64
    };
    let at = |cutoff: usize| {
        let recall = mean(&|rank| f64::from(u8::from(rank < cutoff)));
        let ndcg = mean(&|rank| match rank < cutoff {
            true => 1.0 / (rank as f64 + 2.0).log2(),
            false => 0.0,
        });
        [(format!("recall_at_{cutoff}"), recall), (format!("ndcg_at_{cutoff}"), ndcg)]
    };
    let [[a, b], [c, d], [e, f]] = [5, 10, 20].map(at);
    [a, b, c, d, e, f]
}

#[test]
fn evaluation_agrees_with_the_answers() {
    let small = Folder::small();
    let num_items = small.catalog().num_items() as u32;
    let mut rng = fastrand::Rng::with_seed(3);
    let request = |id| {
        let history: Vec<String> =
            (0..rng.usize(1..6)).map(|_| format!("i{}", rng.u32(0..num_items))).collect();
        json!({"id": id, "history": history})
    };
    let mut requests: Vec<Value> = (0..60).map(request).collect();
    let text: String = requests.iter().map(|request| format!("{request}\n")).collect();
    let answers = recommend_small(&small, &text, &["--top-k", "1000", "--beams", "20"]);
    let (mut by_item, mut by_sid) = (Vec::new(), Vec::new());
    for (index, (request, answer)) in requests.iter_mut().zip(&answers).enumerate() {
        // Targets at every rank, some that are not found, and some that no catalog has.
        let target = match index % 30 {
            29 => "i0".to_string(),
            28 => "unheard of".to_string(),
            rank => names(answer).get(rank).map_or("i1", |name| name).to_string(),
        };
        by_item.push(names(answer).iter().position(|&name| name == target));
        let sid = small.catalog().find(&target).map(|item| small.catalog().sid(item));
        let mut sids: Vec<&Value> = items(answer).iter().map(|item| &item["sid"]).collect();
        sids.dedup(); // items that share a semantic ID follow one another
        let is_target = |found: &&Value| sid.is_some_and(|sid| **found == json!(sid.codes()));
        by_sid.push(sids.iter().position(is_target));
        request["target"] = json!(target);
    }
    assert_ne!(by_item, by_sid, "some targets share their semantic ID");
    assert!(by_item.contains(&None) && by_item.contains(&Some(27)));
    let rows: String = requests.iter().map(|request| format!("{request}\n")).collect();
    let sound = small.write("sound.jsonl", &rows);
    // A request that fails found nothing: it counts.
    let one_bad = rows + "{\"history\": [\"unheard of\"], \"target\": \"i0\"}\n";
    let one_bad = small.write("one_bad.jsonl", one_bad);
    for (path, num_failed) in [(&sound, 0), (&one_bad, 1)] {
        let arguments = ["evaluate", "--model", plain(small.path()), "--beams", "20"];
        let arguments = [&arguments[..], &["--requests", plain(path)]].concat();
        let output = run(&[&arguments[..], &["--json"]].concat());
        assert_eq!(code(&output), num_failed, "{}", errors(&output));
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        by_item.resize(60 + num_failed as usize, None);
        by_sid.resize(60 + num_failed as usize, None);
        assert_eq!(
            (&report["requests"], &report["failed"]),
            (&json!(by_sid.len()), &json!(num_failed))
        );
        let text = String::from_utf8(run(&arguments).stdout).expect("UTF-8");
        for (kind, ranks) in [("by_item", &by_item), ("by_sid", &by_sid)] {
            for (name, expected) in expected_metrics(ranks) {
                let found = report[kind][&name].as_f64().expect("a number");
                assert!((found - expected).abs() < 1e-9, "{kind} {name}: {found} for {expected}");
                assert!(text.contains(&format!("{expected:.4}")), "{name} is not in {text}");
            }
        }
        for word in ["Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20"] {
            assert!(text.contains(word), "{word} is not in {text}");
        }
    }
}

#[test]
fn evaluation_needs_targets_and_requests() {
    let small = Folder::small();
    for (rows, word) in [
        (
            "{\"history\": [\"i0\"]}\n{\"history\": [\"i1\"]}\n",
            "none of 2 requests has a \"target\"",
        ),
        ("\n", "no requests"),
    ] {
        let path = small.write("rows.jsonl", rows);
        let model = ["evaluate", "--model", plain(small.path())];
        let output = run(&[&model[..], &["--requests", plain(&path)]].concat());
        assert_eq!((code(&output), output.stdout.len()), (2, 0));
        assert!(errors(&output).contains(word), "{}", errors(&output));
    }
}

#[test]
fn a_line_without_a_target_is_left_out_and_counted() {
    let small = Folder::small();
    let rows = "{\"history\": [\"i0\"], \"target\": \"i1\"}\n{\"history\": [\"i0\"]}\n";
    let path = small.write("rows.jsonl", rows);
    let evaluate = ["evaluate", "--model", plain(small.path()), "--requests", plain(&path)];
    let output = run(&[&evaluate[..], &["--json"]].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["requests"], &report["without_target"]), (&json!(1), &json!(1)));
    let text = String::from_utf8(run(&evaluate).stdout).expect("UTF-8");
    assert!(text.contains("1 lines have no \"target\""), "{text}");
}

#[test]
fn targets_that_the_catalog_does_not_have_are_counted_and_reported() {
    let small = Folder::small();
    let evaluate = |rows: &str, more: &[&str]| {
        let path = small.write("rows.jsonl", rows);
        let arguments = ["evaluate", "--model", plain(small.path()), "--requests", plain(&path)];
        run(&[&arguments[..], more].concat())
    };
    let some = "{\"history\": [\"i4\", \"brand-new\", \"i9\"], \"target\": \"i1\"}\n\
                {\"history\": [\"i4\"], \"target\": \"gone\"}\n";
    let output = evaluate(some, &["--json"]);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["requests"], &report["failed"]), (&json!(2), &json!(0)));
    assert_eq!((&report["unknown_targets"], &report["unknown_items"]), (&json!(1), &json!(1)));
    let text = String::from_utf8(evaluate(some, &[]).stdout).expect("UTF-8");
    assert!(text.contains("1 targets are not in the catalog"), "{text}");
    assert!(text.contains("1 items of histories are not in the catalog"), "{text}");
    assert_eq!(code(&evaluate(some, &["--unknown-items", "error"])), 1);

    let none = "{\"history\": [\"i4\"], \"target\": \"gone\"}\n";
    let output = evaluate(none, &[]);
    assert_eq!(code(&output), 1);
    assert!(errors(&output).contains("none of the targets"), "{}", errors(&output));
}

#[test]
fn unknown_items_are_left_out_and_named_in_every_command() {
    let small = Folder::small();
    let line = r#"{"history": ["i4", "brand-new", "i9"], "candidates": ["i1", "lost"]}"#;
    let search = r#"{"history": ["i4", "brand-new", "i9"], "only": ["i1", "lost"]}"#;
    let model = ["--model", plain(small.path()), "--requests", "-"];
    for (command, line, field) in [
        ("rank", line, "candidates"),
        ("recommend", search, "only"),
        ("recommend", line, "candidates"),
    ] {
        let ask =
            |more: &[&str]| run_with(&[&[command], &model[..], more].concat(), line.as_bytes());
        let output = ask(&[]);
        assert_eq!(code(&output), 0, "{}", errors(&output));
        let answer = &lines(&output.stdout)[0];
        assert_eq!(names(answer), ["i1"]);
        let expected = json!({
            "history": {"count": 1, "names": ["brand-new"]},
            field: {"count": 1, "names": ["lost"]},
        });
        assert_eq!(answer["unknown_items"], expected, "{command}");
        let table = String::from_utf8(ask(&["--format", "table"]).stdout).expect("UTF-8");
        for (field, name) in [("history", "brand-new"), (field, "lost")] {
            let text =
                format!("left out 1 of \"{field}\" that the catalog does not have: {name}\n");
            assert!(table.contains(&text), "{table}");
        }
        let strict = ask(&["--unknown-items", "error"]);
        assert_eq!(code(&strict), 1);
        assert_eq!(lines(&strict.stdout)[0]["error"]["code"], "unknown_item");
    }
    let path = small.write("rows.jsonl", format!("{search}\n"));
    let bench = ["bench", "--model", plain(small.path()), "--requests", plain(&path)];
    let output = run(&[&bench[..], &["--repeat", "1", "--beams", "4"]].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    assert!(errors(&output).contains("left out names"), "{}", errors(&output));
    let long = json!({"history": vec!["i4"; 3000]}).to_string();
    let recommend =
        |more: &[&str]| run_with(&[&["recommend"], &model[..], more].concat(), long.as_bytes());
    assert_eq!(code(&recommend(&[])), 1);
    let output = recommend(&["--long-history", "cut"]);
    assert_eq!(code(&output), 0, "{}", errors(&output));
}

#[test]
fn help_shows_examples() {
    let mut without = Vec::new();
    for command in [
        vec![],
        vec!["recommend"],
        vec!["rank"],
        vec!["evaluate"],
        vec!["bench"],
        vec!["catalog", "build"],
        vec!["catalog", "inspect"],
        vec!["catalog"],
    ] {
        let output = run(&[&command[..], &["--help"]].concat());
        assert_eq!((code(&output), errors(&output).as_str()), (0, ""), "{command:?}");
        if !String::from_utf8_lossy(&output.stdout).contains("Example") {
            without.push(command);
        }
    }
    assert!(without.is_empty(), "no example in the help of {without:?}");
    let version = run(&["--version"]);
    let text = String::from_utf8_lossy(&version.stdout);
    assert_eq!((code(&version), text.trim()), (0, concat!("sidereal ", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn selftest_checks_every_operation_and_a_model() {
    let output = run(&["selftest", "--cases", "2", "--no-bench"]);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for operation in sidereal::backend::testing::OPERATIONS {
        let line = text.lines().find(|line| line.starts_with(operation));
        assert!(line.is_some_and(|line| line.contains(" ok ")), "{operation}: {text}");
    }
    assert!(text.lines().any(|line| line.starts_with("model") && line.contains(" ok ")), "{text}");
    assert!(text.ends_with("all agrees\n"), "{text}");
}

// Hostile and unusual input.

/// More than a line may have.
const LONG: usize = (16 << 20) + 100;

#[test]
fn a_request_line_without_an_end_is_answered_in_its_place() {
    let request = "{\"id\": 7, \"history\": [\"17\"]}\n";
    for zeros in [0, b'[', b'"', b' '] {
        let long = vec![zeros; LONG];
        let input = [request.as_bytes(), &long, b"\n", request.as_bytes(), &long, &long].concat();
        let output = recommend(&input, &["--top-k", "1"]);
        assert_eq!(code(&output), 1, "{}", errors(&output));
        let lines = lines(&output.stdout);
        assert_eq!(lines.len(), 4);
        assert_eq!((names(&lines[0]), &lines[0]["id"]), (names(&lines[2]), &json!(7)));
        for (at, line) in [(1, 2), (3, 4)] {
            assert_eq!(lines[at]["error"]["code"], "malformed_request");
            let message = lines[at]["error"]["message"].as_str().expect("a text");
            assert!(message.contains("more than 16777216 bytes"), "{message}");
            assert_eq!(lines[at]["line"], line);
        }
    }
}

#[test]
fn a_history_of_a_hundred_thousand_names_is_read() {
    let history: Vec<String> = (0..100_000).map(|item| (item % 3686).to_string()).collect();
    let output = recommend(json!({"history": history}).to_string().as_bytes(), &[]);
    assert_eq!(lines(&output.stdout)[0]["error"]["code"], "history_too_long");
}

#[test]
fn unusual_text_is_read_or_answered_in_its_place() {
    let input =
        b"\xef\xbb\xbf{\"history\": [\"17\"]}\r\n\r\n\xff\xfe\n{\"history\": [\"1\x007\"]}\n\0\n\
        {\"history\": [\"17\"]}";
    let output = recommend(input, &["--top-k", "1"]);
    let lines = lines(&output.stdout);
    let codes: Vec<&str> =
        lines.iter().map(|line| line["error"]["code"].as_str().unwrap_or("none")).collect();
    let malformed = "malformed_request";
    assert_eq!(codes, ["none", malformed, malformed, malformed, "none"]);
    assert_eq!(items(&lines[0]), items(&lines[4]));
    let output = recommend(b"\x1f\x8b\x08\0\0", &[]);
    assert_eq!(code(&output), 2);
    assert!(errors(&output).contains("gzip"), "{}", errors(&output));
}

#[test]
fn lines_without_an_end_in_files_of_items_changes_and_names_are_errors() {
    let folder = temp();
    let long = write(&folder, "long.jsonl", vec![0; LONG]);
    let catalog = folder.path().join("c.sidereal");
    let built = run(&["catalog", "build", "--items", CATALOG, "--output", plain(&catalog)]);
    assert_eq!(code(&built), 0, "{}", errors(&built));
    let output = plain(&catalog).to_string() + ".new";
    for arguments in [
        &["catalog", "build", "--items", plain(&long), "--output", &output][..],
        &["catalog", "change", plain(&catalog), "--changes", plain(&long)],
        &["bench", "--model", MODEL, "--catalog", CATALOG, "--requests", plain(&long)],
    ] {
        let output = run(arguments);
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert!(errors(&output).contains("line 1: the line has more"), "{}", errors(&output));
    }
}

// Files of output.

#[cfg(unix)]
#[test]
fn outputs_are_new_files_and_devices_stay_devices() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    let folder = temp();
    let [file, link] = ["answers.jsonl", "link.jsonl"].map(|name| folder.path().join(name));
    write(&folder, "answers.jsonl", "old");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).expect("own file");
    symlink("answers.jsonl", &link).expect("a folder for links");
    let inode = |path: &Path| std::fs::metadata(path).expect("a file").ino();
    let old = std::fs::File::open(&file).expect("a file");
    let before = inode(&file);
    let input = b"{\"history\": [\"17\"]}\n";
    let output = recommend(input, &["--output", plain(&link), "--format", "jsonl"]);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    assert_ne!(inode(&file), before, "another file has the name");
    assert_eq!(old.metadata().expect("open").len(), 3, "who had the old one open keeps it");
    assert!(link.symlink_metadata().expect("a link").is_symlink());
    assert_eq!(std::fs::metadata(&file).expect("a file").mode() & 0o777, 0o640);
    assert_eq!(lines(&std::fs::read(&file).expect("a file")).len(), 1);
    assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 2);
    let output = recommend(input, &["--output", "/dev/stdout", "--format", "jsonl"]);
    assert_eq!((code(&output), lines(&output.stdout).len()), (0, 1), "{}", errors(&output));
    let null = inode(Path::new("/dev/null"));
    assert_eq!(code(&recommend(input, &["--output", "/dev/null"])), 0);
    assert_eq!(inode(Path::new("/dev/null")), null);
}

/// As [`excluded_items_do_not_come_back_and_the_others_stay`], by the history itself.
#[test]
fn the_items_of_a_history_stay_out_on_request_and_only_of_searches() {
    let small = Folder::small();
    let everything = ["--beams", "216", "--top-k", "1000"];
    let history = ["i3", "i4", "i3", "i7"];
    let by_name = json!({"history": history, "exclude": history});
    let expected = recommend_small(&small, &by_name.to_string(), &everything);
    let own = json!({"history": history, "exclude_history": true});
    assert_eq!(recommend_small(&small, &own.to_string(), &everything), expected);
    let flags = [&everything[..], &["--exclude-history"]].concat();
    let bare = json!({"history": history});
    assert_eq!(recommend_small(&small, &bare.to_string(), &flags), expected);
    // The line wins over the flag, and the flag is for lines that search by a history.
    let all = recommend_small(&small, &bare.to_string(), &everything);
    assert_eq!(items(&expected[0]).len() + 3, items(&all[0]).len());
    let off = json!({"history": history, "exclude_history": false});
    assert_eq!(recommend_small(&small, &off.to_string(), &flags), all);
    for line in [
        json!({"tokens": [3, 4]}),
        json!({"history": history, "candidates": ["i3", "i9"]}),
        json!({"history": history, "read": [3]}),
    ] {
        let with_flag = recommend_small(&small, &line.to_string(), &flags);
        assert_eq!(with_flag, recommend_small(&small, &line.to_string(), &everything), "{line}");
        let mut asked = line.clone();
        asked["exclude_history"] = json!(true);
        let fixed = ["recommend", "--model", plain(small.path()), "--requests", "-"];
        let refused = run_with(&fixed, asked.to_string().as_bytes());
        assert_eq!(code(&refused), 1);
        let error = &lines(&refused.stdout)[0]["error"];
        assert!(
            error["message"].as_str().is_some_and(|it| it.contains("exclude_history")),
            "{error}"
        );
    }
}

/// A table as a person sees it, whatever is in titles and names.
#[test]
fn tables_say_what_was_held_out_what_is_shared_and_nothing_to_the_terminal() {
    let folder = temp();
    let items = write(
        &folder,
        "items.jsonl",
        "{\"item\": \"a\", \"sid\": [1, 2, 3], \"title\": \"A \\u001b[31mred\\nkettle\\u0007\"}\n\
         {\"item\": \"b\\u009b2J\", \"sid\": [1, 2, 4], \"title\": \"\\u202elevart\"}\n\
         {\"item\": \"c\", \"sid\": [1, 2, 4]}\n{\"item\": \"d\", \"sid\": [1, 2, 5]}\n",
    );
    let fixed = ["--model", MODEL, "--catalog", plain(&items), "--requests", "-"];
    let table = |command: &str, input: &str, more: &[&str]| {
        let arguments = [&[command], &fixed[..], &["--format", "table"], more].concat();
        let output = run_with(&arguments, input.as_bytes());
        let shown = output.stdout.iter().chain(&output.stderr).copied().collect::<Vec<u8>>();
        let text = String::from_utf8(shown).expect("UTF-8");
        let steers =
            |it: char| (it.is_control() && it != '\n') || ('\u{202a}'..'\u{202f}').contains(&it);
        assert!(!text.chars().any(steers), "{text:?}");
        text
    };
    let found = "{\"id\": \"\\u001b[2J\", \"history\": [\"a\"], \"target\": \"c\"}";
    let text = table("recommend", found, &[]);
    assert!(text.contains("[31mred kettle"), "{text}");
    assert!(text.contains("(held out; found, rank "), "{text}");
    assert!(text.contains("2 of them share a semantic ID"), "{text}");
    let text = table("recommend", found, &["--exclude-history", "--per-sid", "1"]);
    assert!(!text.contains("share a semantic ID"), "{text}");
    let missed = "{\"history\": [\"a\"], \"target\": \"gone\\u001b\"}";
    let text = table("recommend", missed, &["--top-k", "2"]);
    assert!(text.contains("(held out; not among these 2)"), "{text}");
    let unknown = "{\"history\": [\"no\\u001bne\"]}";
    table("recommend", unknown, &[]);
    let text = table("rank", "{\"history\": [\"a\"], \"candidates\": [\"a\", \"c\", \"d\"]}", &[]);
    assert!(text.contains("among these") && !text.contains(" 0.00 %"), "{text}");
}

#[test]
fn what_fails_for_every_line_is_said_once() {
    let requests = "models/industrial/users.jsonl";
    for (more, word) in [
        (["--beams", "5,5"], "the catalog has 3 levels"),
        (["--max-context", "0"], "--max-context"),
        (["--beams", "0"], "--beams"),
    ] {
        for command in ["recommend", "evaluate"] {
            let fixed = [command, "--model", "models/industrial", "--requests", requests];
            let output = run(&[&fixed[..], &more].concat());
            assert_eq!((code(&output), output.stdout.len()), (2, 0), "{command} {more:?}");
            assert_eq!(errors(&output).matches("error").count(), 1, "{}", errors(&output));
            assert!(errors(&output).contains(word), "{}", errors(&output));
        }
    }
    let output = run(&["bench"]);
    assert_eq!(code(&output), 2);
    assert!(errors(&output).contains("--shape"), "{}", errors(&output));
}

#[test]
fn fields_that_items_do_not_have_are_errors_unless_they_are_named() {
    let folder = temp();
    let line = "{\"item\": \"a\", \"sid\": [1, 2], \"availble\": false, \"price\": 3}\n";
    let path = write(&folder, "items.jsonl", line);
    let built = folder.path().join("items.sidereal");
    let build = ["catalog", "build", "--items", plain(&path), "--output", plain(&built)];
    let output = run(&build);
    assert_eq!(code(&output), 2);
    for word in ["line 1", "unknown field `availble`", "`available`", "--ignore availble"] {
        assert!(errors(&output).contains(word), "{}", errors(&output));
    }
    assert_eq!(code(&run(&[&build[..], &["--ignore", "price"]].concat())), 2);
    let output = run(&[&build[..], &["--ignore", "price,availble"]].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let put = write(&folder, "changes.jsonl", format!("{{\"put\": {}}}\n", line.trim()));
    let change = ["catalog", "change", plain(&built), "--changes", plain(&put)];
    assert_eq!(code(&run(&change)), 2);
    let output = run(&[&change[..], &["--ignore", "price,availble"]].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
}

#[test]
fn files_of_another_kind_are_named() {
    let folder = temp();
    let index = b"\xef\xbb\xbf{\"1\": [\"<a_1>\", \"<b_2>\"]}";
    let marked = folder.path().join("items.index.json");
    std::fs::write(&marked, index).expect("a file");
    let built = folder.path().join("items.sidereal");
    let build =
        |path: &Path| run(&["catalog", "build", "--items", plain(path), "--output", plain(&built)]);
    let output = build(&marked);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    for (name, bytes, word) in [
        ("items.jsonl", &b"item,sid\n1,2\n"[..], "CSV"),
        ("items.jsonl", b"item\tsid\n1\t2\n", "TSV"),
        ("items.jsonl", b"\x1f\x8b\x08\0", "gzip"),
        ("items.index.json", b"\x1f\x8b\x08\0", "gzip"),
        ("items.index.json", b"\x28\xb5\x2f\xfd\0", "zstd"),
        (
            "items.jsonl",
            b"{\"item\": 1, \"sid\": 7}\n",
            "line 1: sid: invalid type: integer `7`, expected a list",
        ),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("a file");
        let output = build(&path);
        assert_eq!(code(&output), 2);
        let text = errors(&output);
        assert!(text.contains(word) && !text.contains("line 1 column"), "{text}");
    }
}

#[test]
fn evaluation_judges_lists_segments_and_widths() {
    let small = Folder::small();
    let snapshot = small.catalog();
    let name = |at: u32| format!("i{}", at % snapshot.num_items() as u32);
    let row = |at: u32| {
        let segment = if at.is_multiple_of(3) { json!("new") } else { json!(7) };
        json!({"history": [name(at), name(at + 1)], "target": name(7 * at), "segment": segment})
    };
    let rows: String = (0..30).map(|at| format!("{}\n", row(at))).collect();
    let path = small.write("rows.jsonl", &rows);
    let fixed = ["evaluate", "--model", plain(small.path()), "--requests", plain(&path)];
    let evaluate = |more: &[&str]| {
        let output = run(&[&fixed[..], more].concat());
        assert_eq!(code(&output), 0, "{}", errors(&output));
        (String::from_utf8(output.stdout.clone()).expect("UTF-8"), errors(&output))
    };
    let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    let (text, said) = evaluate(&["--at", "50,1", "--beams", "20", "--json"]);
    assert!(said.contains("lists of 50 may be shorter"), "{said}");
    let report = parse(&text);
    let (one, fifty) = (&report["by_item"]["recall_at_1"], &report["by_item"]["recall_at_50"]);
    assert!(one.as_f64() <= fifty.as_f64() && report["by_item"].get("recall_at_5").is_none());
    let segments = &report["segments"];
    assert_eq!(
        (&segments["new"]["requests"], &segments["7"]["requests"]),
        (&json!(10), &json!(20))
    );
    let of = |name: &str| segments[name]["by_item"]["recall_at_50"].as_f64().expect("a number");
    let mean = (10.0 * of("new") + 20.0 * of("7")) / 30.0;
    assert!((mean - fifty.as_f64().expect("a number")).abs() < 1e-12);

    // What stands in the lists, by the lists themselves.
    let asked: String = rows
        .lines()
        .map(|line| {
            let mut line = parse(line);
            let fields = line.as_object_mut().expect("an object");
            fields.retain(|name, _| name == "history");
            format!("{line}\n")
        })
        .collect();
    let lists = recommend_small(&small, &asked, &["--beams", "20", "--top-k", "50"]);
    let listed: Vec<&str> =
        lists.iter().flat_map(|line| names(line).into_iter().take(50)).collect();
    let distinct = listed.iter().collect::<std::collections::HashSet<_>>().len();
    let histories =
        |item: &str| asked.lines().filter(|line| line.contains(&format!("\"{item}\""))).count();
    let popularity =
        listed.iter().map(|item| histories(item)).sum::<usize>() as f64 / listed.len() as f64;
    for (field, expected) in [
        ("coverage_at_50", distinct as f64 / snapshot.num_items() as f64),
        ("popularity_at_50", popularity),
    ] {
        let found = report["spread"][field].as_f64().expect("a number");
        assert!((found - expected).abs() < 1e-9, "{field}: {found} for {expected}");
    }

    let svg = small.path().join("recall.svg");
    let widths = ["--widths", "1,20", "--at", "5", "--exclude-history"];
    let (text, _) = evaluate(&[&widths[..], &["--json", "--plot", plain(&svg)]].concat());
    let reports = parse(&text);
    let beams: Vec<&Value> = (0..2).map(|at| &reports["widths"][at]["beams"]).collect();
    assert_eq!(beams, [&json!(1), &json!(20)]);
    assert!(std::fs::read_to_string(&svg).expect("a picture").contains("Recall@5"));
    let (text, _) = evaluate(&widths);
    assert_eq!(text.matches("by item").count(), 2, "{text}");
    let nowhere = small.path().join("no/where.svg");
    let output = run(&[&fixed[..], &widths, &["--plot", plain(&nowhere)]].concat());
    assert_eq!((code(&output), output.stdout.len()), (2, 0), "it is said before anything is done");
}
