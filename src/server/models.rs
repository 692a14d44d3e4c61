//! The models of a server, by name and version.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::error::{Failure, Outcome, quoted};
use super::options::{ModelSource, ServerOptions};
use crate::answer::Timings;
use crate::catalog::{Catalog, CatalogOptions};
use crate::error::{Error, Result};
use crate::recommender::Recommender;
use crate::writer::CatalogWriter;

/// A catalog that models of the server search.
pub(super) struct ServedCatalog {
    pub path: PathBuf,
    pub catalog: Arc<Catalog>,
    /// `None` where the server was told to change nothing.
    pub writer: Option<CatalogWriter>,
}

/// One version of a model.
pub(super) struct Served {
    pub name: String,
    pub version: u64,
    pub recommender: Recommender,
    pub catalog: Arc<ServedCatalog>,
    pub statistics: Statistics,
}

/// What Triton's clients ask of a version: counts and nanoseconds.
#[derive(Default)]
pub(super) struct Statistics {
    pub answered: AtomicU64,
    pub answered_ns: AtomicU64,
    pub failed: AtomicU64,
    pub failed_ns: AtomicU64,
    pub queued_ns: AtomicU64,
    pub engine_ns: AtomicU64,
    /// Milliseconds since 1970.
    pub last_ms: AtomicU64,
}

impl Statistics {
    pub fn answered(&self, timings: &Timings) {
        let Timings { queued_us, total_us, .. } = *timings;
        self.answered.fetch_add(1, Relaxed);
        self.answered_ns.fetch_add(total_us * 1000, Relaxed);
        self.queued_ns.fetch_add(queued_us * 1000, Relaxed);
        self.engine_ns.fetch_add(total_us.saturating_sub(queued_us) * 1000, Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_ms.store(now.as_millis() as u64, Relaxed);
    }

    pub fn failed(&self, after_us: u64) {
        self.failed.fetch_add(1, Relaxed);
        self.failed_ns.fetch_add(after_us * 1000, Relaxed);
    }
}

/// A version as an index lists it.
pub(super) struct Listed {
    pub name: String,
    pub version: u64,
    /// `None` where it is not loaded.
    pub served: Option<Arc<Served>>,
}

impl Listed {
    /// Its state in Triton's words, and the reason where it does not answer.
    pub fn state(&self) -> (&'static str, &'static str) {
        match &self.served {
            Some(served) if served.recommender.is_serving() => ("READY", ""),
            Some(_) => ("UNAVAILABLE", "its engine has ended"),
            None => ("UNAVAILABLE", "unloaded"),
        }
    }
}

/// The models of a server. The lock is held to look up and to exchange, never to open.
pub(super) struct Models {
    opener: Opener,
    /// The model of requests that name none.
    first: String,
    entries: RwLock<BTreeMap<String, Entry>>,
    /// Held by whoever loads or unloads.
    exchange: Mutex<()>,
}

struct Entry {
    /// What is opened when the model is loaded.
    sources: Vec<ModelSource>,
    /// Versions that answer.
    served: BTreeMap<u64, Arc<Served>>,
}

/// Opens models and catalogs. A catalog is opened once and stays open until the server ends: several
/// models may search it, and the changes of one in memory must outlast an exchange of its models.
struct Opener {
    options: ServerOptions,
    catalogs: Mutex<BTreeMap<PathBuf, Arc<ServedCatalog>>>,
}

impl Opener {
    fn open(&self, source: &ModelSource) -> Result<Arc<Served>> {
        let catalog = self.catalog(&source.catalog)?;
        let shared = Arc::clone(&catalog.catalog);
        self.options.defaults.check(shared.snapshot().num_levels())?;
        let recommender = Recommender::open(&source.folder, shared, &self.options.recommender)?;
        Ok(Arc::new(Served {
            name: source.name.clone(),
            version: source.version,
            recommender,
            catalog,
            statistics: Statistics::default(),
        }))
    }

    fn catalog(&self, path: &Path) -> Result<Arc<ServedCatalog>> {
        let path = std::fs::canonicalize(path).map_err(|error| Error::io(path, error))?;
        let mut catalogs = self.catalogs.lock().expect("no holder panics");
        if let Some(catalog) = catalogs.get(&path) {
            return Ok(Arc::clone(catalog));
        }
        let catalog = Arc::new(self.open_catalog(&path)?);
        catalogs.insert(path, Arc::clone(&catalog));
        Ok(catalog)
    }

