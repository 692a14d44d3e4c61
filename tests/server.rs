//! `sidereal serve` from outside: what clients send, what hostile ones send, and what they get.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sidereal::catalog::Catalog;
use sidereal::server::{ModelSource, Server, ServerOptions, TlsFiles};
use sidereal::{Recommender, RecommenderOptions, Request};

const FOLDER: &str = "models/industrial";
const ITEMS: &str = "models/industrial/items.jsonl";

fn options() -> ServerOptions {
    let mut options = ServerOptions::new(ModelSource::new(FOLDER, ITEMS));
    options.recommender = RecommenderOptions::new("cpu").with_threads(1);
    options.http = "127.0.0.1:0".parse().expect("an address");
    options.drain = Duration::from_secs(10);
    options
}

fn start(options: &ServerOptions) -> Server {
    Server::start(options).expect("a server")
}

#[test]
fn default_widths_of_another_number_of_levels_are_refused_at_the_start() {
    let mut options = options();
    options.defaults.widths = vec![5, 5];
    let error = Server::start(&options).err().expect("three levels").to_string();
    assert!(error.contains("--beams") && error.contains("3 levels"), "{error}");
}

/// A response, as far as it came.
#[derive(Debug)]
struct Response {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Response {
    /// The response of bytes that a server sent before it closed the connection.
    fn parse(bytes: &[u8]) -> Response {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole head");
        let head = std::str::from_utf8(&bytes[..end]).expect("heads are ASCII");
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status line");
        let headers = lines.filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_lowercase(), value.to_string()))
        });
        Response {
            status: status.parse().expect("a number"),
            headers: headers.collect(),
            body: bytes[end + 4..].to_vec(),
        }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_string()
    }
}

/// Sends bytes and reads until the server closes the connection.
fn send(address: SocketAddr, bytes: &[u8]) -> Response {
    let mut stream = TcpStream::connect(address).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
    // A server that refuses early may close before everything is sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Response::parse(&answer)
}

fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

fn post(address: SocketAddr, path: &str, body: &Value) -> Response {
    send(address, &request("POST", path, "", body.to_string().as_bytes()))
}

fn get(address: SocketAddr, path: &str) -> Response {
    send(address, &request("GET", path, "", b""))
}

fn histories(count: usize) -> Vec<Vec<String>> {
    let text = fs::read_to_string(Path::new(FOLDER).join("users.jsonl")).expect("the demo's users");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a request")).collect();
    let history = |line: &Value| {
        let items = line["history"].as_array().expect("a history");
        items.iter().map(|item| item.as_str().expect("a name").to_string()).collect()
    };
    lines
        .iter()
        .cycle()
        .take(count)
        .enumerate()
        .map(|(at, line)| {
            let mut history: Vec<String> = history(line);
            let by = at % history.len().max(1);
            history.rotate_left(by);
            history
        })
        .collect()
}

type Found = Vec<(String, u32)>;

/// Items with the bits of their scores.
fn found(items: &Value) -> Found {
    let items = items.as_array().expect("a list of items").iter();
    items
        .map(|found| {
            let score = found["score"].as_f64().expect("a score") as f32;
            (found["item"].as_str().expect("a name").to_string(), score.to_bits())
        })
        .collect()
}

