//! Files of requests: read in stretches, answered on all cores, given back in order.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::Value;
use sidereal::lines::{Line, Lines, MAX_LINE_BYTES};
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{Answer, Error, Recommender, Request, Result};

/// Lines that are held at a time.
const LINES_PER_STRETCH: usize = 4096;
/// Bytes of lines from which on no more are held: a stretch ends with the line that reaches them.
const BYTES_PER_STRETCH: usize = MAX_LINE_BYTES;

/// One line of a requests file with its answer.
pub struct Answered {
    /// From one.
    pub line_number: usize,
    pub line: Option<RequestLine>,
    /// As the line has it, also where the line is malformed otherwise.
    pub id: Value,
    pub answer: Result<Answer>,
}

/// A file of requests, found readable.
pub struct Requests {
    path: PathBuf,
    input: Box<dyn Read>,
    bytes: Option<u64>,
}

impl Requests {
    /// Opens `path`, `-` for the standard input.
    pub fn open(path: &Path) -> Result<Requests> {
        let (input, bytes): (Box<dyn Read>, Option<u64>) = match path.as_os_str() == "-" {
            true => (Box::new(std::io::stdin()), None),
            false => {
                let file = File::open(path).map_err(io_error(path))?;
                let metadata = file.metadata().map_err(io_error(path))?;
                if metadata.is_dir() {
                    return Err(io_error(path)(std::io::ErrorKind::IsADirectory.into()));
                }
                (Box::new(file), Some(metadata.len()))
            }
        };
        Ok(Requests { path: path.to_path_buf(), input, bytes })
    }
}

/// Answers every line whose request passes `check`, and hands the answers over in input order. Blank
/// lines are passed over.
pub fn answer_file(
    recommender: &Recommender,
    requests: Requests,
    defaults: &RequestDefaults,
    check: impl Fn(Request) -> Result<Request>,
    mut each: impl FnMut(Answered) -> Result<()>,
) -> Result<()> {
    let Requests { path, input, bytes } = requests;
    let path = path.as_path();
    let progress = progress_bar(bytes, "requests");
    let mut lines = Lines::new(progress.wrap_read(input));
    let mut line_number = 0;
    loop {
        let (mut stretch, mut bytes) = (Vec::new(), 0);
        while stretch.len() < LINES_PER_STRETCH && bytes < BYTES_PER_STRETCH {
            let Some(line) = lines.next().map_err(io_error(path))? else { break };
            line_number += 1;
            if line.is_blank() {
                continue;
            }
            let mut parsed = parse(line_number, line, defaults);
            parsed.request = parsed.request.and_then(&check);
            stretch.push(parsed);
            // The end of a line that is too long may never come: it is answered first.
            bytes += match line {
                Line::Whole(line) => line.len(),
                Line::TooLong => BYTES_PER_STRETCH,
            };
        }
        if stretch.is_empty() {
            break;
        }
        for answered in answer(recommender, stretch, &progress) {
            progress.suspend(|| each(answered))?;
        }
    }
    progress.finish_and_clear();
    Ok(())
}

/// The one field that is asked for where the rest of a line is malformed.
#[derive(Deserialize)]
struct Identified {
    #[serde(default)]
    id: Value,
}

struct Parsed {
    line_number: usize,
    line: Option<RequestLine>,
    id: Value,
    request: Result<Request>,
}

fn parse(line_number: usize, line: Line<'_>, defaults: &RequestDefaults) -> Parsed {
    let text = line.text().map_err(|reason| Error::MalformedRequest { reason });
    let parsed = text.and_then(RequestLine::parse);
    match parsed {
        Ok(line) => Parsed {
            line_number,
            id: line.id.clone().unwrap_or_default(),
            request: line.to_request(defaults),
            line: Some(line),
        },
        Err(error) => {
            let bytes = if let Line::Whole(bytes) = line { bytes } else { &[] };
            let found = serde_json::from_slice(bytes).unwrap_or(Identified { id: Value::Null });
            Parsed { line_number, line: None, id: found.id, request: Err(error) }
        }
    }
}

fn answer(
    recommender: &Recommender,
    stretch: Vec<Parsed>,
    progress: &ProgressBar,
) -> Vec<Answered> {
    let mut requests = Vec::new();
    let mut answers = Vec::new(); // by line: its error, or its request's index
    let mut heads = Vec::new();
    for parsed in stretch {
        answers.push(parsed.request.map(|request| {
            requests.push(request);
            requests.len() - 1
        }));
        heads.push((parsed.line_number, parsed.line, parsed.id));
    }
    let results: Vec<OnceLock<Result<Answer>>> = requests.iter().map(|_| OnceLock::new()).collect();
    recommender.recommend_all(&requests, |index, answer| {
        let _ = results[index].set(answer); // each index is delivered once
        progress.tick();
    });
    let mut results: Vec<Option<Result<Answer>>> =
        results.into_iter().map(OnceLock::into_inner).collect();
    let lines = heads.into_iter().zip(answers);
    lines
        .map(|((line_number, line, id), request)| {
            let answer =
                request.and_then(|index| results[index].take().expect("every request is answered"));
            Answered { line_number, line, id, answer }
        })
        .collect()
}

/// A bar of `bytes`, or a count where their number is unknown; shown on a terminal only.
pub fn progress_bar(bytes: Option<u64>, what: &'static str) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (
            ProgressBar::new(bytes),
            "{msg} {wide_bar} {bytes}/{total_bytes} {elapsed} (another {eta})",
        ),
        None => (ProgressBar::new_spinner(), "{msg} {spinner} {bytes} {elapsed}"),
    };
    let style = ProgressStyle::with_template(template).expect("a sound template");
    bar.with_style(style).with_message(what)
}

/// A bar of things that are counted; shown on a terminal only.
pub fn count_bar(count: u64, what: &'static str) -> ProgressBar {
    let template = "{msg} {wide_bar} {pos}/{len} {elapsed} (another {eta})";
    let style = ProgressStyle::with_template(template).expect("a sound template");
    ProgressBar::new(count).with_style(style).with_message(what)
}

/// Shows that something of unknown length goes on; on a terminal only.
pub fn spinner(what: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(std::time::Duration::from_millis(100));
    spinner
}

fn io_error(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    |source| Error::io(path, source)
}
