//! The command line is a contract: scripts rely on what it prints and how it ends.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn run(arguments: &[&str]) -> Output {
    run_with(arguments, b"")
}

fn run_with(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sidereal"))
        .args(arguments)
        .current_dir(repository())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary of this build");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input).expect("the child reads or has ended");
    drop(stdin);
    let output = child.wait_with_output().expect("the child ends");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("panicked"), "{errors}");
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

const MODEL: &str = "models/decoder_only/qwen3-tied";
const CATALOG: &str = "models/catalogs/industrial.index.json";

fn recommend(input: &[u8], more: &[&str]) -> Output {
    let fixed = ["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"];
    run_with(&[&fixed[..], more].concat(), input)
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

#[test]
fn a_catalog_is_built_and_inspected() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("c.sidereal");
    let path = path.to_str().expect("a plain path");
    let built = run(&["catalog", "build", "--items", CATALOG, "--output", path]);
    assert_eq!(code(&built), 0, "{}", errors(&built));
    let inspected = run(&["catalog", "inspect", path, "--json"]);
    let summary: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert_eq!(
        (&summary["items"], &summary["sids"], &summary["levels"]),
        (&json!(3686), &json!(3670), &json!(3))
    );
    assert_eq!(summary["codes_in_use"], json!([48, 256, 256]));
    assert_eq!(summary["largest_collision"], 3);
    let bytes = std::fs::metadata(path).expect("the catalog").len();
    assert_eq!(summary["file_bytes"], bytes);
    for key in ["collisions", "trie_bytes", "trie_bytes_per_item"] {
        assert!(summary[key].as_f64().expect("a number") > 0.0, "{key}");
    }
    let text = run(&["catalog", "inspect", path]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("3670 of 3 levels"));

    let compiled = run_with(
        &["recommend", "--model", MODEL, "--catalog", path, "--requests", "-"],
        request_lines(5).as_bytes(),
    );
    assert_eq!(compiled.stdout, recommend(request_lines(5).as_bytes(), &[]).stdout);
}

#[test]
fn a_catalog_is_not_built_over_a_file_of_items() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("c.json");
    let path = path.to_str().expect("a plain path");
    let built = run(&["catalog", "build", "--items", CATALOG, "--output", path]);
    assert_eq!(code(&built), 2);
    assert!(errors(&built).contains("items.sidereal"), "{}", errors(&built));
}

#[test]
fn every_line_is_answered_in_its_place() {
    let good = [
        r#"{"id": "u1", "history": ["17", "4"], "top_k": 3}"#,
        r#"{"id": 7, "history": [17], "beams": 5, "exclude": ["4"]}"#,
        r#"{"tokens": [1, 200, 300], "beams": 2}"#,
    ];
    let bad: [&[u8]; 4] = [
        b"{\"id\": \"b1\", \"history\": [\"no such item\"]}",
        b"{\"id\": \"b2\", \"beams\": \"ten\"}",
        b"not json",
        b"{\"id\": \"\xff\"}",
    ];
    let mut mixed: Vec<u8> = Vec::new();
    for line in [good[0].as_bytes(), bad[0], b"", bad[1], good[1].as_bytes(), bad[2], b"  ", bad[3]]
    {
        mixed.extend_from_slice(line);
        mixed.push(b'\n');
    }
    mixed.extend_from_slice(good[2].as_bytes()); // the last line may lack its end
    let mixed = recommend(&mixed, &[]);
    assert_eq!(code(&mixed), 1, "{}", errors(&mixed));
    let clean = recommend(good.join("\n").as_bytes(), &[]);
    assert_eq!(code(&clean), 0);
    let (mixed, clean) = (lines(&mixed.stdout), lines(&clean.stdout));
    assert_eq!(mixed.len(), 7);
    assert_eq!([&mixed[0], &mixed[3], &mixed[6]], [&clean[0], &clean[1], &clean[2]]);
    let ids: Vec<&Value> = mixed.iter().map(|line| &line["id"]).collect();
    let null = Value::Null;
    assert_eq!(ids, [&json!("u1"), &json!("b1"), &json!("b2"), &json!(7), &null, &null, &null]);
    let codes = [1, 2, 4, 5].map(|line| mixed[line]["error"]["code"].as_str());
    let malformed = Some("malformed_request");
    assert_eq!(codes, [Some("unknown_item"), malformed, malformed, malformed]);
    assert_eq!(mixed[1]["line"], 2);
    assert!(mixed[1]["error"]["message"].as_str().expect("a text").contains("no such item"));
    assert_eq!(clean[0]["items"].as_array().expect("items").len(), 3);
    assert!(clean[1]["items"].as_array().expect("items").iter().all(|item| item["item"] != "4"));
}