#[test]
fn every_http_door_answers_as_the_library_does_to_the_last_bit() {
    let server = start(&options());
    let catalog = Arc::new(Catalog::open(Path::new(ITEMS)).expect("the demo's catalog"));
    let own = RecommenderOptions::new("cpu").with_threads(1);
    let library = Recommender::open(Path::new(FOLDER), catalog, &own).expect("the demo");
    let histories = histories(200);
    let requests: Vec<Value> =
        histories.iter().map(|history| json!({ "history": history, "beams": 20 })).collect();
    let batch = post(server.http(), "/v1/recommend", &json!({ "requests": requests })).json();
    for (at, history) in histories.iter().enumerate() {
        let request = Request::from_history(history.clone()).with_beams(20);
        let answer = library.recommend(&request).expect("an answer");
        let expected: Found =
            answer.items.iter().map(|found| (found.item.clone(), found.score.to_bits())).collect();
        assert_eq!(found(&batch["answers"][at]["items"]), expected, "in a batch");
        let alone = post(server.http(), "/v1/recommend", &requests[at]).json();
        assert_eq!(found(&alone["items"]), expected, "alone");

        let tokens = library.input_tokens(&request.input).expect("tokens");
        let body = json!({
            "input_ids": tokens, "sampling_params": { "beam_width": 20, "n": 10 },
        });
        let generated = post(server.http(), "/generate", &body).json();
        let beams = generated["meta_info"]["beam_results"].as_array().expect("beams").iter();
        let beams: Found = beams
            .map(|beam| {
                let score = beam["sequence_score"].as_f64().expect("a score") as f32;
                (beam["item"].as_str().expect("a name").to_string(), score.to_bits())
            })
            .collect();
        assert_eq!(beams, expected, "/generate");

        let body = json!({ "prompt": tokens, "n": 10, "best_of": 20 });
        let completion = post(server.http(), "/v1/completions", &body).json();
        assert_eq!(found(&completion["choices"]), expected, "/v1/completions");

        let body = json!({
            "parameters": { "beams": 20 },
            "inputs": [{
                "name": "history", "datatype": "BYTES", "shape": [history.len()], "data": history,
            }],
        });
        let inferred = post(server.http(), "/v2/models/industrial/infer", &body).json();
        let output = |name: &str| {
            let outputs = inferred["outputs"].as_array().expect("outputs");
            outputs.iter().find(|output| output["name"] == name).expect("there")["data"].clone()
        };
        let (items, scores) = (output("items"), output("scores"));
        let names = items.as_array().expect("a list").iter();
        let scores = scores.as_array().expect("a list").iter();
        let inferred: Found = names
            .zip(scores)
            .map(|(name, score)| {
                let score = score.as_f64().expect("a score") as f32;
                (name.as_str().expect("a name").to_string(), score.to_bits())
            })
            .collect();
        assert_eq!(inferred, expected, "/v2");
    }
}

/// A folder whose network gives vectors or scores candidates, with one of its golden requests.
fn whole(folder: &str) -> (ServerOptions, Recommender, Value) {
    let items = format!("{folder}/items.jsonl");
    let mut options = options();
    options.models = vec![ModelSource::new(folder, &items)];
    let catalog = Arc::new(Catalog::open(Path::new(&items)).expect("items"));
    let own = RecommenderOptions::new("cpu").with_threads(1);
    let library = Recommender::open(Path::new(folder), catalog, &own).expect("a folder");
    let golden = fs::read(format!("{folder}/golden.json")).expect("a golden file");
    let golden: Value = serde_json::from_slice(&golden).expect("JSON");
    let case = &golden["cases"][2];
    let request = match case.get("request") {
        Some(request) => request.clone(),
        None => json!({"history": case["history"], "time": case["time"]}),
    };
    (options, library, request)
}

#[test]
fn networks_that_give_vectors_or_scores_are_served_as_the_library_serves_them() {
    for folder in ["models/sasrec/recbole-small", "models/hstu/small", "models/dlrm_hstu/small"] {
        let (options, library, body) = whole(folder);
        let server = start(&options);
        let address = server.http();
        let line = sidereal::wire::RequestLine::parse(&body.to_string()).expect("a request");
        let defaults = sidereal::wire::RequestDefaults::default();
        let request = line.to_request(&defaults).expect("a request");
        let answer = library.recommend(&request).expect("an answer");
        let expected: Found =
            answer.items.iter().map(|found| (found.item.clone(), found.score.to_bits())).collect();
        assert!(!expected.is_empty());
        let alone = post(address, "/v1/recommend", &body).json();
        assert_eq!(found(&alone["items"]), expected, "{folder}: {alone}");
        for (line, found) in alone["items"].as_array().expect("items").iter().zip(&answer.items) {
            for task in &found.tasks {
                let score = line["tasks"][&*task.task].as_f64().map(|score| score as f32);
                assert_eq!(score, Some(task.score), "{line}");
            }
        }
        let batch = post(address, "/v1/recommend", &json!({"requests": [body, body]})).json();
        assert_eq!(found(&batch["answers"][1]["items"]), expected, "{folder}: {batch}");
        // Ranked, candidates have the scores of a search.
        let mut ranked = body.clone();
        let names: Vec<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        if ranked.get("candidates").is_none() {
            ranked["candidates"] = json!(names);
        }
        let ranked = post(address, "/v1/rank", &ranked).json();
        assert_eq!(found(&ranked["items"]), expected, "{folder}: {ranked}");
        let refused =
            post(address, "/v1/recommend", &json!({"history": body["history"], "seed": 4}));
        assert!([400, 422].contains(&refused.status), "{folder}: {refused:?}");
        let models = get(address, "/v1/models").json();
        assert_eq!(models["data"][0]["ready"], true, "{models}");
        let model = folder.rsplit('/').next().expect("a name");
        let answered =
            format!("sidereal_requests_answered_total{{model=\"{model}\",version=\"1\"}}");
        assert!(metric(address, &answered) >= 4.0, "{folder}");
    }
}

