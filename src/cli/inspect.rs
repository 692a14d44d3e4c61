//! `sidereal inspect`: what is understood of a model folder, and the file that would say it.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Item};
use sidereal::models::config::{Config, SidLayout};
use sidereal::models::{Checkpoint, layout, vocab_size};
use sidereal::prompt::{Source, projects};
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{Error, Input, ModelKind, Ranker, RecommenderOptions, Result, Retriever};

use super::arguments::{Outcome, write_error};

/// Codes of a level that are shown.
const NUM_EXAMPLES: usize = 3;

/// What stands for no token.
const NO_TOKEN: u32 = u32::MAX;

#[derive(Args)]
#[command(after_help = "\
Examples:
  sidereal inspect DIR --catalog items.index.json
  sidereal inspect DIR --request '{\"history\": [\"17\", \"4\"]}'
  sidereal inspect DIR --project minionerec --write")]
pub struct Arguments {
    /// Model folder
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Folder of an adapter's base, where adapter_config.json does not name it
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Catalog: a built one, or a file of items; by default the one beside the model
    #[arg(long, value_name = "FILE")]
    catalog: Option<PathBuf>,
    /// A request whose prompt is shown: JSON, or a file of which the first line is taken
    #[arg(long, value_name = "REQUEST")]
    request: Option<String>,
    /// Write sidereal.json for the prompt of this published project
    #[arg(long, value_name = "NAME", requires = "write")]
    project: Option<String>,
    /// Write sidereal.json into the folder, where there is none
    #[arg(long)]
    write: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was understood.
#[derive(Serialize)]
struct Report {
    model: String,
    architecture: String,
    sizes: Map<String, Value>,
    /// Where the levels come from.
    layout_from: String,
    levels: Vec<Level>,
    #[serde(skip_serializing_if = "Option::is_none")]
    phrases: Option<Phrases>,
    forced: Tokens,
    forced_is_counted: bool,
    suffix: Tokens,
    normalize: Value,
    max_items: Option<usize>,
    catalog: Option<CatalogSummary>,
    prompt: Option<Tokens>,
    ignored: Vec<Ignored>,
}

/// What the model writes in the place of semantic IDs.
#[derive(Serialize)]
struct Phrases {
    of: &'static str,
    end: Tokens,
    rule: Value,
}

#[derive(Serialize)]
struct Level {
    codes: usize,
    codes_with_token: usize,
    template: Option<String>,
    examples: Vec<Example>,
}

#[derive(Serialize)]
struct Example {
    code: usize,
    token: u32,
    text: Option<String>,
}

#[derive(Serialize, Default)]
struct Tokens {
    tokens: Vec<u32>,
    text: Option<String>,
}

#[derive(Serialize)]
struct CatalogSummary {
    items: usize,
    levels: usize,
}

#[derive(Serialize)]
struct Ignored {
    what: String,
    why: String,
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let model = &arguments.model;
    if let kind @ (ModelKind::Vectors | ModelKind::Scores) = ModelKind::of(model)? {
        return inspect_whole(arguments, kind);
    }
    // Weights of GRID open only beside the file that is to be written.
    let of_grid = arguments.write && write_layout_of_grid(model, arguments.project.as_deref())?;
    let Checkpoint { config, notes, .. } = Checkpoint::open(model, arguments.base.as_deref())?;
    let architecture = config.architecture().unwrap_or("of no named class").to_string();
    let catalog = match &arguments.catalog {
        Some(path) => Some(Arc::new(Catalog::open(path)?)),
        None => match Catalog::beside(model) {
            Ok(path) => Some(Arc::new(Catalog::open(&path)?)),
            Err(_) => None,
        },
    };
    if arguments.write && !of_grid {
        write_layout(model, arguments.project.as_deref(), catalog.as_deref())?;
    }
    let vocab_size = vocab_size(&config)?;
    let layout = SidLayout::read_for(model, vocab_size, catalog.as_deref())?;
    if let Some(catalog) = &catalog {
        layout.check(catalog)?;
    }
    let derived = layout::derive(model, &layout.vocabulary, catalog.as_deref())?;
    let prompt = match (&arguments.request, &catalog) {
        (Some(request), Some(catalog)) => Some(prompt_of(request, &layout, catalog)?),
        (Some(_), None) => {
            let reason = "needs a catalog; name one with --catalog".into();
            return Err(Error::InvalidOption { option: "--request", reason });
        }
        (None, _) => None,
    };
    let mut ignored = ignored_files(model)?;
    ignored.extend(notes.into_iter().map(|note| match note.split_once(": ") {
        Some((what, why)) => Ignored { what: what.into(), why: why.into() },
        None => Ignored { what: "files".into(), why: note },
    }));
    ignored.extend(derived.others.iter().map(|(group, reason)| Ignored {
        what: format!("tokens {}", group.template),
        why: format!("no level of the semantic ID: {reason}"),
    }));
    let template = |tokens: &Vec<u32>| {
        let found = derived.levels.iter().find(|group| group.by_code() == *tokens);
        found.map(|group| group.template.to_string())
    };
    let report = Report {
        model: model.display().to_string(),
        architecture,
        sizes: sizes(&config, vocab_size),
        layout_from: layout_from(model, &layout),
        levels: layout
            .levels
            .iter()
            .map(|level| describe_level(level, &layout, template(level)))
            .collect(),
        phrases: layout.phrases.as_ref().map(|phrases| Phrases {
            of: phrases.of(),
            end: tokens_of(&layout, &[phrases.end]),
            rule: json!(phrases.rule),
        }),
        forced: tokens_of(&layout, layout.forced.as_ref().map_or(&[], |forced| &forced.tokens)),
        forced_is_counted: layout.forced.as_ref().is_some_and(|forced| forced.is_counted),
        suffix: tokens_of(&layout, &layout.suffix),
        normalize: json!(layout.normalization),
        max_items: layout.prompt.max_items,
        catalog: catalog.map(|catalog| {
            let snapshot = catalog.snapshot();
            CatalogSummary { items: snapshot.num_items(), levels: snapshot.num_levels() }
        }),
        prompt,
        ignored,
    };
    print(&report, arguments.json).map_err(write_error(None))?;
    Ok(Outcome::Done)
}

/// What is understood of a network that gives vectors or scores candidates.
fn inspect_whole(arguments: &Arguments, kind: ModelKind) -> Result<Outcome> {
    let model = &arguments.model;
    let path = arguments.catalog.clone().or_else(|| Catalog::beside(model).ok());
    // The network is the same with any catalog.
    let catalog = match &path {
        Some(path) => Catalog::open(path)?,
        None => {
            let mut builder = CatalogBuilder::default();
            builder.add(Item::new("0", Sid::new(&[0])?))?;
            builder.build()?
        }
    };
    let catalog = Arc::new(catalog);
    let num_items = catalog.snapshot().num_items();
    let options = RecommenderOptions::new("cpu").with_threads(1);
    let mut report = match kind {
        ModelKind::Vectors => {
            let retriever = Retriever::open(model, catalog, &options)?;
            let matrix = retriever.matrix();
            json!({
                "what": "gives vectors: sidereal retrieve finds the items with the nearest",
                "items_of_a_history": retriever.max_items(),
                "item_vectors": [matrix.num_rows(), matrix.num_columns()],
            })
        }
        _ => {
            let ranker = Ranker::open(model, catalog, &options)?;
            let tasks: Vec<Value> = ranker
                .tasks()
                .iter()
                .map(|task| json!({"name": task.name, "is_probability": task.is_probability}))
                .collect();
            json!({
                "what": "scores candidates: sidereal rank takes them from a request",
                "items_of_a_history": ranker.max_items(),
                "tasks": tasks,
            })
        }
    };
    report["model"] = json!(model.display().to_string());
    report["family"] = json!(Config::read(&model.join("sidereal.json"))?.text("family"));
    report["catalog_items"] = json!(path.map(|_| num_items));
    let mut out = std::io::stdout().lock();
    let written = match (arguments.json, &report) {
        (false, Value::Object(fields)) => fields.iter().try_for_each(|(name, value)| {
            let shown = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            writeln!(out, "{:<20} {shown}", name.replace('_', " "))
        }),
        _ => writeln!(out, "{report}"),
    };
    written.map_err(write_error(None))?;
    Ok(Outcome::Done)
}

fn layout_from(model: &Path, layout: &SidLayout) -> String {
    let files = layout.vocabulary.files().map(|files| files.join(", ")).unwrap_or_default();
    match (model.join("sidereal.json").exists(), files.is_empty()) {
        (true, true) => "sidereal.json".into(),
        (true, false) => format!("sidereal.json and {files}"),
        (false, _) => files,
    }
}

/// The numbers of `config.json` that say how large the network is.
fn sizes(config: &Config, vocab_size: usize) -> Map<String, Value> {
    const KEYS: [&str; 14] = [
        "vocab_size",
        "hidden_size",
        "d_model",
        "num_hidden_layers",
        "num_layers",
        "num_decoder_layers",
        "num_attention_heads",
        "num_heads",
        "num_key_value_heads",
        "head_dim",
        "d_kv",
        "intermediate_size",
        "d_ff",
        "max_position_embeddings",
    ];
    let size = |key: &str| match key {
        "vocab_size" => Some((key.to_string(), vocab_size.into())), // an adapter may bring more tokens
        _ => Some((key.to_string(), config.peek(key)?.clone())),
    };
    KEYS.into_iter().filter_map(size).filter(|(_, value)| value.is_number()).collect()
}

fn describe_level(tokens: &[u32], layout: &SidLayout, template: Option<String>) -> Level {
    let with_token = || tokens.iter().enumerate().filter(|&(_, &token)| token != NO_TOKEN);
    let example =
        |(code, &token): (usize, &u32)| Example { code, token, text: text_of(layout, token) };
    Level {
        codes: tokens.len(),
        codes_with_token: with_token().count(),
        template,
        examples: with_token().take(NUM_EXAMPLES).map(example).collect(),
    }
}

fn text_of(layout: &SidLayout, token: u32) -> Option<String> {
    layout.vocabulary.text(token).ok().flatten().map(str::to_string)
}

fn tokens_of(layout: &SidLayout, tokens: &[u32]) -> Tokens {
    let by_token =
        || tokens.iter().map(|&token| text_of(layout, token)).collect::<Option<String>>();
    let text = layout.prompt.text().decode(tokens).ok().or_else(by_token);
    Tokens { tokens: tokens.to_vec(), text: text.filter(|text| !text.is_empty()) }
}

/// The prompt of a request, given as JSON or as a file.
fn prompt_of(request: &str, layout: &SidLayout, catalog: &Catalog) -> Result<Tokens> {
    let line = match request.trim_start().starts_with('{') {
        true => request.to_string(),
        false => first_line(Path::new(request))?,
    };
    let request = RequestLine::parse(&line)?.to_request(&RequestDefaults::default())?;
    let snapshot = catalog.snapshot();
    let tokens = match &request.input {
        Input::History(names) => {
            let mut items: Vec<u32> = names.iter().filter_map(|name| snapshot.find(name)).collect();
            let oldest = layout.prompt.max_items.map_or(0, |max| items.len().saturating_sub(max));
            items.drain(..oldest);
            let (levels, request) = (&layout.levels[..], &request);
            let source = Source { items: &items, snapshot: &snapshot, levels, request };
            layout.prompt.render(&source, usize::MAX)?.tokens
        }
        Input::Tokens(tokens) => tokens.clone(),
        _ => layout.prompt.text_tokens(&request)?.unwrap_or_default(),
    };
    Ok(tokens_of(layout, &tokens))
}

fn first_line(path: &Path) -> Result<String> {
    let file = std::fs::File::open(path).map_err(|error| Error::io(path, error))?;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|error| Error::io(path, error))?;
        if !line.trim().is_empty() {
            return Ok(line);
        }
    }
    let reason = "the file has no request".into();
    Err(Error::RequestsFile { path: path.to_path_buf(), reason })
}

