//! Text in: tokens, chat templates and prompts as Python's programs make them, and layouts that come
//! from a tokenizer's files.
//!
//! `models/prompts.py` wrote what is expected, with Hugging Face's tokenizers and transformers and
//! with the published projects' own procedures. Tests with the tokenizers of published models are
//! ignored where those are not fetched: `.ci/get-tokenizers target/tokenizers`, then
//! `cargo test --test prompts -- --include-ignored`.
#![cfg(feature = "text")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sidereal::catalog::Catalog;
use sidereal::models::config::SidLayout;
use sidereal::models::vocabulary::Vocabulary;
use sidereal::prompt::Text;
use sidereal::{
    Engine, EngineOptions, Error, Input, NamedToken, Recommender, RecommenderOptions, Request,
};

#[path = "common/folders.rs"]
mod folders;

use folders::{Folder, QWEN3, T5, models, temp, write};

/// Items of an answer that are compared.
const TOP: usize = 20;

fn prompts(name: &str) -> PathBuf {
    models().join("prompts").join(name)
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> T {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The folder of a tokenizer: the small one of the repository, or a published one.
fn tokenizer(name: &str) -> PathBuf {
    if name == "small" {
        return models().join("prompts");
    }
    let fetched = std::env::var_os("SIDEREAL_TOKENIZERS").map(PathBuf::from);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = fetched.unwrap_or_else(|| root.join("target/tokenizers")).join(name);
    assert!(
        folder.join("tokenizer.json").exists(),
        "{} has no tokenizer.json: run .ci/get-tokenizers target/tokenizers",
        folder.display()
    );
    folder
}

fn fnv(bytes: impl IntoIterator<Item = u8>, value: u64) -> u64 {
    bytes
        .into_iter()
        .fold(value, |value, byte| (value ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

// Tokens.

#[derive(Deserialize)]
struct Item {
    item: String,
    sid: Vec<u16>,
    title: String,
}

fn items() -> Vec<Item> {
    let path = models().join("industrial/items.jsonl");
    let text = std::fs::read_to_string(path).expect("the demo's items");
    text.lines().map(|line| serde_json::from_str(line).expect("an item")).collect()
}

/// The text of a number, as `models/prompts.py` makes it.
fn text(number: usize, known: &[Item]) -> String {
    let title =
        |place: usize| known[(number * 7919 + place * 104_729) % known.len()].title.as_str();
    let titles: Vec<&str> = (0..number % 5 + 1).map(title).collect();
    let frames = [
        "{}",
        "The user bought {} and",
        "\n\n### Input:\n{}\n",
        "  {}\t",
        "用户浏览了：{}。Ça va? ½ 😀 {}",
        "<|im_start|>user\n{}",
    ];
    frames[number % frames.len()].replace("{}", &titles.join(", "))
}

fn check_tokens(name: &str) {
    let expected: BTreeMap<String, Vec<String>> = read(&prompts("tokens.json"));
    let folder = tokenizer(name);
    let tokenizer = Text::of_folder(&folder, Vocabulary::of_folder(&folder));
    let known = items();
    assert_eq!(expected[name].len(), 100);
    for (hundred, expected) in expected[name].iter().enumerate() {
        let mut value = FNV_START;
        for number in hundred * 100..hundred * 100 + 100 {
            let text = text(number, &known);
            let with: &[bool] = if number % 10 == 0 { &[false, true] } else { &[false] };
            for &special in with {
                let tokens = tokenizer.tokens(&text, special).expect("a text");
                let ids = tokens.iter().copied().chain([u32::MAX]);
                value = fnv(ids.flat_map(u32::to_le_bytes), value);
            }
        }
        assert_eq!(format!("{value:016x}"), *expected, "{name}, texts from {}", hundred * 100);
    }
}

macro_rules! published {
    ($($test:ident: $check:ident($name:expr);)+) => {$(
        #[test]
        #[ignore = "needs .ci/get-tokenizers target/tokenizers"]
        fn $test() {
            $check($name);
        }
    )+};
}

#[test]
fn tokens_are_pythons() {
    check_tokens("small");
}

published! {
    tokens_of_deepseek_v3_are_pythons: check_tokens("deepseek_v3");
    tokens_of_gemma3_are_pythons: check_tokens("gemma3");
    tokens_of_gptoss_are_pythons: check_tokens("gptoss");
    tokens_of_llama2_are_pythons: check_tokens("llama2");
    tokens_of_llama3_are_pythons: check_tokens("llama3");
    tokens_of_llama3_1_are_pythons: check_tokens("llama3_1");
    tokens_of_qwen3_are_pythons: check_tokens("qwen3");
}

// Chat templates.

#[derive(Deserialize)]
struct Chats {
    own_template: String,
    cases: BTreeMap<String, Vec<ChatCase>>,
}

#[derive(Deserialize)]
struct ChatCase {
    messages: Vec<Value>,
    variables: Map<String, Value>,
    /// `None` where the template refuses the messages.
    hash: Option<String>,
    #[serde(default)]
    text: Option<String>,
}

fn check_chat(name: &str) {
    let chats: Chats = read(&prompts("chat.json"));
    let own = temp();
    let folder = match name {
        "small" => {
            write(&own, "chat_template.jinja", &chats.own_template);
            write(&own, "tokenizer_config.json", r#"{"bos_token": "<|im_start|>"}"#);
            own.path().to_path_buf()
        }
        _ => tokenizer(name),
    };
    let model = Text::of_folder(&folder, Vocabulary::of_folder(&folder));
    assert!(chats.cases[name].len() >= 20);
    for (number, case) in chats.cases[name].iter().enumerate() {
        let rendered = model.chat(&case.messages, &case.variables);
        match &case.hash {
            Some(hash) => {
                let rendered = rendered.unwrap_or_else(|error| panic!("{name} {number}: {error}"));
                if let Some(text) = &case.text {
                    assert_eq!(&rendered, text, "{name} {number}");
                }
                let own = format!("{:016x}", fnv(rendered.bytes(), FNV_START));
                assert_eq!(own, *hash, "{name} {number}: {rendered:?}");
            }
            None => {
                let refused =
                    matches!(rendered, Err(Error::InvalidField { field: "messages", .. }));
                assert!(refused, "{name} {number}: {rendered:?}");
            }
        }
    }
}

#[test]
fn chat_templates_are_pythons() {
    check_chat("small");
}

published! {
    the_chat_template_of_deepseek_v3_is_pythons: check_chat("deepseek_v3");
    the_chat_template_of_gemma3_is_pythons: check_chat("gemma3");
    the_chat_template_of_llama3_is_pythons: check_chat("llama3");
    the_chat_template_of_llama3_1_is_pythons: check_chat("llama3_1");
    the_chat_template_of_qwen3_is_pythons: check_chat("qwen3");
}

// Prompts of published projects, and the answers to them.

#[derive(Deserialize)]
struct Golden {
    project: String,
    tokenizer: String,
    first_added: u32,
    added: Vec<String>,
    eos_token: String,
    bos_token: Option<String>,
    #[serde(default)]
    config: Option<Map<String, Value>>,
    #[serde(default)]
    tensors: BTreeMap<String, Vec<usize>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    history: Vec<String>,
    input_ids: Vec<u32>,
    #[serde(default)]
    items: Vec<String>,
    #[serde(default)]
    scores: Vec<f32>,
}

/// The weights of a tensor, by the formula of `models/prompts.py`.
fn weights(name: &str, count: usize) -> Vec<u8> {
    let start = fnv(name.bytes(), FNV_START);
    let value = |index: u64| {
        let mut z = start.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let uniform = (z >> 40) as f64 / f64::from(1 << 24) - 0.5;
        if name.contains("norm") { 1.0 + uniform / 2.0 } else { uniform }
    };
    (0..count as u64).flat_map(|index| (value(index) as f32).to_le_bytes()).collect()
}

impl Golden {
    fn of(project: &str, tokenizer: &str) -> Golden {
        let all: Vec<Golden> = read(&prompts("golden.json"));
        let mut all = all.into_iter();
        all.find(|golden| golden.project == project && golden.tokenizer == tokenizer)
            .expect("a case that models/prompts.py makes")
    }

    fn added(&self) -> impl Iterator<Item = (u32, &String)> {
        (self.first_added..).zip(&self.added)
    }

    /// The folder as training saves it. A slow tokenizer is saved without `tokenizer.json`.
    fn folder(&self, is_slow: bool) -> tempfile::TempDir {
        let folder = temp();
        let from = tokenizer(&self.tokenizer);
        let token = |content: &str| {
            json!({"content": content, "lstrip": false, "normalized": true, "rstrip": false,
                   "single_word": false, "special": false})
        };
        let mut config: Value = match self.tokenizer.as_str() {
            "small" => json!({}),
            _ => read(&from.join("tokenizer_config.json")),
        };
        config["eos_token"] = self.eos_token.clone().into();
        config["bos_token"] = json!(self.bos_token);
        let mut contents: Value = read(&from.join("tokenizer.json"));
        if is_slow {
            let of_tokenizer = contents["added_tokens"].as_array().expect("tokens").iter();
            let mut decoder: Map<String, Value> =
                of_tokenizer.map(|added| (added["id"].to_string(), added.clone())).collect();
            decoder.extend(self.added().map(|(id, text)| (id.to_string(), token(text))));
            config["added_tokens_decoder"] = decoder.into();
            let added: Map<String, Value> =
                self.added().map(|(id, text)| (text.clone(), id.into())).collect();
            write(&folder, "added_tokens.json", Value::from(added).to_string());
            write(&folder, "spiece.model", "not read");
        } else {
            let tokens = contents["added_tokens"].as_array_mut().expect("tokens");
            tokens.extend(self.added().map(|(id, text)| {
                let mut token = token(text);
                token["id"] = id.into();
                token
            }));
            write(&folder, "tokenizer.json", contents.to_string());
        }
        write(&folder, "tokenizer_config.json", config.to_string());
        if let Some(config) = &self.config {
            write(&folder, "config.json", Value::from(config.clone()).to_string());
            let data: Vec<(&String, &Vec<usize>, Vec<u8>)> = self
                .tensors
                .iter()
                .map(|(name, shape)| (name, shape, weights(name, shape.iter().product())))
                .collect();
            let views = data.iter().map(|(name, shape, data)| {
                let view = TensorView::new(Dtype::F32, shape.to_vec(), data);
                (name.as_str(), view.expect("as many weights as the shape says"))
            });
            let bytes = safetensors::serialize(views, None).expect("a checkpoint");
            write(&folder, "model.safetensors", bytes);
        }
        write(&folder, "sidereal.json", json!({"project": self.project}).to_string());
        folder
    }

    /// The first 60 items of the demo.
    fn catalog(&self, folder: &Path) -> Arc<Catalog> {
        let index: Map<String, Value> = items()
            .into_iter()
            .take(60)
            .map(|item| {
                let texts = item.sid.iter().zip(["a", "b", "c"]);
                let texts: Vec<String> =
                    texts.map(|(code, level)| format!("<{level}_{code}>")).collect();
                (item.item, texts.into())
            })
            .collect();
        let path = folder.join("items.index.json");
        std::fs::write(&path, Value::from(index).to_string()).expect("a writable folder");
        Arc::new(Catalog::open(&path).expect("sound items"))
    }

    fn check_answers(&self, is_slow: bool) {
        let folder = self.folder(is_slow);
        let catalog = self.catalog(folder.path());
        let options = EngineOptions::default().with_threads(1);
        let mut engine = Engine::open(folder.path(), catalog, &options).expect("a sound folder");
        for (number, case) in self.cases.iter().enumerate() {
            let name = format!("{} {} {number}", self.project, self.tokenizer);
            let input = Input::History(case.history.clone());
            assert_eq!(engine.input_tokens(&input).expect("tokens"), case.input_ids, "{name}");
            let request = Request::new(input).with_beams(64).with_top_k(TOP);
            let answer = engine.recommend(&request).expect("an answer");
            let found: Vec<&str> = answer.items.iter().map(|found| &*found.item).collect();
            assert_eq!(found, case.items, "{name}");
            for (found, score) in answer.items.iter().zip(&case.scores) {
                let difference = (found.score - score).abs();
                assert!(difference < 1e-4, "{name}: {} and {score}", found.score);
            }
        }
    }
}

#[test]
fn minionerecs_procedure_is_reproduced_from_text() {
    Golden::of("minionerec", "small").check_answers(false);
}

#[test]
fn letters_procedure_is_reproduced_from_the_files_of_a_slow_tokenizer() {
    Golden::of("letter", "small").check_answers(true);
}

#[test]
fn lc_recs_procedure_is_reproduced_from_text() {
    Golden::of("lc-rec", "small").check_answers(false);
}

#[test]
#[ignore = "needs .ci/get-tokenizers target/tokenizers"]
fn minionerecs_procedure_is_reproduced_with_the_tokenizer_of_qwen3() {
    Golden::of("minionerec", "qwen3").check_answers(false);
}

#[test]
#[ignore = "needs .ci/get-tokenizers target/tokenizers"]
fn lc_recs_procedure_is_reproduced_with_the_tokenizer_of_llama2() {
    Golden::of("lc-rec", "llama2").check_answers(false);
}

#[test]
#[ignore = "needs .ci/get-tokenizers target/tokenizers"]
fn prompts_of_forge_and_onerec_are_those_of_their_programs() {
    for project in ["forge", "onerec"] {
        let golden = Golden::of(project, "qwen3");
        let folder = golden.folder(false);
        write(&folder, "config.json", r#"{"architectures": ["Qwen3ForCausalLM"]}"#);
        let catalog = golden.catalog(folder.path());
        let layout = SidLayout::read_for(folder.path(), 1 << 20, Some(&catalog)).expect("a layout");
        let snapshot = catalog.snapshot();
        for case in &golden.cases {
            let request = Request::from_history(case.history.clone());
            let items: Vec<u32> =
                case.history.iter().map(|name| snapshot.find(name).expect("an item")).collect();
            let source = sidereal::prompt::Source {
                items: &items,
                snapshot: &snapshot,
                levels: &layout.levels,
                request: &request,
            };
            let rendered = layout.prompt.render(&source, usize::MAX).expect("a prompt");
            assert_eq!(rendered.tokens, case.input_ids, "{project}, {:?}", case.history);
        }
    }
}

#[test]
fn a_text_with_a_slow_tokenizer_is_refused_with_the_way_to_a_fast_one() {
    let golden = Golden::of("lc-rec", "small");
    let folder = golden.folder(true);
    let catalog = golden.catalog(folder.path());
    let options = EngineOptions::default().with_threads(1);
    let mut engine = Engine::open(folder.path(), catalog, &options).expect("a sound folder");
    let by_history = engine.recommend(&Request::from_history(["5"]));
    let by_text = engine.recommend(&Request::from_text("<a_1>"));
    for answer in [by_history, by_text] {
        let error = answer.expect_err("no tokenizer").to_string();
        for word in ["spiece.model", "save_pretrained"] {
            assert!(error.contains(word), "{error}");
        }
    }
    // Tokens go on to work.
    let case = &golden.cases[0];
    let request = Request::from_tokens(case.input_ids.clone()).with_beams(64).with_top_k(TOP);
    let answer = engine.recommend(&request).expect("an answer");
    let found: Vec<&str> = answer.items.iter().map(|found| &*found.item).collect();
    assert_eq!(found, case.items);
}

// Requests in text.

#[test]
fn a_text_is_answered_like_its_tokens_by_every_way_in() {
    let golden = Golden::of("minionerec", "small");
    let folder = golden.folder(false);
    write(&folder, "chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let catalog = golden.catalog(folder.path());
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let recommender = Recommender::open(folder.path(), catalog, &options).expect("a folder");
    let text = "What next, after <a_236>?";
    let model = Text::of_folder(folder.path(), Vocabulary::of_folder(folder.path()));
    let tokens = model.tokens(text, true).expect("tokens").to_vec();
    let expected = recommender.recommend(&Request::from_tokens(tokens)).expect("an answer");
    let messages = vec![json!({"role": "user", "content": text})];
    let requests = [Request::from_text(text), Request::from_messages(messages)];
    for request in &requests {
        let answer = recommender.recommend(request).expect("an answer");
        assert_eq!(answer.items, expected.items);
        let deferred = recommender.submit_deferred(request.clone()).expect("room");
        assert_eq!(deferred.wait().expect("an answer").items, expected.items);
    }
    let mut answered = [0; 3];
    let all = [requests[0].clone(), Request::from_history(["missing"]), requests[1].clone()];
    recommender.recommend_all(&all, |index, answer| {
        answered[index] += 1;
        if index != 1 {
            assert_eq!(answer.expect("an answer").items, expected.items);
        }
    });
    assert_eq!(answered, [1; 3]);
}

#[test]
fn what_a_template_or_tokenizer_cannot_do_is_the_requests_error() {
    let golden = Golden::of("minionerec", "small");
    let folder = golden.folder(false);
    write(&folder, "chat_template.jinja", "{{ raise_exception('roles must alternate') }}");
    let catalog = golden.catalog(folder.path());
    let options = EngineOptions::default().with_threads(1);
    let mut engine = Engine::open(folder.path(), Arc::clone(&catalog), &options).expect("a folder");
    let mut error = |request: Request| engine.recommend(&request).expect_err("refused").to_string();
    let message = json!({"role": "user", "content": "Hi"});
    assert!(error(Request::from_messages(vec![message])).contains("roles must alternate"));
    assert!(error(Request::from_text("")).contains("empty"));
    assert!(error(Request::from_text("a".repeat(5 << 20))).contains("bytes of text"));
    let layout = json!({"prompt": {"pieces": ["{{ query }}", {"items": "{{ sid }}"}]}});
    write(&folder, "sidereal.json", layout.to_string());
    let mut engine = Engine::open(folder.path(), catalog, &options).expect("a folder");
    let error = engine.recommend(&Request::from_history(["5"])).expect_err("refused").to_string();
    assert!(error.contains("variables"), "{error}");
    let variables = json!({"query": "a drill"}).as_object().cloned().expect("an object");
    let request = Request::from_history(["5"]).with_variables(variables);
    engine.recommend(&request).expect("an answer");
}

/// The tokens of a history by a prompt over the small tokenizer.
fn tokens_by(prompt: &Value, history: &[&str], user: Option<&str>) -> Result<Vec<u32>, Error> {
    let golden = Golden::of("minionerec", "small");
    let folder = golden.folder(false);
    write(&folder, "sidereal.json", json!({"prompt": prompt}).to_string());
    let catalog = golden.catalog(folder.path());
    let layout = SidLayout::read_for(folder.path(), 1 << 20, Some(&catalog))?;
    let snapshot = catalog.snapshot();
    let items: Vec<u32> = history.iter().filter_map(|name| snapshot.find(name)).collect();
    let mut request = Request::from_history(history.iter().copied());
    request.user = user.map(str::to_string);
    let levels = &layout.levels[..];
    let source =
        sidereal::prompt::Source { items: &items, snapshot: &snapshot, levels, request: &request };
    Ok(layout.prompt.render(&source, usize::MAX)?.tokens)
}

#[test]
fn pieces_are_encoded_alone_and_items_by_the_layout() {
    let golden = Golden::of("minionerec", "small");
    let folder = golden.folder(false);
    let model = Text::of_folder(folder.path(), Vocabulary::of_folder(folder.path()));
    let tokens = |text: &str| model.tokens(text, false).expect("tokens").to_vec();
    let sid = |item: usize| {
        let item = &items()[item];
        let levels = ["a", "b", "c"].iter().zip(&item.sid);
        levels.map(|(level, code)| format!("<{level}_{code}>")).collect::<String>()
    };
    let prompt = json!({"pieces": [
        "to", "gether ",
        {"items": "{{ number }}. {{ sid }}", "separator": "; ", "trailing_separator": true},
        {"tokens": [7, "<|end|>"]},
        {"user": {"first_token": 20, "bins": 10}},
    ]});
    let found = tokens_by(&prompt, &["3", "5"], Some("123")).expect("a prompt");
    let mut expected = [tokens("to"), tokens("gether ")].concat();
    for (number, item) in [(1, 3), (2, 5)] {
        expected.extend(tokens(&format!("{number}. ")));
        expected.extend(tokens(&sid(item)));
        expected.extend(tokens("; "));
    }
    expected.extend([7, tokens("<|end|>")[0], 23]);
    assert_eq!(found, expected);
    let error = tokens_by(&prompt, &["3"], None).expect_err("no user").to_string();
    assert!(error.contains("user"), "{error}");
}

#[test]
fn a_prompt_that_is_too_long_loses_its_oldest_items_or_the_side_that_it_names() {
    let history = ["3", "5", "8", "9"];
    let whole = |more: Value| {
        let mut prompt = json!({"prefix": [1], "suffix": [2], "separator": [3]});
        prompt.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("one"));
        tokens_by(&prompt, &history, None).expect("a prompt")
    };
    let all = whole(json!({}));
    assert_eq!(all.len(), 2 + 4 * 3 + 3);
    let two = [&[1][..], &all[9..]].concat();
    for max in [9, 10, 12] {
        assert_eq!(whole(json!({"max_tokens": max})), two, "{max}");
    }
    assert_eq!(whole(json!({"max_tokens": 17})), all);
    let newest = [&[1][..], &all[13..]].concat();
    assert_eq!(whole(json!({"max_tokens": 3})), newest, "the newest item stays");
    assert_eq!(whole(json!({"max_tokens": 5, "cut": "start"})), all[12..]);
    assert_eq!(whole(json!({"max_tokens": 5, "cut": "end"})), all[..5]);
}

#[test]
fn a_prompt_that_makes_no_sense_is_refused_with_its_place() {
    for (prompt, word) in [
        (json!({"pieces": ["{% for %}"]}), "template"),
        (json!({"pieces": [{"text": "a", "tokens": [1]}]}), "piece 0"),
        (json!({"pieces": [{"item": "{{ sid }}"}]}), "piece 0"),
        (json!({"pieces": [], "prefix": [1]}), "either"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"prefix": [1.5]}), "1.5"),
        (json!({"prefix": {"text": "a"}}), "text"),
        (json!({"suffix": [1 << 21]}), "vocabulary"),
    ] {
        let error = tokens_by(&prompt, &["3"], None).expect_err("refused").to_string();
        assert!(error.contains(word) && error.contains("sidereal.json"), "{error:?}, {word:?}");
    }
}

// Layouts from a tokenizer's files.

/// A checkpoint whose tokens were added in the order of their texts, those that occur alone.
fn in_text_order(case: &str, tokens: impl Fn(&[String]) -> Vec<(&'static str, String)>) -> Folder {
    let folder = Folder::of(case);
    let snapshot = folder.catalog();
    let codes = (0..3).map(|level| snapshot.codes_at(level).collect::<BTreeSet<u16>>());
    let mut texts: Vec<String> = Vec::new();
    for (level, codes) in ["a", "b", "c", "d"].iter().zip(codes) {
        texts.extend(codes.iter().map(|code| format!("<{level}_{code}>")));
    }
    texts.sort();
    for (file, contents) in tokens(&texts) {
        folder.write(file, contents);
    }
    folder
}

fn numbered(texts: &[String]) -> impl Iterator<Item = (u32, &String)> {
    (30..).zip(texts)
}

fn fast(texts: &[String]) -> Vec<(&'static str, String)> {
    let added: Vec<Value> =
        numbered(texts).map(|(id, content)| json!({"id": id, "content": content})).collect();
    vec![("tokenizer.json", json!({"added_tokens": added}).to_string())]
}

#[test]
fn a_layout_comes_from_whatever_file_the_tokenizer_wrote() {
    let by_template = in_text_order(QWEN3, fast);
    by_template.write(
        "sidereal.json",
        r#"{"levels": [{"size": 256, "template": "<a_{}>"},
        {"template": "<b_{}>"}, {"template": "<c_{}>"}]}"#,
    );
    let request = Request::from_history(["168", "278"]).with_beams(20);
    let expected = by_template.open().expect("a layout").recommend(&request).expect("an answer");
    let added = |texts: &[String]| {
        let tokens: Map<String, Value> =
            numbered(texts).map(|(id, text)| (text.clone(), id.into())).collect();
        vec![("added_tokens.json", Value::from(tokens).to_string())]
    };
    let decoder = |texts: &[String]| {
        let tokens: Map<String, Value> = numbered(texts)
            .map(|(id, text)| (id.to_string(), json!({"content": text, "special": false})))
            .collect();
        let config = json!({"added_tokens_decoder": tokens}).to_string();
        vec![("tokenizer_config.json", config)]
    };
    let folders =
        [in_text_order(QWEN3, fast), in_text_order(QWEN3, added), in_text_order(QWEN3, decoder)];
    for folder in folders {
        folder.remove("sidereal.json");
        let answer = folder.open().expect("a layout").recommend(&request).expect("an answer");
        assert_eq!(answer.items, expected.items);
    }
}

#[test]
fn a_layout_that_the_tokenizer_contradicts_is_an_error_with_the_first_contradiction() {
    let folder = in_text_order(QWEN3, fast);
    let snapshot = folder.catalog();
    let mut first = 30;
    let level = |level| {
        let size = snapshot.codes_at(level).collect::<BTreeSet<u16>>().len();
        first += size;
        json!({"size": size, "first_token": first - size})
    };
    let layout = json!({"levels": (0..3).map(level).collect::<Vec<Value>>()});
    folder.write("sidereal.json", layout.to_string());
    let error = folder.open().err().expect("a contradiction").to_string();
    for word in ["level 0", "token 3", "<a_", "template"] {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn two_files_that_say_different_tokens_are_an_error() {
    let folder = in_text_order(QWEN3, fast);
    folder.write("added_tokens.json", r#"{"<a_42>": 5}"#);
    folder.write(
        "sidereal.json",
        r#"{"levels": [{"size": 256, "template": "<a_{}>"},
        {"template": "<b_{}>"}, {"template": "<c_{}>"}]}"#,
    );
    let error = folder.open().err().expect("a contradiction").to_string();
    assert!(error.contains("<a_42>") && error.contains("added_tokens.json"), "{error}");
}

#[test]
fn a_folder_that_says_nothing_is_told_the_smallest_file() {
    let folder = Folder::of(QWEN3);
    folder.remove("sidereal.json");
    let error = folder.open().err().expect("no layout").to_string();
    for word in
        ["sidereal.json", "tokenizer.json", "\"first_token\"", "\"size\": 256", "docs/models.md"]
    {
        assert!(error.contains(word), "{error}");
    }
    folder.write("tokenizer.json", r#"{"added_tokens": [{"id": 3, "content": "<x>"}]}"#);
    let error = folder.open().err().expect("no layout").to_string();
    assert!(error.contains("no tokens are numbered"), "{error}");
}

#[test]
fn an_encoders_history_ends_with_its_end_token_where_no_file_says_how() {
    let folder = Folder::of(T5);
    let layout: Value = serde_json::from_slice(&folder.read("sidereal.json")).expect("JSON");
    let levels = layout["levels"].as_array().expect("levels");
    let mut added = Vec::new();
    for (level, entry) in ["a", "b", "c", "d"].iter().zip(levels) {
        let (size, first) = (entry["size"].as_u64(), entry["first_token"].as_u64());
        for code in 0..size.expect("a size") {
            let id = first.expect("a token") + code;
            added.push(json!({"id": id, "content": format!("<{level}_{code}>")}));
        }
    }
    folder.write("tokenizer.json", json!({"added_tokens": added}).to_string());
    folder.open().expect("first tokens and texts agree");
    folder.remove("sidereal.json");
    folder.edit("config.json", |config| config["is_encoder_decoder"] = true.into());
    let name = folder.catalog().name(0).to_string();
    let tokens = folder.open().expect("a layout").input_tokens(&Input::History(vec![name]));
    assert_eq!(tokens.expect("tokens").last(), Some(&1));
}

#[test]
fn damaged_tokenizers_and_templates_are_errors_and_never_panics() {
    let golden = Golden::of("minionerec", "small");
    let folder = golden.folder(false);
    let contents = std::fs::read(folder.path().join("tokenizer.json")).expect("a tokenizer");
    let template =
        b"{% for m in messages %}{{ m['role'].strip() ~ (m.content | upper) }}{% if loop.last \
        %}{{ '%s' | format(m) }}{% endif %}{% endfor %}{{ messages | tojson(indent=2) }}";
    let message = json!({"role": "user", "content": "Hi <a_1>"});
    let mut rng = fastrand::Rng::with_seed(5);
    let damage = |bytes: &[u8], rng: &mut fastrand::Rng| {
        let mut bytes = bytes.to_vec();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(0..bytes.len().max(1));
            match rng.u8(0..5) {
                _ if bytes.is_empty() => bytes.push(b'{'),
                0 => bytes[at] = rng.u8(..),
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, b"{}[]\"0,:%-"[rng.usize(0..10)]),
                3 => bytes.splice(at..at, b"99999999".iter().copied()).for_each(drop),
                _ => bytes.truncate(at.max(1)),
            }
        }
        bytes
    };
    for _ in 0..300 {
        let damaged = temp();
        write(&damaged, "tokenizer.json", damage(&contents, &mut rng));
        write(&damaged, "chat_template.jinja", damage(template, &mut rng));
        let model = Text::of_folder(damaged.path(), Vocabulary::of_folder(damaged.path()));
        let _ = model.tokens("Hi <a_1> there", true);
        let _ = model.vocabulary().token("<a_1>");
        let _ = model.chat(std::slice::from_ref(&message), &Map::new());
        let _ = SidLayout::read(damaged.path(), 1 << 20);
    }
}

#[test]
fn a_token_is_read_by_its_text() {
    let golden = Golden::of("minionerec", "small");
    let folder = golden.folder(false);
    let catalog = golden.catalog(folder.path());
    let options = EngineOptions::default().with_threads(1);
    let mut engine = Engine::open(folder.path(), catalog, &options).expect("a sound folder");
    let read = [NamedToken::Text("<|end|>".into())];
    let answer = engine.recommend(&Request::from_text("Yes or no?").with_read(read));
    assert_eq!(answer.expect("an answer").read.len(), 1);
}