/// `/v2` has tensors for items; times and features are parameters of the request.
#[test]
fn a_network_that_reads_items_alone_is_served_by_tensors() {
    let (options, library, body) = whole("models/gru4rec/small");
    let server = start(&options);
    let history = &body["history"];
    let names: Vec<String> = serde_json::from_value(history.clone()).expect("names");
    let infer = json!({
        "inputs": [{"name": "history", "datatype": "BYTES", "shape": [names.len()], "data": history}],
    });
    let answer = library.recommend(&Request::from_history(names)).expect("an answer");
    let inferred = post(server.http(), "/v2/models/small/infer", &infer).json();
    let outputs = inferred["outputs"].as_array().expect("outputs");
    let items = outputs.iter().find(|output| output["name"] == "items").expect("items");
    let names: Vec<&str> = answer.items.iter().map(|found| &*found.item).collect();
    assert_eq!(items["data"], json!(names));
}

#[test]
fn a_batch_has_an_answer_or_an_error_for_each_request() {
    let server = start(&options());
    let body = json!({ "requests": [
        { "id": "a", "history": ["168"] }, { "id": "b", "history": ["no such item"] }, 7,
        { "id": "d", "history": ["168"], "tops": 3 }, { "id": "e", "history": ["278"] },
    ]});
    let answers = post(server.http(), "/v1/recommend", &body).json()["answers"].take();
    let kinds: Vec<(Value, Value)> = answers
        .as_array()
        .expect("a list")
        .iter()
        .map(|answer| (answer["id"].clone(), answer["error"]["code"].clone()))
        .collect();
    let expected = [
        (json!("a"), Value::Null),
        (json!("b"), json!("unknown_item")),
        (Value::Null, json!("malformed_request")),
        (Value::Null, json!("malformed_request")),
        (json!("e"), Value::Null),
    ];
    assert_eq!(kinds, expected);
    let both = json!({ "requests": [], "top_k": 3 });
    assert_eq!(post(server.http(), "/v1/recommend", &both).status, 400);
    assert_eq!(
        post(server.http(), "/v1/recommend", &json!({ "requests": [] })).json(),
        json!({ "answers": [] })
    );
}

#[test]
fn ranking_and_scoring_need_candidates_and_give_their_scores() {
    let server = start(&options());
    let line = json!({ "history": ["168", "278"], "candidates": ["278", "9", "no such item"] });
    let ranked = post(server.http(), "/v1/rank", &line).json();
    let scored = post(server.http(), "/v1/score", &line).json();
    let by_name: BTreeMap<String, u32> = found(&ranked["items"]).into_iter().collect();
    let scores: Vec<Option<u32>> = scored["scores"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|score| score.as_f64().map(|score| (score as f32).to_bits()))
        .collect();
    assert_eq!(scores, [Some(by_name["278"]), Some(by_name["9"]), None]);
    assert!(scored["items"][0]["log_probs"]["vocabulary"].is_array());
    let without = post(server.http(), "/v1/rank", &json!({ "history": ["168"] }));
    assert_eq!((without.status, without.code()), (400, "invalid_field".into()));
}

