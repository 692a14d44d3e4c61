//! Checkpoints of the repository in a temporary folder, to be damaged or cut small.
#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use sidereal::catalog::{Catalog, Snapshot};
use sidereal::{Engine, EngineOptions, Error};
use tempfile::TempDir;

pub const QWEN3: &str = "decoder_only/qwen3-tied";
pub const T5: &str = "t5/relu-tied";

pub fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models")
}

pub fn temp() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

pub fn write(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("a writable folder");
    path
}

/// Real catalogues, read once for all tests of a file.
pub static INDUSTRIAL: LazyLock<Arc<Catalog>> = LazyLock::new(|| read_catalog("industrial"));
pub static INSTRUMENTS: LazyLock<Arc<Catalog>> = LazyLock::new(|| read_catalog("instruments"));

fn read_catalog(name: &str) -> Arc<Catalog> {
    let path = models().join(format!("catalogs/{name}.index.json"));
    Arc::new(Catalog::open(&path).expect("a real catalogue"))
}

/// A tensor as a file of weights holds it.
pub struct RawTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// A copy of a sound checkpoint, with a catalogue of as many levels.
pub struct Folder {
    folder: TempDir,
    catalog: Arc<Catalog>,
}

impl Folder {
    pub fn of(case: &str) -> Folder {
        let folder = temp();
        for name in ["config.json", "sidereal.json", "model.safetensors"] {
            let from = models().join(case).join(name);
            std::fs::copy(from, folder.path().join(name)).expect("a checkpoint of the repository");
        }
        let catalog = if case == T5 { &INSTRUMENTS } else { &INDUSTRIAL };
        Folder { folder, catalog: Arc::clone(catalog) }
    }

    /// A Qwen3 of 20 tokens, three levels of six codes: few enough that a search over all tokens
    /// meets the items. `items.jsonl` stands beside it: two semantic IDs in three, some of them
    /// shared, most items with a title.
    pub fn small() -> Folder {
        let mut small = Folder::of(QWEN3);
        small.edit("config.json", |config| config["vocab_size"] = json!(20));
        small.edit("sidereal.json", |layout| {
            *layout = json!({"levels": [
                {"size": 6, "first_token": 2},
                {"size": 6, "first_token": 8},
                {"size": 6, "first_token": 14},
            ]});
        });
        small.edit_weights(|tensors| {
            let embedding = find(tensors, "model.embed_tokens.weight");
            embedding.shape[0] = 20;
            embedding.data.truncate(20 * embedding.shape[1] * 4);
        });
        let mut rng = fastrand::Rng::with_seed(11);
        let mut items = String::new();
        let mut count = 0;
        for sid in 0..216 {
            let holders = if rng.u8(0..3) == 0 { 0 } else { rng.usize(1..4) };
            for _ in 0..holders {
                let mut item = json!({"item": format!("i{count}"),
                    "sid": [sid / 36, sid / 6 % 6, sid % 6]});
                if count % 5 > 0 {
                    item["title"] = json!(format!("The “{count}th” item"));
                }
                items += &format!("{item}\n");
                count += 1;
            }
        }
        let path = small.write("items.jsonl", items);
        small.catalog = Arc::new(Catalog::open(&path).expect("sound items"));
        small
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn catalog(&self) -> Arc<Snapshot> {
        self.catalog.snapshot()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        write(&self.folder, name, bytes)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path().join(name)).expect("a file of the checkpoint")
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.path().join(name)).expect("a file of the checkpoint");
    }

    /// Rewrites a file of JSON.
    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&self.read(name)).expect("JSON");
        edit(&mut value);
        self.write(name, value.to_string());
    }

    /// Rewrites the weights.
    pub fn edit_weights(&self, edit: impl FnOnce(&mut Vec<RawTensor>)) {
        let bytes = self.read("model.safetensors");
        let parsed = safetensors::SafeTensors::deserialize(&bytes).expect("sound weights");
        let raw = |(name, view): (String, TensorView<'_>)| RawTensor {
            name,
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: view.data().to_vec(),
        };
        let mut tensors: Vec<RawTensor> = parsed.tensors().into_iter().map(raw).collect();
        edit(&mut tensors);
        let views = tensors.iter().map(|RawTensor { name, dtype, shape, data }| {
            (name, TensorView::new(*dtype, shape.clone(), data).expect("a consistent tensor"))
        });
        let bytes = safetensors::serialize(views, None).expect("a checkpoint");
        self.write("model.safetensors", bytes);
    }

    pub fn open(&self) -> Result<Engine, Error> {
        self.open_with(&self.catalog)
    }

    pub fn open_with(&self, catalog: &Arc<Catalog>) -> Result<Engine, Error> {
        let options = EngineOptions::default().with_threads(1);
        Engine::open(self.path(), Arc::clone(catalog), &options)
    }

    pub fn open_as(&self, options: &EngineOptions) -> Result<Engine, Error> {
        Engine::open(self.path(), Arc::clone(&self.catalog), options)
    }
}

/// The tensor of a name.
pub fn find<'a>(tensors: &'a mut [RawTensor], name: &str) -> &'a mut RawTensor {
    tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of the checkpoint")
}