#[test]
fn scores_are_given_in_full_precision() {
    let answers = lines(&recommend(request_lines(3).as_bytes(), &[]).stdout);
    for item in answers.iter().flat_map(|line| line["items"].as_array().expect("items")) {
        let text = item["score"].to_string();
        let score: f32 = text.parse().expect("a number");
        assert_eq!(format!("{score:?}"), text);
    }
}

#[test]
fn answers_do_not_depend_on_threads_or_company() {
    let requests = request_lines(60);
    let together = recommend(requests.as_bytes(), &["--threads", "1"]).stdout;
    for threads in ["2", "4"] {
        assert_eq!(recommend(requests.as_bytes(), &["--threads", threads]).stdout, together);
    }
    let together: Vec<&[u8]> = together.split_inclusive(|&byte| byte == b'\n').collect();
    for (line, answer) in requests.lines().zip(together).step_by(20) {
        assert_eq!(recommend(line.as_bytes(), &[]).stdout, answer);
    }
}

#[test]
fn answers_go_to_a_file_or_look_readable_on_request() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("answers.jsonl");
    let requests = request_lines(4);
    let printed = recommend(requests.as_bytes(), &[]);
    let filed = recommend(requests.as_bytes(), &["--output", path.to_str().expect("a plain path")]);
    assert_eq!((code(&filed), filed.stdout.len()), (0, 0));
    assert_eq!(std::fs::read(&path).expect("the answers"), printed.stdout);

    let items = folder.path().join("items.jsonl");
    let titled = "{\"item\": \"a\", \"sid\": [1, 2, 3], \"title\": \"A kettle\"}\n\
                  {\"item\": \"b\", \"sid\": [1, 2, 4], \"title\": \"Zwölf Löffel\"}\n";
    std::fs::write(&items, titled).expect("a writable folder");
    let items = items.to_str().expect("a plain path");
    let seen = run_with(
        &[
            "recommend",
            "--model",
            MODEL,
            "--catalog",
            items,
            "--requests",
            "-",
            "--format",
            "table",
        ],
        b"{\"id\": \"anna\", \"history\": [\"a\"], \"target\": \"b\"}",
    );
    let text = String::from_utf8(seen.stdout).expect("UTF-8");
    for word in ["anna", "A kettle", "Zwölf Löffel", "taken next", "[1, 2, 4]"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn what_cannot_run_ends_with_two() {
    let requests = ["--requests", "-"];
    for (arguments, word) in [
        (vec!["recommend", "--model", "no/such/folder"], "no/such/folder"),
        (vec!["recommend", "--model", MODEL], "--catalog"),
        (vec!["recommend", "--model", MODEL, "--catalog", "missing.sidereal"], "missing.sidereal"),
        (vec!["recommend", "--model", MODEL, "--catalog", CATALOG, "--device", "cuda:0"], "cpu"),
        (vec!["recommend", "--model", MODEL, "--catalog", CATALOG, "--beams", "0"], "1..="),
        (vec!["recommend", "--model", MODEL, "--catalog", CATALOG, "--beams", "9999"], "4096"),
        (vec!["recommend", "--model", MODEL, "--catalog", CATALOG, "--top-k", "0"], "0"),
        (vec!["recommend", "--model", MODEL, "--catalog", CATALOG, "--beems", "3"], "--beams"),
    ] {
        let output = run(&[&arguments[..], &requests].concat());
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert!(errors(&output).contains(word), "{arguments:?}: {}", errors(&output));
        assert!(output.stdout.is_empty());
    }
    let missing =
        run(&["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "missing.jsonl"]);
    assert_eq!(code(&missing), 2);
    assert!(errors(&missing).contains("missing.jsonl"));
}

#[test]
fn every_constraint_and_normalization_answers_with_items_of_the_catalog() {
    for constraint in ["trie", "level", "none"] {
        for normalize in ["vocabulary", "level", "children"] {
            let more = ["--constraint", constraint, "--normalize", normalize, "--beams", "200"];
            let output = recommend(request_lines(2).as_bytes(), &more);
            let is_contradiction = (constraint, normalize) == ("none", "level");
            assert_eq!(code(&output), i32::from(is_contradiction), "{constraint} {normalize}");
            for line in lines(&output.stdout) {
                match is_contradiction {
                    true => assert_eq!(line["error"]["code"], "invalid_field"),
                    false => assert!(line["items"].is_array()),
                }
            }
        }
    }
}

#[test]
fn a_reader_that_stops_early_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sidereal"))
        .args(["recommend", "--model", MODEL, "--catalog", CATALOG, "--requests", "-"])
        .current_dir(repository())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary of this build");
    drop(child.stdout.take());
    let mut stdin = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || stdin.write_all(request_lines(300).as_bytes()));
    let output = child.wait_with_output().expect("the child ends");
    let _ = writer.join().expect("no panic"); // the child may end before it has read everything
    assert_eq!((code(&output), errors(&output).as_str()), (0, ""));
}

#[test]
fn bench_reports_what_was_measured_and_where() {
    let output = run(&[
        "bench",
        "--shape",
        "tiger",
        "--history",
        "5",
        "--beams",
        "10",
        "--repeat",
        "1",
        "--concurrency",
        "4",
        "--json",
    ]);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
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
        "/machine/matrix_gflops",
        "/settings/beams",
    ] {
        let number = report.pointer(pointer).and_then(Value::as_f64);
        assert!(number.is_some_and(|number| number > 0.0), "{pointer} in {report}");
    }
    assert!(report.get("peak_memory_bytes").is_some());
    assert_eq!(report["requests"], 16);
}