#[test]
fn what_is_no_request_is_refused_with_its_status() {
    let mut options = options();
    options.limits.body_bytes = 1 << 16;
    options.limits.batch = 4;
    let server = start(&options);
    let address = server.http();
    let raw = |headers: &str, body: &[u8]| {
        send(address, &request("POST", "/v1/recommend", headers, body))
    };
    let deep = "[".repeat(50_000);
    let cases = [
        (raw("", b""), 400),
        (raw("", b"{"), 400),
        (raw("", b"[]"), 400),
        (raw("", b"{\"history\": [\"\xff\"]}"), 400),
        (raw("", deep.as_bytes()), 400),
        (raw("", format!("{{\"history\": {deep}").as_bytes()), 400),
        (raw("", b"{\"history\": [\"168\"], \"beams\": -1}"), 400),
        (raw("", b"{\"history\": [\"168\"], \"beams\": 99999999999999999999}"), 400),
        (raw("", b"{\"history\": [\"no such item\"]}"), 422),
        (raw("", b"{}"), 422),
        (raw("", &vec![b' '; (1 << 16) + 1]), 413),
        (raw("content-encoding: gzip\r\n", b"\x1f\x8b"), 415),
        (raw("sidereal-timeout-ms: soon\r\n", b"{\"history\": [\"168\"]}"), 400),
        (raw("sidereal-timeout-ms: 0\r\n", b"{\"history\": [\"168\"]}"), 408),
        (post(address, "/v1/recommend?model=other", &json!({ "history": ["168"] })), 404),
        (post(address, "/v1/recommend?version=2", &json!({ "history": ["168"] })), 404),
        (post(address, "/v1/recommend?version=-1", &json!({ "history": ["168"] })), 404),
        (post(address, "/v1/recommend?modell=x", &json!({ "history": ["168"] })), 400),
        (post(address, "/v1/recommend", &json!({ "requests": [1, 2, 3, 4, 5] })), 422),
        (post(address, "/v1/nothing", &json!({})), 404),
        (get(address, "/v1/recommend"), 405),
        (post(address, "/generate", &json!({})), 400),
        (post(address, "/generate", &json!({ "input_ids": [] })), 422),
        (
            post(address, "/generate", &json!({ "input_ids": [1], "sampling_params": { "n": 0 } })),
            400,
        ),
        (post(address, "/generate", &json!({ "input_ids": ["x"] })), 400),
        (
            post(
                address,
                "/generate",
                &json!({ "input_ids": [1], "sampling_params": { "max_new_tokens": 1 } }),
            ),
            400,
        ),
        (post(address, "/v1/completions", &json!({ "prompt": [[1], [2]] })), 400),
        (post(address, "/v1/completions", &json!({ "prompt": "text for a model without" })), 422),
        (post(address, "/v1/catalog/changes", &json!({ "changes": [{ "puts": {} }] })), 422),
        (post(address, "/v1/catalog/changes", &json!({ "change": [] })), 400),
        (post(address, "/v1/catalog/base", &json!({ "path": "/no such file" })), 500),
        (get(address, "/v1/catalog/items/no%20such%20item"), 404),
    ];
    for (at, (response, status)) in cases.iter().enumerate() {
        assert_eq!(response.status, *status, "case {at}: {response:?}");
        assert!(response.json()["error"]["message"].is_string(), "case {at}: {response:?}");
    }
    // A length that is announced is not waited for.
    let began = Instant::now();
    let huge = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 10995116277760\r\n\r\n";
    assert_eq!(send(address, huge).status, 413);
    assert!(began.elapsed() < Duration::from_secs(10));
    // Every request that was refused is counted, whatever its door.
    for door in ["json", "generate", "completions"] {
        let refused =
            format!("sidereal_requests_total{{door=\"{door}\",outcome=\"caller_error\"}}");
        assert!(metric(address, &refused) >= 1.0, "{door}");
    }
    // After all of that it answers.
    assert_eq!(post(address, "/v1/recommend", &json!({ "history": ["168"] })).status, 200);
}

#[test]
fn tensors_that_lie_are_refused() {
    let server = start(&options());
    let infer = |body: Value| post(server.http(), "/v2/models/industrial/infer", &body);
    let input = |shape: Value, data: Value| json!({ "inputs": [{ "name": "history", "datatype": "BYTES", "shape": shape, "data": data }] });
    let huge = 1u64 << 62;
    for body in [
        json!({}),
        json!({ "inputs": [] }),
        input(json!([-1]), json!(["168"])),
        input(json!([2]), json!(["168"])),
        input(json!([huge, huge]), json!(["168"])),
        input(json!([1]), json!([{ "a": 1 }])),
        json!({ "inputs": [{ "name": "history", "datatype": "BYTES", "shape": [1] }] }),
        json!({ "inputs": [{ "name": "history", "datatype": "FP8", "shape": [1], "data": ["168"] }] }),
        json!({ "inputs": [{ "name": "histories", "datatype": "BYTES", "shape": [1], "data": ["168"] }] }),
        json!({ "parameters": { "beam": 3 }, "inputs": [{ "name": "history", "datatype": "BYTES", "shape": [1], "data": ["168"] }] }),
        json!({ "outputs": [{ "name": "logits" }], "inputs": [{ "name": "history", "datatype": "BYTES", "shape": [1], "data": ["168"] }] }),
        json!({ "inputs": [{ "name": "history", "datatype": "BYTES", "shape": [1], "parameters": { "binary_data_size": 99 } }] }),
    ] {
        let response = infer(body.clone());
        assert!([400, 422].contains(&response.status), "{body}: {response:?}");
        assert!(response.json()["error"].is_string(), "{body}: the protocol's form");
    }
    // JSON, then tensors in binary, as clients send by default.
    let head = json!({ "id": "7", "inputs": [{
        "name": "history", "datatype": "BYTES", "shape": [2], "parameters": { "binary_data_size": 14 },
    }], "outputs": [{ "name": "scores", "parameters": { "binary_data": true } }]})
    .to_string();
    let raw = b"\x03\x00\x00\x00168\x03\x00\x00\x00278";
    let body = [head.as_bytes(), raw].concat();
    let header = format!("Inference-Header-Content-Length: {}\r\n", head.len());
    let path = "/v2/models/industrial/infer";
    let response = send(server.http(), &request("POST", path, &header, &body));
    let length: usize =
        response.headers["inference-header-content-length"].parse().expect("a length");
    let answer: Value = serde_json::from_slice(&response.body[..length]).expect("JSON");
    assert_eq!((&answer["id"], &answer["outputs"][0]["shape"]), (&json!("7"), &json!([1, 10])));
    assert_eq!(response.body.len() - length, 40);
    for length in [0, head.len() - 1, body.len() + 1] {
        let header = format!("Inference-Header-Content-Length: {length}\r\n");
        assert_eq!(send(server.http(), &request("POST", path, &header, &body)).status, 400);
    }
}

