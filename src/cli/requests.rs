//! Requests of a file or a stream: answered as they come, given back in order.
//!
//! A thread reads lines and checks their form; the engine answers up to [`WINDOW`] of them at a time.
//! Whoever writes a line and waits for its answer gets it: nothing waits for the next line.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::Value;
use sidereal::lines::{Line, Lines, MAX_LINE_BYTES};
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{Answer, Error, Recommender, Request, Result};

/// Lines that are held at a time, from the reading to the writing of their answers.
const WINDOW: usize = 96;
/// Bytes of lines from which on no further one is read until earlier ones are answered.
const WINDOW_BYTES: usize = MAX_LINE_BYTES;

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
    input: Box<dyn Read + Send>,
    /// Where it is known, and someone looks.
    count: Option<u64>,
}

impl Requests {
    /// Opens `path`, `-` for the standard input.
    pub fn open(path: &Path) -> Result<Requests> {
        let (input, count): (Box<dyn Read + Send>, Option<u64>) = match path.as_os_str() == "-" {
            true => (Box::new(std::io::stdin()), None),
            false => {
                let file = File::open(path).map_err(io_error(path))?;
                let metadata = file.metadata().map_err(io_error(path))?;
                if metadata.is_dir() {
                    return Err(io_error(path)(std::io::ErrorKind::IsADirectory.into()));
                }
                let is_counted = metadata.is_file() && std::io::stderr().is_terminal();
                let count = is_counted.then(|| count_lines(path)).transpose();
                (Box::new(file), count.map_err(io_error(path))?)
            }
        };
        Ok(Requests { path: path.to_path_buf(), input, count })
    }
}

/// The lines of a file, for a bar of progress.
fn count_lines(path: &Path) -> std::io::Result<u64> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; 1 << 18];
    let (mut count, mut last) = (0, b'\n');
    loop {
        match file.read(&mut bytes)? {
            0 => return Ok(count + u64::from(last != b'\n')),
            len => {
                count += bytes[..len].iter().filter(|&&byte| byte == b'\n').count() as u64;
                last = bytes[len - 1];
            }
        }
    }
}

/// What [`answer_file`] hands over.
pub enum Delivery {
    /// The next answer, in the order of the input.
    Answer(Box<Answered>),
    /// The next answer is not there yet: whoever reads the output should have those before it.
    Pause,
}