    fn open_catalog(&self, path: &Path) -> Result<ServedCatalog> {
        let (path, options) = (path.to_path_buf(), &self.options.writer);
        let map_above = self.options.map_catalog_above;
        if self.options.is_read_only {
            let options = CatalogOptions::default().with_map_above(map_above);
            let catalog = Arc::new(Catalog::open_with(&path, &options)?);
            return Ok(ServedCatalog { path, catalog, writer: None });
        }
        let writer = CatalogWriter::open_any(&path, options)?;
        Ok(ServedCatalog { path, catalog: Arc::clone(writer.catalog()), writer: Some(writer) })
    }
}

impl Models {
    /// Opens all models of the options.
    ///
    /// # Errors
    /// Those of the catalogs and of [`Recommender::open`]; [`Error::InvalidOption`] where two models
    /// have one name and version, or default beam widths are not as many as a catalog's levels.
    pub fn open(options: &ServerOptions) -> Result<Models> {
        let invalid = |reason: String| Error::InvalidOption { option: "--model", reason };
        let first = options.models.first().ok_or_else(|| invalid("name at least one".into()))?;
        let opener = Opener { options: options.clone(), catalogs: Mutex::default() };
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        for source in &options.models {
            let entry = entries
                .entry(source.name.clone())
                .or_insert_with(|| Entry { sources: Vec::new(), served: BTreeMap::new() });
            if entry.sources.iter().any(|other| other.version == source.version) {
                return Err(invalid(format!(
                    "{} has version {} twice; write NAME:VERSION=DIR",
                    source.name, source.version
                )));
            }
            entry.sources.push(source.clone());
            entry.served.insert(source.version, opener.open(source)?);
        }
        let (first, exchange) = (first.name.clone(), Mutex::new(()));
        Ok(Models { opener, first, entries: RwLock::new(entries), exchange })
    }

    /// The model that a request names; an empty name is the first model, an empty version the
    /// highest.
    pub fn find(&self, name: &str, version: &str) -> Outcome<Arc<Served>> {
        let name = if name.is_empty() { &self.first } else { name };
        let entries = self.entries.read().expect("no holder panics");
        let Some(entry) = entries.get(name) else {
            let known: Vec<&str> = entries.keys().map(String::as_str).collect();
            let known = known.join(", ");
            return Err(Failure::not_found(format!(
                "no model is named {}; there are {known}",
                quoted(name)
            )));
        };
        let found = match version {
            "" => entry.served.last_key_value().map(|(_, served)| served),
            version => version.parse().ok().and_then(|version: u64| entry.served.get(&version)),
        };
        found.cloned().ok_or_else(|| {
            let versions: Vec<String> = entry.served.keys().map(u64::to_string).collect();
            let which = match version {
                "" => format!("model {name} is not loaded"),
                version => format!("model {name} has no version {}", quoted(version)),
            };
            Failure::not_found(format!("{which}; loaded are: [{}]", versions.join(", ")))
        })
    }

    /// All versions that answer.
    pub fn all(&self) -> Vec<Arc<Served>> {
        let entries = self.entries.read().expect("no holder panics");
        entries.values().flat_map(|entry| entry.served.values().cloned()).collect()
    }

    /// All versions, those included that are not loaded.
    pub fn index(&self) -> Vec<Listed> {
        let entries = self.entries.read().expect("no holder panics");
        let mut listed = Vec::new();
        for (name, entry) in &*entries {
            listed.extend(entry.sources.iter().map(|source| Listed {
                name: name.clone(),
                version: source.version,
                served: entry.served.get(&source.version).cloned(),
            }));
        }
        listed
    }

    /// Whether each model has a version that answers.
    pub fn are_ready(&self) -> bool {
        let entries = self.entries.read().expect("no holder panics");
        entries.values().all(|entry| {
            entry.served.last_key_value().is_some_and(|(_, served)| served.recommender.is_serving())
        })
    }

    /// Opens a model's folders again, and puts what they hold now in the place of what answers.
    /// Requests that run are finished by the old versions. Waits for both.
    pub fn load(&self, name: &str) -> Outcome<()> {
        let _exchange = self.exchange.lock().expect("no holder panics");
        let sources = self.sources(name)?;
        let opened: Result<Vec<Arc<Served>>> =
            sources.iter().map(|source| self.opener.open(source)).collect();
        let served = opened?.into_iter().map(|served| (served.version, served)).collect();
        self.put(name, served);
        Ok(())
    }

    /// Takes a model out; requests that run are finished. Waits for them.
    pub fn unload(&self, name: &str) -> Outcome<()> {
        let _exchange = self.exchange.lock().expect("no holder panics");
        self.sources(name)?;
        self.put(name, BTreeMap::new());
        Ok(())
    }

    fn sources(&self, name: &str) -> Outcome<Vec<ModelSource>> {
        let entries = self.entries.read().expect("no holder panics");
        let entry = entries.get(name).ok_or_else(|| {
            Failure::not_found(format!(
                "no model is named {}; models are named when the server is started",
                quoted(name)
            ))
        })?;
        Ok(entry.sources.clone())
    }

    fn put(&self, name: &str, served: BTreeMap<u64, Arc<Served>>) {
        let mut entries = self.entries.write().expect("no holder panics");
        let entry = entries.get_mut(name).expect("models are never removed");
        let old = std::mem::replace(&mut entry.served, served);
        drop(entries);
        self.end(old.into_values());
    }

    /// Ends all models.
    pub fn shutdown(&self) {
        self.end(self.all().into_iter());
        for catalog in self.opener.catalogs.lock().expect("no holder panics").values() {
            if let Some(Err(error)) = catalog.writer.as_ref().map(CatalogWriter::sync) {
                tracing::error!(target: "sidereal", path = %catalog.path.display(), %error, "sync");
            }
        }
    }

    fn end(&self, served: impl Iterator<Item = Arc<Served>>) {
        for served in served {
            if let Err(error) = served.recommender.shutdown(self.opener.options.drain) {
                tracing::error!(target: "sidereal", model = served.name, %error, "shutdown");
            }
        }
    }

    /// How long requests that run may take at the end.
    pub fn drain_time(&self) -> Duration {
        self.opener.options.drain
    }
}