#[test]
fn tokens_open_what_they_are_for() {
    let mut options = options();
    options.read_token = Some("reader".into());
    options.write_token = Some("writer".into());
    let server = start(&options);
    let call = |path: &str, token: &str, body: &str| {
        let header = format!("authorization: Bearer {token}\r\n");
        send(server.http(), &request("POST", path, &header, body.as_bytes()))
    };
    let (recommend, line) = ("/v1/recommend", r#"{"history": ["168"]}"#);
    let (change, batch) = ("/v1/catalog/changes", r#"{"changes": [{"delete": {"item": "9"}}]}"#);
    for (path, body, token, status) in [
        (recommend, line, "reader", 200),
        (recommend, line, "writer", 200),
        (recommend, line, "guess", 401),
        (change, batch, "reader", 403),
        (change, batch, "guess", 401),
        (change, batch, "writer", 200),
        ("/v2/repository/models/industrial/load", "", "reader", 403),
    ] {
        assert_eq!(call(path, token, body).status, status, "{path} with {token}");
    }
    let from_page = |origin: &str| {
        let headers = format!("authorization: Bearer writer\r\norigin: {origin}\r\n");
        send(server.http(), &request("POST", change, &headers, batch.as_bytes())).status
    };
    assert_eq!(
        (from_page("http://x"), from_page("http://other"), from_page("null")),
        (200, 403, 403)
    );
    let without = post(server.http(), recommend, &json!({ "history": ["168"] }));
    assert_eq!(without.status, 401);
    assert_eq!(without.headers["www-authenticate"], "Bearer");
    for open in ["/health", "/healthz", "/v2/health/live", "/v2/health/ready", "/metrics", "/"] {
        assert_eq!(get(server.http(), open).status, 200, "{open}");
    }
    let metrics = String::from_utf8(get(server.http(), "/metrics").body).expect("text");
    assert!(metrics.contains("sidereal_refused_tokens_total 5\n"), "{metrics}");
}

/// Stops the engine between two steps while the guard lives.
#[derive(Clone, Default)]
struct Brake {
    lock: Arc<Mutex<()>>,
    is_reached: Arc<AtomicBool>,
}

impl Brake {
    fn install(&self, options: &mut ServerOptions) {
        let brake = self.clone();
        options.recommender = options.recommender.clone().with_before_step(move |_| {
            brake.is_reached.store(true, Ordering::SeqCst);
            drop(brake.lock.lock());
            brake.is_reached.store(false, Ordering::SeqCst);
        });
    }

    fn hold(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().expect("no holder panics")
    }

    fn wait_until_reached(&self) {
        wait_for(|| self.is_reached.load(Ordering::SeqCst));
    }
}

fn wait_for(mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < until, "it never came to be");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn metric(address: SocketAddr, sample: &str) -> f64 {
    let text = String::from_utf8(get(address, "/metrics").body).expect("text");
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no sample {sample}")).parse().expect("a number")
}

#[test]
fn an_overloaded_server_refuses_at_once_and_says_when_to_come_again() {
    let (mut options, brake) = (options(), Brake::default());
    brake.install(&mut options);
    options.recommender = options.recommender.with_max_queued(3);
    let server = start(&options);
    let address = server.http();
    let line = json!({ "history": ["168"] });
    let held = brake.hold();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| post(address, "/v1/recommend", &line).status);
        brake.wait_until_reached();
        let others: Vec<_> =
            (0..2).map(|_| scope.spawn(|| post(address, "/v1/recommend", &line).status)).collect();
        wait_for(|| {
            metric(address, "sidereal_requests_waiting{model=\"industrial\",version=\"1\"}") >= 3.0
        });
        let refused = post(address, "/v1/recommend", &line);
        assert_eq!((refused.status, refused.code()), (429, "overloaded".into()));
        let seconds: u64 = refused.headers["retry-after"].parse().expect("a number");
        assert!(seconds >= 1);
        drop(held);
        for call in others.into_iter().chain([first]) {
            assert_eq!(call.join().expect("no panic"), 200);
        }
    });
    let refused = "sidereal_requests_total{door=\"json\",outcome=\"overloaded\"}";
    assert!(metric(address, refused) >= 1.0);
}

