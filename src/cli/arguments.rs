//! What commands have in common: arguments, opening of models and catalogs, outcomes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use sidereal::catalog::{Catalog, CatalogOptions};
use sidereal::models::config::SidLayout;
use sidereal::models::{Checkpoint, VECTOR_FAMILIES, vocab_size};
use sidereal::wire::RequestDefaults;
use sidereal::{
    Constraint, Error, LongHistory, ModelKind, Normalization, Recommender, RecommenderOptions,
    Result, UnknownItems,
};

use super::device::DeviceArguments;
use super::requests::spinner;
use super::terminal::printable_lines;

/// How a command that could run ended.
pub enum Outcome {
    Done,
    SomeFailed,
}

#[derive(Args)]
pub struct ModelArguments {
    /// Model folder: config.json, sidereal.json, weights; or a LoRA adapter's
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Folder of an adapter's base, where adapter_config.json does not name it
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// Catalog: a built one, or a file of items; by default the one beside the model
    #[arg(long, value_name = "FILE")]
    pub catalog: Option<PathBuf>,
    /// Map a built catalog of more than so many MiB, instead of reading it into memory. Replace a
    /// mapped file by rename (mv), never by cp
    #[arg(long, value_name = "MIB", default_value_t = MAP_CATALOG_ABOVE_MIB)]
    pub map_catalog_above: u64,
    #[command(flatten)]
    pub device: DeviceArguments,
}

pub const MAP_CATALOG_ABOVE_MIB: u64 = CatalogOptions::DEFAULT_MAP_ABOVE >> 20;

#[derive(Args)]
pub struct SearchArguments {
    /// Beam width: prefixes kept at each level; or one width for each, as 16,64,128
    #[arg(long, default_value = "50", value_name = "W", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=sidereal::MAX_BEAMS as i64))]
    pub beams: Vec<u16>,
    /// What may follow a prefix
    #[arg(long, default_value = "trie")]
    pub constraint: ConstraintName,
    /// What scores are normalised over; by default what the model's sidereal.json says, else vocabulary
    #[arg(long)]
    pub normalize: Option<NormalizationName>,
    #[command(flatten)]
    pub leniency: LeniencyArguments,
    /// Items of one semantic ID at most, where several share it; by default all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub per_sid: Option<u32>,
    /// Leave out what the user's history has; a line's exclude_history wins
    #[arg(long)]
    pub exclude_history: bool,
}

#[derive(Args, Clone, Copy)]
pub struct LeniencyArguments {
    /// What becomes of items that the catalog does not have
    #[arg(long, value_name = "POLICY", default_value = "skip")]
    unknown_items: UnknownItemsName,
    /// What becomes of a history that is longer than model or engine take
    #[arg(long, value_name = "POLICY", default_value = "error")]
    long_history: LongHistoryName,
}

