//! `sidereal serve`: HTTP and gRPC in front of models.

use std::io::IsTerminal;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use sidereal::catalog::Catalog;
use sidereal::server::{ModelSource, Server, ServerOptions, TlsFiles, check_token, read_token};
use sidereal::{Durability, Error, Result, WriterOptions};

use super::arguments::{MAP_CATALOG_ABOVE_MIB, Outcome, SearchArguments, say};
use super::device::DeviceArguments;
use super::requests::spinner;

#[derive(Args)]
#[command(after_help = "\
Examples:
  sidereal serve --model models/industrial
  sidereal serve --model DIR --http 0.0.0.0:8080 --write-token-file token
  sidereal serve --model DIR --tls-cert cert.pem --tls-key key.pem
  sidereal serve --model shop:1=OLD --model shop:2=NEW --catalog items.sidereal
and then
  curl localhost:8080/v1/recommend -d '{\"history\": [\"168\"], \"top_k\": 5}'

Doors: /v1/recommend, /v1/rank, /v1/score (JSON), /v2 and gRPC (Open Inference
Protocol), /generate (SGLang), /v1/completions (OpenAI). GET /openapi.json
describes them, GET /metrics is for Prometheus, and / is a page for people.
SIGTERM lets requests finish; a second signal ends at once.