/// Files of the folder that are not read, with the reason.
fn ignored_files(model: &Path) -> Result<Vec<Ignored>> {
    const SLOW: [&str; 3] = ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"];
    let has_tokenizer = model.join("tokenizer.json").exists();
    let mut ignored = Vec::new();
    for name in SLOW.into_iter().filter(|name| model.join(name).exists()) {
        let why = match has_tokenizer {
            true => "tokenizer.json says the same".to_string(),
            false => "texts need a tokenizer.json, which transformers' \
                      AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes; added tokens are \
                      read from the files beside it"
                .to_string(),
        };
        ignored.push(Ignored { what: name.into(), why });
    }
    for name in [
        "merges.txt",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    ] {
        if model.join(name).exists() {
            let why = match name {
                "merges.txt" => "tokenizer.json holds the merges",
                _ => "it belongs to training",
            };
            ignored.push(Ignored { what: name.into(), why: why.into() });
        }
    }
    Ok(ignored)
}

/// Writes `sidereal.json`: the levels that the tokenizer's files say, and the project.
fn write_layout(model: &Path, project: Option<&str>, catalog: Option<&Catalog>) -> Result<()> {
    let mut file = Map::new();
    if let Some(name) = project {
        projects::layout(name)
            .map_err(|reason| Error::InvalidOption { option: "--project", reason })?;
        file.insert("project".into(), name.into());
    }
    let vocabulary = sidereal::models::vocabulary::Vocabulary::of_folder(model);
    let derived = layout::derive(model, &vocabulary, catalog)?;
    if !derived.levels.is_empty() {
        let level = |group: &sidereal::models::levels::Group| json!({"size": group.by_code().len(), "template": group.template.to_string()});
        file.insert("levels".into(), derived.levels.iter().map(level).collect());
    } else if project.is_none() {
        let Checkpoint { config, .. } = Checkpoint::open(model, None)?;
        // The reason why there is nothing to write, with the smallest file.
        SidLayout::read_for(model, vocab_size(&config)?, catalog)?;
    }
    write_new(model, &file.into())
}