#[test]
fn evaluation_agrees_with_the_answers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let requests: Vec<Value> = lines(request_lines(40).as_bytes());
    let answers = lines(&recommend(request_lines(40).as_bytes(), &["--top-k", "1000"]).stdout);
    let mut rows = String::new();
    let (mut recall, mut gain) = (0.0, 0.0);
    for (index, (request, answer)) in requests.iter().zip(&answers).enumerate() {
        let items = answer["items"].as_array().expect("items");
        // Targets at every rank, and some that are not found at all.
        let rank = index % 14;
        let target = items.get(rank).map_or(json!("0"), |item| item["item"].clone());
        let is_found = items.iter().position(|item| item["item"] == target);
        if let Some(rank) = is_found.filter(|&rank| rank < 10) {
            recall += 1.0 / 40.0;
            gain += 1.0 / (rank as f64 + 2.0).log2() / 40.0;
        }
        let mut row = request.clone();
        row["target"] = target;
        rows += &format!("{row}\n");
    }
    let path: PathBuf = folder.path().join("rows.jsonl");
    std::fs::write(&path, rows).expect("a writable folder");
    let path = path.to_str().expect("a plain path");
    let arguments = ["evaluate", "--model", MODEL, "--catalog", CATALOG, "--requests", path];
    let output = run(&[&arguments[..], &["--json"]].concat());
    assert_eq!(code(&output), 0, "{}", errors(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let metric = |name: &str| report["by_item"][name].as_f64().expect("a number");
    assert!((metric("recall_at_10") - recall).abs() < 1e-9, "{report}");
    assert!((metric("ndcg_at_10") - gain).abs() < 1e-9, "{report}");
    let text = String::from_utf8(run(&arguments).stdout).expect("UTF-8");
    assert!(text.contains("Recall@10") && text.contains("NDCG@20"), "{text}");
}

#[test]
fn help_shows_examples() {
    for command in [
        vec![],
        vec!["recommend"],
        vec!["evaluate"],
        vec!["bench"],
        vec!["catalog", "build"],
        vec!["catalog", "inspect"],
    ] {
        let output = run(&[&command[..], &["--help"]].concat());
        assert_eq!(code(&output), 0);
        assert!(String::from_utf8_lossy(&output.stdout).contains("Example"), "{command:?}");
    }
}
