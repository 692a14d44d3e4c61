//! How a server is started.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::recommender_options::RecommenderOptions;
use crate::wire::RequestDefaults;
use crate::writer::WriterOptions;

/// How a [`Server`](super::Server) is started.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Models, at least one. A request that names none goes to the first, in its highest version.
    pub models: Vec<ModelSource>,
    /// How each model is opened.
    pub recommender: RecommenderOptions,
    /// How catalogs are opened for changes.
    pub writer: WriterOptions,
    /// Whether catalogs are opened for searching alone: changes are refused, and another process may
    /// change the files.
    pub is_read_only: bool,
    /// Bytes above which a built catalog that is opened for searching alone is mapped.
    pub map_catalog_above: u64,
    /// Values of fields that requests leave out.
    pub defaults: RequestDefaults,
    /// Where HTTP is served; port 0 for any free one.
    pub http: SocketAddr,
    /// Where gRPC is served; `None` for nowhere.
    pub grpc: Option<SocketAddr>,
    /// The bearer token that reading calls need; `None` for no token.
    pub read_token: Option<String>,
    /// The bearer token that changes need, and that reading calls take as well. Without one, changes
    /// are taken where the server listens on loopback addresses alone.
    pub write_token: Option<String>,
    /// Certificate and key of both listeners; `None` for plain text.
    pub tls: Option<TlsFiles>,
    /// A file of changes to follow: JSON lines, applied to the first model's catalog.
    pub feed: Option<PathBuf>,
    /// Bounds on what clients may send and hold.
    pub limits: Limits,
    /// How long requests that run may take after the server was told to end.
    pub drain: Duration,
}

impl ServerOptions {
    /// A server of one model on a loopback port, with the defaults of everything.
    pub fn new(model: ModelSource) -> ServerOptions {
        ServerOptions {
            models: vec![model],
            recommender: RecommenderOptions::default(),
            writer: WriterOptions::default(),
            is_read_only: false,
            map_catalog_above: crate::catalog::CatalogOptions::DEFAULT_MAP_ABOVE,
            defaults: RequestDefaults::default(),
            http: SocketAddr::from(([127, 0, 0, 1], 8080)),
            grpc: None,
            read_token: None,
            write_token: None,
            tls: None,
            feed: None,
            limits: Limits::default(),
            drain: Duration::from_secs(30),
        }
    }

    /// Whether other machines can reach the server.
    pub(super) fn is_exposed(&self) -> bool {
        std::iter::once(self.http).chain(self.grpc).any(|address| !address.ip().is_loopback())
    }
}

/// A certificate chain and its key, as PEM files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The chain, the server's own certificate first.
    pub certificates: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// A model that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSource {
    /// Its name in requests.
    pub name: String,
    /// Its version, from 1.
    pub version: u64,
    /// The model folder.
    pub folder: PathBuf,
    /// The catalog: a compiled one, or a file of items, whose changes end with the process.
    pub catalog: PathBuf,
}

impl ModelSource {
    /// A model folder as version 1, under the folder's own name.
    pub fn new(folder: impl Into<PathBuf>, catalog: impl Into<PathBuf>) -> ModelSource {
        let folder = folder.into();
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.filter(|name| is_name(name)).unwrap_or_else(|| "model".into());
        ModelSource { name, version: 1, folder, catalog: catalog.into() }
    }

    /// Sets name and version.
    ///
    /// # Errors
    /// [`Error::InvalidOption`]: a name is letters, digits, `.`, `_` and `-`, a version at least 1.
    pub fn named(mut self, name: &str, version: u64) -> Result<ModelSource> {
        let invalid = |reason: String| Error::InvalidOption { option: "--model", reason };
        if !is_name(name) {
            return Err(invalid(format!(
                "{name:?} is not a model's name: letters, digits, '.', '_' and '-', at most 128"
            )));
        }
        if version == 0 || version > i64::MAX as u64 {
            return Err(invalid(format!("version {version} of {name:?} is not at least 1")));
        }
        (self.name, self.version) = (name.into(), version);
        Ok(self)
    }
}

/// Names stand in paths of URLs and in labels of metrics.
fn is_name(name: &str) -> bool {
    let is_sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=128).contains(&name.len()) && name.chars().all(is_sound)
}

/// Bounds on what clients may send and hold.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of a body.
    pub body_bytes: usize,
    /// Requests of one batch.
    pub batch: usize,
    /// Changes of one batch.
    pub changes: usize,
    /// Connections to each listener; more wait to be accepted.
    pub connections: usize,
    /// How long a client may take to send the head of a request, or to speak TLS.
    pub header_time: Duration,
    /// How long a client may take to send a body.
    pub body_time: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_bytes: 8 << 20,
            batch: 1024,
            changes: 100_000,
            connections: 16_384,
            header_time: Duration::from_secs(10),
            body_time: Duration::from_secs(30),
        }
    }
}

/// Reads a token from a file: its first line, without blanks around it.
///
/// # Errors
/// The operating system's; [`Error::InvalidOption`] where there is no token in it.
pub fn read_token(option: &'static str, path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    check_token(option, text.lines().next().unwrap_or_default())
}

/// A token without blanks around it.
///
/// # Errors
/// [`Error::InvalidOption`] where it is empty or no header could carry it.
pub fn check_token(option: &'static str, token: &str) -> Result<String> {
    let token = token.trim();
    match !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(token.to_string()),
        false => Err(Error::InvalidOption {
            option,
            reason: "a token is one line of visible ASCII characters".into(),
        }),
    }
}