/// Writes what the shapes of GRID's weights say, where the folder holds such weights.
fn write_layout_of_grid(model: &Path, project: Option<&str>) -> Result<bool> {
    let Some(layout) = Checkpoint::layout_of_grid(model)? else { return Ok(false) };
    match project.filter(|name| !name.eq_ignore_ascii_case("grid")) {
        None => write_new(model, &layout).map(|()| true),
        Some(name) => Err(Error::InvalidOption {
            option: "--project",
            reason: format!("these are weights of GRID, not of {name:?}; leave it out"),
        }),
    }
}

fn write_new(model: &Path, file: &Value) -> Result<()> {
    let path = model.join("sidereal.json");
    let text = serde_json::to_string_pretty(file).expect("names and numbers") + "\n";
    let create = OpenOptions::new().write(true).create_new(true).open(&path);
    let mut output = create.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => Error::OutputFile {
            path: path.clone(),
            reason: "the file is there already and is kept; remove it to have it written".into(),
        },
        _ => Error::io(&path, error),
    })?;
    output.write_all(text.as_bytes()).map_err(|error| Error::io(&path, error))
}

fn print(report: &Report, is_json: bool) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if is_json {
        serde_json::to_writer_pretty(&mut out, report)?;
        return writeln!(out);
    }
    writeln!(out, "{}: {}", report.model, report.architecture)?;
    let sizes = report.sizes.iter().map(|(key, value)| format!("{key} {value}"));
    writeln!(out, "  {}", sizes.collect::<Vec<String>>().join(", "))?;
    if let Some(Phrases { of, end, rule }) = &report.phrases {
        let text = end.text.as_deref().unwrap_or_default();
        writeln!(out, "phrases: {of}, ended by {:?} {text:?}, searched by {rule}", end.tokens)?;
    }
    if report.phrases.is_none() || !report.levels.is_empty() {
        writeln!(out, "levels, by {}", report.layout_from)?;
    }
    for (number, level) in report.levels.iter().enumerate() {
        let Level { codes, codes_with_token, template, examples } = level;
        let example = |example: &Example| {
            let Example { code, token, text } = example;
            let text = text.as_ref().map(|text| format!(" {text}")).unwrap_or_default();
            format!("{code} = token {token}{text}")
        };
        let examples: Vec<String> = examples.iter().map(example).collect();
        let template = template.as_ref().map(|text| format!(" {text}")).unwrap_or_default();
        writeln!(
            out,
            "  {number}:{template} {codes} codes, {codes_with_token} with a token: {}",
            examples.join(", ")
        )?;
    }
    for (name, tokens) in
        [("forced before the codes", &report.forced), ("forced after the codes", &report.suffix)]
    {
        if !tokens.tokens.is_empty() {
            writeln!(
                out,
                "{name}: {:?} {:?}",
                tokens.tokens,
                tokens.text.as_deref().unwrap_or_default()
            )?;
        }
    }
    if let Some(max_items) = report.max_items {
        writeln!(out, "a history: its newest {max_items} items")?;
    }
    match &report.catalog {
        Some(CatalogSummary { items, levels }) => {
            writeln!(out, "catalog: {items} items of {levels} levels")?;
        }
        None => writeln!(out, "catalog: none beside the model; name one with --catalog")?,
    }
    if let Some(Tokens { tokens, text }) = &report.prompt {
        writeln!(out, "prompt of the request, {} tokens: {tokens:?}", tokens.len())?;
        if let Some(text) = text {
            writeln!(out, "{text}")?;
        }
    }
    for Ignored { what, why } in &report.ignored {
        writeln!(out, "ignored: {what}: {why}")?;
    }
    Ok(())
}