impl LeniencyArguments {
    pub fn apply(self, defaults: &mut RequestDefaults) {
        defaults.unknown_items = match self.unknown_items {
            UnknownItemsName::Skip => UnknownItems::Skip,
            UnknownItemsName::Error => UnknownItems::Error,
        };
        defaults.long_history = match self.long_history {
            LongHistoryName::Error => LongHistory::Error,
            LongHistoryName::Cut => LongHistory::Cut,
        };
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum UnknownItemsName {
    /// Leave them out and say so; an error only where none is known
    Skip,
    /// The request fails
    Error,
}

#[derive(Clone, Copy, ValueEnum)]
enum LongHistoryName {
    /// The request fails
    Error,
    /// As many of the newest items are read as fit
    Cut,
}

impl SearchArguments {
    pub fn defaults(&self, top_k: usize) -> RequestDefaults {
        let widths: Vec<usize> = self.beams.iter().map(|&width| width.into()).collect();
        let mut defaults = RequestDefaults::default();
        defaults.beams = *widths.last().expect("clap has a default");
        defaults.widths = if widths.len() == 1 { Vec::new() } else { widths };
        defaults.top_k = top_k;
        defaults.normalization = self.normalize.map(NormalizationName::normalization);
        defaults.constraint = match self.constraint {
            ConstraintName::Trie => Constraint::Trie,
            ConstraintName::Occurring => Constraint::Occurring,
            ConstraintName::Level => Constraint::Level,
            ConstraintName::None => Constraint::None,
        };
        self.leniency.apply(&mut defaults);
        defaults.per_sid = self.per_sid.map(|most| most as usize);
        defaults.exclude_history = self.exclude_history;
        defaults
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ConstraintName {
    /// Codes that lead to an item that exists and is allowed
    Trie,
    /// Any code that some item of the catalog has at the level
    Occurring,
    /// Any code of the level
    Level,
    /// Any token of the vocabulary
    None,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum NormalizationName {
    /// The model's whole vocabulary
    Vocabulary,
    /// The codes of the level
    Level,
    /// The codes that are legal after the prefix
    Children,
}

impl NormalizationName {
    pub fn normalization(self) -> Normalization {
        match self {
            NormalizationName::Vocabulary => Normalization::Vocabulary,
            NormalizationName::Level => Normalization::Level,
            NormalizationName::Children => Normalization::Children,
        }
    }
}

impl ModelArguments {
    pub fn open_catalog(&self) -> Result<Arc<Catalog>> {
        let path = match &self.catalog {
            Some(path) => path.clone(),
            None => Catalog::beside(&self.model)?,
        };
        let map_above = self.map_catalog_above.saturating_mul(1 << 20);
        let options = CatalogOptions::default().with_map_above(map_above);
        let catalog = Catalog::open_with(&path, &options)?;
        if let Some(warning) = catalog.warning() {
            say(&format!("warning: {}: {warning}", path.display()));
        }
        Ok(Arc::new(catalog))
    }

    /// What stops the model itself from being opened, which a user should hear before a missing
    /// catalog.
    fn model_error(&self) -> Option<Error> {
        let check = || {
            let Checkpoint { config, .. } = Checkpoint::open(&self.model, self.base.as_deref())?;
            SidLayout::read(&self.model, vocab_size(&config)?)
        };
        check().err()
    }

    /// Opens a folder of this kind alone.
    pub fn open_kind(&self, kind: ModelKind) -> Result<Recommender> {
        let other = ModelKind::of(&self.model)?;
        if kind == other {
            return self.open();
        }
        let reason = match other {
            ModelKind::Scores => {
                "its network scores the candidates of a request: use `sidereal rank`".into()
            }
            ModelKind::Vectors => {
                "its network gives vectors and writes no semantic IDs: use `sidereal retrieve`"
                    .into()
            }
            _ => format!(
                "no network here gives vectors, by the \"family\" in sidereal.json ({}); a model that \
                 writes semantic IDs is for `sidereal recommend`",
                VECTOR_FAMILIES.join(", ")
            ),
        };
        Err(Error::ModelFolder { path: self.model.clone(), reason })
    }

    pub fn open(&self) -> Result<Recommender> {
        self.open_with(&self.device.options())
    }

    pub fn open_with(&self, options: &RecommenderOptions) -> Result<Recommender> {
        let catalog =
            self.open_catalog().map_err(|missing| self.model_error().unwrap_or(missing))?;
        if !self.model.join("sidereal.json").exists() {
            let model = self.model.display();
            say(&format!(
                "{model} has no sidereal.json: which token is which code comes from the tokenizer's \
                 files, and a history is read as the codes of its items; `sidereal inspect {model}` \
                 shows it"
            ));
        }
        let spinner = spinner("opening the model");
        let mut options = options.clone();
        options.base.clone_from(&self.base);
        let recommender = Recommender::open(&self.model, catalog, &options)?;
        spinner.finish_and_clear();
        Ok(recommender)
    }
}

/// An error of writing to `path`, or to the standard output.
pub fn write_error(path: Option<&Path>) -> impl Fn(std::io::Error) -> Error + '_ {
    move |source| Error::io(path.unwrap_or(Path::new("standard output")), source)
}

/// Tells the user something beside the output; nobody may be listening.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", printable_lines(text));
}

/// Refuses to write over what is being read.
pub fn refuse_same_file(option: &'static str, output: Option<&Path>, input: &Path) -> Result<()> {
    let is_stdin = input.as_os_str() == "-"; // and no file of that name
    let is_input = |output| !is_stdin && same_file::is_same_file(output, input).unwrap_or(false);
    match output.is_some_and(is_input) {
        true => Err(Error::InvalidOption {
            option,
            reason: format!("{} is the input; name another file", input.display()),
        }),
        false => Ok(()),
    }
}