#[test]
fn a_client_that_goes_away_cancels_its_request() {
    let (mut options, brake) = (options(), Brake::default());
    brake.install(&mut options);
    let server = start(&options);
    let held = brake.hold();
    let mut stream = TcpStream::connect(server.http()).expect("the server listens");
    let body = br#"{"history": ["168"]}"#;
    stream.write_all(&request("POST", "/v1/recommend", "", body)).expect("sent");
    brake.wait_until_reached();
    drop(stream);
    let cancelled = "sidereal_requests_total{door=\"json\",outcome=\"cancelled\"}";
    wait_for(|| metric(server.http(), cancelled) >= 1.0);
    drop(held);
    let engine = "sidereal_requests_cancelled_total{model=\"industrial\",version=\"1\"}";
    wait_for(|| metric(server.http(), engine) >= 1.0);
    // What it held is free again, and others are answered.
    assert_eq!(post(server.http(), "/v1/recommend", &json!({ "history": ["168"] })).status, 200);
}

#[test]
fn slow_clients_are_not_waited_for() {
    let mut options = options();
    options.limits.header_time = Duration::from_millis(200);
    options.limits.body_time = Duration::from_millis(200);
    let server = start(&options);
    let mut silent = TcpStream::connect(server.http()).expect("the server listens");
    silent.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
    silent.write_all(b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\n").expect("sent");
    let mut answer = Vec::new();
    let _ = silent.read_to_end(&mut answer); // it is closed, with or without a word
    let head = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{";
    assert_eq!(send(server.http(), head).status, 408);
    let flood = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(50_000));
    assert!([400, 431].contains(&send(server.http(), flood.as_bytes()).status));
    wait_for(|| metric(server.http(), "sidereal_connections") <= 1.0);
}

#[test]
fn a_server_that_ends_finishes_what_runs_and_refuses_the_rest() {
    let (mut options, brake) = (options(), Brake::default());
    brake.install(&mut options);
    let server = start(&options);
    let address = server.http();
    let held = brake.hold();
    std::thread::scope(|scope| {
        let running =
            scope.spawn(|| post(address, "/v1/recommend", &json!({ "history": ["168"] })).status);
        brake.wait_until_reached();
        // A connection that is open and idle, and used again while the server ends.
        let mut open = TcpStream::connect(address).expect("the server listens");
        open.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").expect("sent");
        let mut bytes = [0; 15];
        open.read_exact(&mut bytes).expect("an answer");
        let ending = scope.spawn(move || server.shutdown());
        wait_for(|| TcpStream::connect(address).is_err());
        drop(held);
        assert_eq!(running.join().expect("no panic"), 200);
        ending.join().expect("no panic");
    });
}

#[test]
fn changes_are_seen_once_and_survive_the_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let compiled = folder.path().join("c.sidereal");
    Catalog::open(Path::new(ITEMS)).and_then(|catalog| catalog.save(&compiled)).expect("a catalog");
    let mut options = options();
    options.models[0].catalog = compiled.clone();
    let server = start(&options);
    let batch = json!({
        "changes": [
            { "put": { "item": "new", "sid": [1, 2, 3], "title": "A new one", "tags": ["fresh"] } },
            { "delete": { "item": "9" } },
        ],
        "watermark": { "source": "items", "partition": 0, "offset": 41 },
    });
    let first = post(server.http(), "/v1/catalog/changes", &batch).json();
    assert_eq!(first, json!({ "snapshot": 2, "applied": true }));
    let again = post(server.http(), "/v1/catalog/changes", &batch).json();
    assert_eq!(again, json!({ "snapshot": 2, "applied": false }));
    let item = get(server.http(), "/v1/catalog/items/new").json();
    assert_eq!(item["item"]["title"], "A new one");
    assert_eq!(get(server.http(), "/v1/catalog/items/9").status, 404);
    let only = json!({ "history": ["168"], "filter": "tag:fresh" });
    let answer = post(server.http(), "/v1/recommend", &only).json();
    assert_eq!((&answer["items"][0]["item"], &answer["snapshot"]), (&json!("new"), &json!(2)));
    let behind = json!({ "history": ["168"], "min_snapshot": 3 });
    assert_eq!(post(server.http(), "/v1/recommend", &behind).status, 503);
    let base = folder.path().join("base.sidereal");
    Catalog::open(Path::new(ITEMS)).and_then(|catalog| catalog.save(&base)).expect("a catalog");
    let replaced = post(server.http(), "/v1/catalog/base", &json!({ "path": base }));
    assert_eq!(replaced.json()["kept_batches"], 1, "{replaced:?}");
    server.shutdown();
    let server = start(&options);
    let catalog = get(server.http(), "/v1/catalog").json();
    assert_eq!(catalog["watermarks"][0], batch["watermark"]);
    assert_eq!(get(server.http(), "/v1/catalog/items/new").status, 200);
    assert!(Server::start(&options).is_err(), "a second writer");
    options.is_read_only = true;
    let reader = start(&options);
    assert_eq!(get(reader.http(), "/v1/catalog/items/new").status, 200);
    assert_eq!(post(reader.http(), "/v1/catalog/changes", &batch).status, 422);
}