/// Answers every line whose request passes `check`, and hands the answers over in input order. Blank
/// lines are passed over.
pub fn answer_file(
    recommender: &Recommender,
    requests: Requests,
    defaults: &RequestDefaults,
    check: impl Fn(Request) -> Result<Request>,
    mut deliver: impl FnMut(Delivery) -> Result<()>,
) -> Result<()> {
    let progress = match requests.count {
        Some(count) => count_bar(count, "requests"),
        None => count_spinner("requests"),
    };
    let (events, incoming) = mpsc::channel();
    let (credits, wanted) = mpsc::channel();
    let reader = Reader { events: events.clone(), wanted, defaults: defaults.clone() };
    let thread = std::thread::Builder::new().name("sidereal-requests".into());
    thread.spawn(move || reader.run(requests)).map_err(|error| Error::Device {
        device: "cpu".into(),
        reason: format!("a thread that reads requests could not be started: {error}"),
    })?;
    let mut window = Window { credits, lines: VecDeque::new(), first: 0, bytes: 0, owed: 0 };
    window.owed = WINDOW;
    let mut end = None;
    while end.is_none() || !window.lines.is_empty() {
        window.pay();
        let event = match incoming.try_recv() {
            Ok(event) => event,
            Err(TryRecvError::Empty) => {
                progress.suspend(|| deliver(Delivery::Pause))?;
                incoming.recv().expect("this end has a sender as well")
            }
            Err(TryRecvError::Disconnected) => unreachable!("this end has a sender as well"),
        };
        match event {
            Event::Line(parsed, bytes) => {
                window.submit(recommender, *parsed, bytes, &check, &events)
            }
            Event::Answer(number, answer) => window.place(number, *answer),
            Event::End(outcome) => end = Some(outcome),
        }
        for answered in window.answered() {
            progress.suspend(|| deliver(Delivery::Answer(Box::new(answered))))?;
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    end.expect("the loop waits for it")
}

/// What happens to the window.
enum Event {
    /// A line was read; with its bytes.
    Line(Box<Parsed>, usize),
    /// The request of a line, by the line's number in the window's count, was answered.
    Answer(u64, Box<Result<Answer>>),
    /// There are no more lines.
    End(Result<()>),
}

/// The thread that reads.
struct Reader {
    events: Sender<Event>,
    /// One for each line that may be read.
    wanted: Receiver<()>,
    defaults: RequestDefaults,
}

impl Reader {
    fn run(self, requests: Requests) {
        let outcome = self.read(requests);
        let _ = self.events.send(Event::End(outcome)); // nobody listens after an error of the output
    }

    fn read(&self, requests: Requests) -> Result<()> {
        let Requests { path, input, .. } = requests;
        let mut lines = Lines::new(input);
        let mut line_number = 0;
        while self.wanted.recv().is_ok() {
            let (parsed, bytes) = loop {
                let Some(line) = lines.next().map_err(io_error(&path))? else { return Ok(()) };
                line_number += 1;
                if line.is_blank() {
                    continue;
                }
                let bytes = match line {
                    Line::Whole(line) => line.len(),
                    Line::TooLong => 0,
                };
                break (parse(line_number, line, &self.defaults), bytes);
            };
            if self.events.send(Event::Line(Box::new(parsed), bytes)).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Lines between their reading and the writing of their answers, in the order of the input.
struct Window {
    credits: Sender<()>,
    lines: VecDeque<Held>,
    /// The number of the first one.
    first: u64,
    bytes: usize,
    /// Lines that the reader may read once there is room for their bytes.
    owed: usize,
}

struct Held {
    line_number: usize,
    line: Option<RequestLine>,
    id: Value,
    bytes: usize,
    /// `None` until it is there.
    answer: Option<Result<Answer>>,
}

impl Window {
    /// Lets the reader go on, as far as there is room.
    fn pay(&mut self) {
        while self.owed > 0 && (self.bytes < WINDOW_BYTES || self.lines.is_empty()) {
            self.owed -= 1;
            let _ = self.credits.send(()); // the reader may have ended
        }
    }

    fn submit(
        &mut self,
        recommender: &Recommender,
        parsed: Parsed,
        bytes: usize,
        check: impl Fn(Request) -> Result<Request>,
        events: &Sender<Event>,
    ) {
        let Parsed { line_number, line, id, request } = parsed;
        let number = self.first + self.lines.len() as u64;
        let events = events.clone();
        let callback = move |answer| drop(events.send(Event::Answer(number, Box::new(answer))));
        let submitted =
            request.and_then(check).and_then(|request| recommender.submit_with(request, callback));
        self.bytes += bytes;
        self.lines.push_back(Held {
            line_number,
            line,
            id,
            bytes,
            answer: submitted.err().map(Err),
        });
    }

    fn place(&mut self, number: u64, answer: Result<Answer>) {
        let at = usize::try_from(number - self.first).expect("a line is held until it is answered");
        self.lines[at].answer = Some(answer);
    }

    /// Takes the lines out that are answered and have no unanswered one before them.
    fn answered(&mut self) -> impl Iterator<Item = Answered> + '_ {
        std::iter::from_fn(|| {
            let answer = self.lines.front_mut()?.answer.take()?;
            let Held { line_number, line, id, bytes, .. } = self.lines.pop_front()?;
            self.first += 1;
            self.bytes -= bytes;
            self.owed += 1;
            Some(Answered { line_number, line, id, answer })
        })
    }
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

/// Counts things whose number is unknown; on a terminal only.
fn count_spinner(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {spinner} {pos} {per_sec} {elapsed}");
    ProgressBar::new_spinner().with_style(style.expect("a sound template")).with_message(what)
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