Tokens: SIDEREAL_READ_TOKEN and SIDEREAL_WRITE_TOKEN are taken where no file is
named.")]
pub struct Arguments {
    /// Model folder; several as NAME=DIR, or NAME:VERSION=DIR for versions of one model
    #[arg(long, value_name = "[NAME[:VERSION]=]DIR", required = true)]
    model: Vec<String>,
    /// Catalog: a built one, or a file of items, whose changes end with the process; one for all models, or
    /// NAME=FILE for the model of that name; by default the one beside each model
    #[arg(long, value_name = "[NAME=]FILE")]
    catalog: Vec<String>,
    /// Folder of an adapter's base, where adapter_config.json does not name it
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Where HTTP is served; other machines reach 0.0.0.0:8080, not the default
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080", value_parser = address)]
    http: SocketAddr,
    /// Where gRPC is served; by default nowhere
    #[arg(long, value_name = "ADDR", value_parser = address)]
    grpc: Option<SocketAddr>,
    /// File with the bearer token that reading calls need
    #[arg(long, value_name = "FILE")]
    read_token_file: Option<PathBuf>,
    /// File with the bearer token that changes need; without one, only a server that other machines cannot
    /// reach takes changes
    #[arg(long, value_name = "FILE")]
    write_token_file: Option<PathBuf>,
    /// Certificate chain (PEM), for TLS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Follow a file of changes, one JSON object a line, ours or Debezium's
    #[arg(long, value_name = "FILE", conflicts_with = "read_only")]
    feed: Option<PathBuf>,
    /// Refuse changes, and leave the catalog's files to another process
    #[arg(long)]
    read_only: bool,
    /// Crash that an acknowledged change survives
    #[arg(long, value_name = "WHAT", default_value = "process")]
    durability: DurabilityName,
    /// Map a built catalog of more than so many MiB, where it is served for reading alone
    #[arg(long, value_name = "MIB", default_value_t = MAP_CATALOG_ABOVE_MIB)]
    map_catalog_above: u64,
    #[command(flatten)]
    device: DeviceArguments,
    #[command(flatten)]
    search: SearchArguments,
    /// Items of an answer at most, where a request does not say
    #[arg(long, default_value_t = 10, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: u32,
    /// Requests that may wait; more are answered with 429
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_queued: usize,
    /// How long a request may be expected to wait, in milliseconds; longer is answered with 429
    #[arg(long, value_name = "MS")]
    max_wait: Option<u64>,
    /// Bytes of a body at most, in MiB
    #[arg(long, default_value_t = 8, value_name = "MIB", value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_body: u16,
    /// Requests of one batch at most
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_batch: usize,
    /// Connections to each address at most
    #[arg(long, default_value_t = 16_384, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: u32,
    /// How long requests that run may take after SIGTERM, in seconds
    #[arg(long, default_value_t = 30, value_name = "S")]
    drain: u64,
    /// How the log on the standard error is written
    #[arg(long, value_name = "FORMAT")]
    log: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace
    #[arg(long, default_value = "info", value_name = "LEVEL", value_parser = ["error", "warn", "info", "debug", "trace"])]
    log_level: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// For programs, one JSON object a line
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
enum DurabilityName {
    /// The end of the process
    Process,
    /// The end of the machine: each batch waits for the disk
    Machine,
}

/// An address with a port; a host name is looked up.
fn address(text: &str) -> std::result::Result<SocketAddr, String> {
    let example = "an address is HOST:PORT, such as 127.0.0.1:8080";
    let mut found = text.to_socket_addrs().map_err(|error| format!("{error}; {example}"))?;
    found.next().ok_or_else(|| format!("nothing has that name; {example}"))
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    start_log(arguments);
    let options = arguments.options()?;
    let spinner = spinner("opening the models");
    let server = Server::start(&options)?;
    spinner.finish_and_clear();
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    say(&format!("serving {scheme}://{}", server.http()));
    if let Some(grpc) = server.grpc() {
        say(&format!("serving grpc on {grpc}"));
    }
    let http_is_exposed = !options.http.ip().is_loopback();
    if http_is_exposed && options.tls.is_none() && options.write_token.is_some() {
        say(
            "warning: tokens travel in plain text; give --tls-cert and --tls-key, or put a proxy before",
        );
    }
    server.wait_for_signal()?;
    say("finishing requests that run; a second signal ends at once");
    server.shutdown();
    Ok(Outcome::Done)
}

fn start_log(arguments: &Arguments) {
    use tracing_subscriber::fmt;
    let level: tracing::Level = arguments.log_level.parse().expect("clap knows the levels");
    let is_terminal = std::io::stderr().is_terminal();
    let builder = fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(is_terminal);
    // Somebody who embeds the command line may have set a log of their own.
    let _ = match arguments.log.unwrap_or(LogFormat::Text) {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

impl Arguments {
    fn options(&self) -> Result<ServerOptions> {
        let models = self.models()?;
        let first = models.first().cloned().expect("clap wants one");
        let mut options = ServerOptions::new(first);
        options.models = models;
        let mut recommender = self.device.options().with_max_queued(self.max_queued);
        recommender.base.clone_from(&self.base);
        recommender.max_wait = self.max_wait.map(Duration::from_millis);
        options.recommender = recommender;
        options.writer = WriterOptions::default().with_durability(match self.durability {
            DurabilityName::Process => Durability::Process,
            DurabilityName::Machine => Durability::Machine,
        });
        options.is_read_only = self.read_only;
        options.map_catalog_above = self.map_catalog_above.saturating_mul(1 << 20);
        options.defaults = self.search.defaults(self.top_k as usize);
        (options.http, options.grpc) = (self.http, self.grpc);
        options.read_token =
            token("--read-token-file", &self.read_token_file, "SIDEREAL_READ_TOKEN")?;
        options.write_token =
            token("--write-token-file", &self.write_token_file, "SIDEREAL_WRITE_TOKEN")?;
        if let (Some(certificates), Some(key)) = (&self.tls_cert, &self.tls_key) {
            options.tls = Some(TlsFiles { certificates: certificates.clone(), key: key.clone() });
        }
        options.feed.clone_from(&self.feed);
        options.limits.body_bytes = usize::from(self.max_body) << 20;
        options.limits.batch = self.max_batch;
        options.limits.connections = self.max_connections as usize;
        options.drain = Duration::from_secs(self.drain);
        Ok(options)
    }

    /// The models with their catalogs.
    fn models(&self) -> Result<Vec<ModelSource>> {
        let catalogs: Vec<(Option<&str>, PathBuf)> =
            self.catalog.iter().map(|text| name_and_path(text)).collect();
        let mut models = Vec::with_capacity(self.model.len());
        for text in &self.model {
            let (name, folder) = name_and_path(text);
            let (name, version) = match name.map(|name| name.split_once(':').unwrap_or((name, "1")))
            {
                Some((name, version)) => {
                    let number = version.parse().map_err(|_| Error::InvalidOption {
                        option: "--model",
                        reason: format!("{version:?} is not the number of a version"),
                    })?;
                    (Some(name), number)
                }
                None => (None, 1),
            };
            let of_name = catalogs.iter().find(|(of, _)| of.is_some() && *of == name);
            let of_all = catalogs.iter().find(|(of, _)| of.is_none());
            let catalog = match of_name.or(of_all) {
                Some((_, path)) => path.clone(),
                None => Catalog::beside(&folder)?,
            };
            let source = ModelSource::new(folder, catalog);
            models.push(match name {
                Some(name) => source.named(name, version)?,
                None => source,
            });
        }
        Ok(models)
    }
}

/// `NAME=PATH`, or a path alone. A path that exists is one, whatever stands in it.
fn name_and_path(text: &str) -> (Option<&str>, PathBuf) {
    match text.split_once('=') {
        Some((name, path)) if !std::path::Path::new(text).exists() => (Some(name), path.into()),
        _ => (None, text.into()),
    }
}

/// The token of a file, or else of the environment.
fn token(
    option: &'static str,
    file: &Option<PathBuf>,
    variable: &'static str,
) -> Result<Option<String>> {
    match (file, std::env::var(variable)) {
        (Some(path), _) => read_token(option, path).map(Some),
        (None, Ok(token)) => check_token(variable, &token).map(Some),
        (None, Err(_)) => Ok(None),
    }
}