#[test]
fn a_feed_is_followed_and_goes_on_where_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let (compiled, feed) = (folder.path().join("c.sidereal"), folder.path().join("feed.jsonl"));
    Catalog::open(Path::new(ITEMS)).and_then(|catalog| catalog.save(&compiled)).expect("a catalog");
    let put = |name: &str| json!({ "put": { "item": name, "sid": [1, 2, 3] } });
    fs::write(&feed, format!("{}\nno JSON\n{}", put("a"), put("b"))).expect("a file");
    let mut options = options();
    options.models[0].catalog = compiled;
    options.feed = Some(feed.clone());
    let server = start(&options);
    let address = server.http();
    let has =
        |address, name: &str| get(address, &format!("/v1/catalog/items/{name}")).status == 200;
    wait_for(|| has(address, "a"));
    assert!(!has(address, "b"), "a line without its end is no line yet");
    let mut file = fs::OpenOptions::new().append(true).open(&feed).expect("the file");
    let bad = json!({ "put": { "item": "x", "sid": [1] } });
    writeln!(file, "\n{bad}\n{}", json!({ "op": "d", "before": { "item": "9" } }))
        .expect("written");
    wait_for(|| has(address, "b") && !has(address, "9"));
    wait_for(|| metric(address, "sidereal_feed_errors_total") == 2.0);
    let snapshot = get(address, "/v1/catalog").json()["snapshot"].clone();
    server.shutdown();
    let server = start(&options);
    std::thread::sleep(Duration::from_millis(300));
    let catalog = get(server.http(), "/v1/catalog").json();
    assert_eq!(catalog["snapshot"], snapshot, "nothing is applied twice");
    let length = fs::metadata(&feed).expect("the file").len();
    assert_eq!(catalog["watermarks"][0]["offset"], length);
}

#[test]
fn versions_answer_side_by_side_and_models_are_exchanged_while_serving() {
    let mut options = options();
    let source = ModelSource::new(FOLDER, ITEMS);
    options.models = vec![
        source.clone().named("shop", 1).expect("a name"),
        source.clone().named("shop", 2).expect("a name"),
        source.named("other", 1).expect("a name"),
    ];
    let server = start(&options);
    let address = server.http();
    let line = json!({ "history": ["168"] });
    let version = |query: &str| {
        let answer = post(address, &format!("/v1/recommend{query}"), &line).json();
        (answer["model"].clone(), answer["model_version"].clone())
    };
    assert_eq!(version(""), (json!("shop"), json!(2)));
    assert_eq!(version("?version=1"), (json!("shop"), json!(1)));
    assert_eq!(version("?model=other"), (json!("other"), json!(1)));
    assert_eq!(get(address, "/v2/models/shop").json()["versions"], json!(["1", "2"]));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut answered = 0;
            while !is_over.load(Ordering::Relaxed) {
                let response = post(address, "/v1/recommend?model=shop", &line);
                assert!([200, 503].contains(&response.status), "{response:?}");
                answered += u32::from(response.status == 200);
            }
            answered
        });
        for _ in 0..3 {
            assert_eq!(post(address, "/v2/repository/models/shop/load", &json!({})).status, 200);
        }
        is_over.store(true, Ordering::Relaxed);
        assert!(load.join().expect("no panic") > 0);
    });
    assert_eq!(post(address, "/v2/repository/models/other/unload", &json!({})).status, 200);
    assert_eq!(post(address, "/v1/recommend?model=other", &line).status, 404);
    assert_eq!(get(address, "/v2/health/ready").status, 503);
    let index = post(address, "/v2/repository/index", &json!({})).json();
    let state = |name: &str| {
        let entries = index.as_array().expect("a list").iter();
        entries.filter(|entry| entry["name"] == name).map(|entry| entry["state"].clone()).next()
    };
    assert_eq!((state("other"), state("shop")), (Some(json!("UNAVAILABLE")), Some(json!("READY"))));
    assert_eq!(post(address, "/v2/repository/models/other/load", &json!({})).status, 200);
    assert_eq!(version("?model=other").1, 1);
    // Changes of a catalog in memory outlast an exchange of all its models.
    let batch = json!({ "changes": [{ "delete": { "item": "9" } }] });
    assert_eq!(post(address, "/v1/catalog/changes", &batch).status, 200);
    for name in ["shop", "other"] {
        let path = |what| format!("/v2/repository/models/{name}/{what}");
        assert_eq!(post(address, &path("unload"), &json!({})).status, 200);
    }
    for name in ["shop", "other"] {
        let path = |what| format!("/v2/repository/models/{name}/{what}");
        assert_eq!(post(address, &path("load"), &json!({})).status, 200);
    }
    assert_eq!(get(address, "/v1/catalog/items/9").status, 404);
    assert_eq!(post(address, "/v2/repository/models/none/load", &json!({})).status, 404);
}

#[test]
fn metrics_are_of_at_least_forty_families() {
    let server = start(&options());
    assert_eq!(post(server.http(), "/v1/recommend", &json!({ "history": ["168"] })).status, 200);
    let text = String::from_utf8(get(server.http(), "/metrics").body).expect("text");
    let families: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let mut names = families.clone();
    names.sort_unstable();
    names.dedup();
    assert_eq!(families.len(), names.len(), "a family stands once");
    assert!(families.len() >= 40, "{}", families.len());
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').expect("a name and a value");
        assert!(name.starts_with("sidereal_"), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    assert_eq!(
        metric(server.http(), "sidereal_requests_total{door=\"json\",outcome=\"answered\"}"),
        1.0
    );
}

#[test]
fn what_the_page_and_the_description_name_is_there() {
    let server = start(&options());
    let page = String::from_utf8(get(server.http(), "/").body).expect("text");
    assert!(page.contains("<title>Sidereal</title>"));
    let document = get(server.http(), "/openapi.json").json();
    let paths = document["paths"].as_object().expect("paths");
    assert!(paths.len() > 20);
    for (path, item) in paths {
        let path = path.replace("{model}", "industrial").replace("{item}", "168");
        for method in item.as_object().expect("methods").keys() {
            if path.ends_with("load") {
                continue;
            }
            let call = request(&method.to_uppercase(), &path, "", b"{}");
            let status = send(server.http(), &call).status;
            assert!(![404, 405, 500].contains(&status), "{method} {path}: {status}");
        }
    }
}

#[test]
fn tls_is_spoken_where_there_is_a_certificate() {
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
    let mut options = options();
    let [certificates, key] = ["tests/tls/cert.pem", "tests/tls/key.pem"].map(Into::into);
    options.tls = Some(TlsFiles { certificates, key });
    let server = start(&options);
    let mut roots = RootCertStore::empty();
    let own = CertificateDer::from_pem_file("tests/tls/cert.pem").expect("a certificate");
    roots.add(own).expect("a root");
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("its own versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("a name");
    let session = ClientConnection::new(Arc::new(config), name).expect("a client");
    let stream = TcpStream::connect(server.http()).expect("the server listens");
    let mut stream = StreamOwned::new(session, stream);
    let body = br#"{"history": ["168"]}"#;
    stream.write_all(&request("POST", "/v1/recommend", "", body)).expect("sent");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(Response::parse(&answer).status, 200);
    // Plain text to it is no request, and nobody else is disturbed.
    let mut plain = TcpStream::connect(server.http()).expect("the server listens");
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"));
    options.tls = Some(TlsFiles { certificates: ITEMS.into(), key: ITEMS.into() });
    assert!(Server::start(&options).is_err());
}
