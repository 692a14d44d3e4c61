//! From an item's embedding to its semantic ID: residual quantisation.
//!
//! At each level the nearest entry of a codebook gives the code, and the difference to that entry,
//! the residual, goes to the next level (RQ-VAE, Zeghidour et al. 2021; for semantic IDs, Rajput et
//! al. 2023). A quantiser is trained elsewhere and opened here, or its codebooks are
//! [fitted](Quantizer::fit) by k-means on residuals (RQ-KMeans, as in OneRec).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rayon::prelude::*;
use safetensors::tensor::TensorView;

use crate::backend::cpu::{Buffer, CpuBackend};
use crate::backend::{DeviceOps, Epilogue, Matmul};
use crate::catalog::Snapshot;
use crate::catalog::sid::{MAX_LEVELS, Sid};
use crate::error::{Error, Result};
use crate::models::weights::Weights;
use crate::tensor::Tensor;

/// The policy for two items with equal codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collision {
    /// The items share the semantic ID.
    Share,
    /// A last level distinguishes the items: code 0 for the first, 1 for the second and so on (TIGER).
    Append,
}

/// A residual quantiser: a codebook for each level, and an optional encoder before them.
pub struct Quantizer {
    encoder: Vec<Layer>,
    codebooks: Vec<Codebook>,
}

/// `x -> x Wᵀ + b`
struct Layer {
    /// `[out, in]`
    weight: Vec<f32>,
    bias: Vec<f32>,
    num_in: usize,
}

struct Codebook {
    /// `[codes, dim]`
    entries: Vec<f32>,
    dim: usize,
}

/// Prefixes of the names of codebooks of one level; the level's number follows.
const CODEBOOK_NAMES: [&str; 5] =
    ["codebooks.", "codebook.", "codebooks_", "codebook_", "rq.vq_layers."];
/// Prefix of the names of the encoder's layers; the layer's number follows.
const ENCODER_NAME: &str = "encoder.mlp_layers.";
/// Prefix of the names of the decoder, which training alone needs.
const DECODER_NAME: &str = "decoder.";

impl Quantizer {
    /// Opens a safetensors file, or one of `torch.save`: codebooks as one tensor `codebooks` `[levels, codes, dim]`, or as
    /// one `[codes, dim]` for each level, `codebooks.0`, `codebook_0` or, as LC-Rec and MiniOneRec
    /// train them, `rq.vq_layers.0.embedding.weight`. Linear layers `encoder.mlp_layers.*`, with
    /// ReLU between them, are the optional encoder. A decoder, `decoder.*`, is passed over; any other
    /// tensor is an error, for it may change the codes.
    ///
    /// # Errors
    /// The file's; [`Error::ModelConfig`] where codebooks are missing or shapes do not agree.
    pub fn open(path: &Path) -> Result<Quantizer> {
        let mut weights = Weights::open_file(path)?;
        let bad = |reason: String| Error::ModelConfig { path: path.to_path_buf(), reason };
        let mut levels: BTreeMap<usize, (String, Vec<usize>)> = BTreeMap::new();
        let mut layers: BTreeMap<usize, (String, Vec<usize>)> = BTreeMap::new();
        let mut whole = None;
        for (name, shape) in weights.shapes() {
            let codebook = CODEBOOK_NAMES.iter().find_map(|start| name.strip_prefix(start));
            if name == "codebooks" {
                whole = Some(shape);
            } else if let (Some(level), 2) = (codebook.and_then(leading_number), shape.len()) {
                levels.insert(level, (name, shape));
            } else if let Some(rest) = name.strip_prefix(ENCODER_NAME) {
                match (leading_number(rest), shape.len()) {
                    (Some(layer), 2) => drop(layers.insert(layer, (name, shape))),
                    _ if name.ends_with(".bias") => {}
                    _ => {
                        return Err(bad(format!(
                            "the encoder has {name:?}: linear layers are read"
                        )));
                    }
                }
            }
        }
        let mut codebooks = Vec::new();
        if let Some(shape) = whole {
            let [_, codes, dim] = shape[..] else {
                return Err(bad(format!("\"codebooks\" is {shape:?}, not [levels, codes, dim]")));
            };
            let values = weights.take("codebooks", &shape)?.to_vec();
            let entries = values.chunks(codes.max(1) * dim.max(1));
            codebooks.extend(entries.map(|entries| Codebook { entries: entries.to_vec(), dim }));
        }
        for (at, (level, (name, shape))) in levels.into_iter().enumerate() {
            if at != level || !codebooks.is_empty() && at == 0 {
                return Err(bad(format!("{name:?} stands alone: the level before it is missing")));
            }
            let entries = weights.take(&name, &shape)?.to_vec();
            codebooks.push(Codebook { entries, dim: shape[1] });
        }
        let mut encoder: Vec<Layer> = Vec::new();
        for (name, shape) in layers.into_values() {
            let bias = format!("{}bias", name.trim_end_matches("weight"));
            encoder.push(Layer {
                weight: weights.take(&name, &shape)?.to_vec(),
                bias: weights.take(&bias, &shape[..1])?.to_vec(),
                num_in: shape[1],
            });
        }
        let sizes = encoder.iter().map(|layer| (layer.num_in, layer.bias.len()));
        let sizes: Vec<(usize, usize)> =
            sizes.chain(codebooks.first().map(|first| (first.dim, first.dim))).collect();
        if let Some(pair) = sizes.windows(2).find(|pair| pair[0].1 != pair[1].0) {
            let (gives, takes) = (pair[0].1, pair[1].0);
            return Err(bad(format!("a layer gives {gives} numbers, the next takes {takes}")));
        }
        let quantizer = Quantizer::from_parts(encoder, codebooks).map_err(bad)?;
        let is_spare = |name: &str, _: &Tensor| name.starts_with(DECODER_NAME);
        match weights.finish(is_spare) {
            Err(Error::UnexpectedTensor { name }) => Err(bad(format!(
                "nobody reads its tensor {name:?}, which may change the codes: codebooks and an \
                 encoder of the names \"encoder.mlp_layers.0.weight\" are read; remove what changes \
                 nothing from the file"
            ))),
            finished => finished.map(|()| quantizer),
        }
    }

    fn from_parts(
        encoder: Vec<Layer>,
        codebooks: Vec<Codebook>,
    ) -> std::result::Result<Quantizer, String> {
        if codebooks.is_empty() {
            return Err(
                "there are no codebooks; they are called \"codebooks\", \"codebooks.0\" or \
                        \"rq.vq_layers.0.embedding.weight\""
                    .into(),
            );
        }
        if codebooks.len() > MAX_LEVELS {
            return Err(format!("{} levels, at most {MAX_LEVELS} are possible", codebooks.len()));
        }
        let dim = codebooks[0].dim;
        for (level, codebook) in codebooks.iter().enumerate() {
            let codes = codebook.entries.len().checked_div(codebook.dim).unwrap_or(0);
            if codebook.dim != dim || !(1..=1 << 16).contains(&codes) {
                return Err(format!(
                    "level {level} has {codes} codes of {} numbers, the first level's have {dim}; \
                     1 to 65536 codes are possible",
                    codebook.dim
                ));
            }
        }
        Ok(Quantizer { encoder, codebooks })
    }

    /// Writes the codebooks as a file ([`to_bytes`](Quantizer::to_bytes)).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a quantiser with an encoder; the operating system's.
    pub fn save(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.to_bytes()?).map_err(|error| Error::io(path, error))
    }

    /// The codebooks, `codebooks.0` and so on, as the bytes of a safetensors file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a quantiser with an encoder.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        if !self.encoder.is_empty() {
            return Err(Error::Unsupported {
                what: "writing an encoder".into(),
                way_out: "copy the file that it came from".into(),
            });
        }
        let tensors = self.codebooks.iter().enumerate().map(|(level, codebook)| {
            let shape = vec![codebook.entries.len() / codebook.dim, codebook.dim];
            let bytes = bytemuck::cast_slice(&codebook.entries);
            let view = TensorView::new(safetensors::Dtype::F32, shape, bytes);
            (format!("codebooks.{level}"), view.expect("whole rows"))
        });
        Ok(safetensors::serialize(tensors, None).expect("plain tensors"))
    }

    /// The number of codes that an embedding gets.
    pub fn num_levels(&self) -> usize {
        self.codebooks.len()
    }

    /// The number of dimensions of an embedding.
    pub fn dim(&self) -> usize {
        self.encoder.first().map_or(self.codebooks[0].dim, |layer| layer.num_in)
    }

    /// The codes of an embedding. Of two equally near entries, the smaller code counts.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for another length, or a number that is not finite.
    pub fn codes(&self, embedding: &[f32]) -> Result<Vec<u16>> {
        let bad = |reason: String| Error::InvalidField { field: "embedding", reason };
        if embedding.len() != self.dim() {
            let (len, dim) = (embedding.len(), self.dim());
            return Err(bad(format!("has {len} numbers, the quantiser takes {dim}")));
        }
        if let Some(at) = embedding.iter().position(|number| !number.is_finite()) {
            return Err(bad(format!("number {at} is not finite")));
        }
        let mut vector: Vec<f64> = embedding.iter().map(|&number| number.into()).collect();
        for (at, layer) in self.encoder.iter().enumerate() {
            let is_last = at + 1 == self.encoder.len();
            let rows = layer.weight.chunks(layer.num_in).zip(&layer.bias);
            let out = rows.map(|(row, &bias)| {
                let products = row.iter().zip(&vector).map(|(&w, x)| f64::from(w) * x);
                let sum = products.sum::<f64>() + f64::from(bias);
                if is_last { sum } else { sum.max(0.0) }
            });
            vector = out.collect();
        }
        let mut codes = Vec::with_capacity(self.codebooks.len());
        for codebook in &self.codebooks {
            let (mut nearest, mut code) = (f64::INFINITY, 0);
            for (other, entry) in codebook.entries.chunks(codebook.dim).enumerate() {
                let squares = entry.iter().zip(&vector).map(|(&e, x)| (f64::from(e) - x).powi(2));
                let distance = squares.sum::<f64>();
                if distance < nearest {
                    (nearest, code) = (distance, other);
                }
            }
            let entry = &codebook.entries[code * codebook.dim..(code + 1) * codebook.dim];
            vector.iter_mut().zip(entry).for_each(|(x, &e)| *x -= f64::from(e));
            codes.push(code as u16);
        }
        Ok(codes)
    }

    /// The semantic ID of a new item of a catalog, or the new one of a known item.
    ///
    /// # Errors
    /// Those of [`codes`](Quantizer::codes); [`Error::InvalidField`] where the catalog has another
    /// number of levels, or all 65536 codes of the last level are taken.
    pub fn sid(
        &self,
        snapshot: &Snapshot,
        name: &str,
        embedding: &[f32],
        collision: Collision,
    ) -> Result<Sid> {
        let mut codes = self.codes(embedding)?;
        let num_levels = codes.len() + usize::from(collision == Collision::Append);
        if snapshot.num_levels() != num_levels {
            let reason = format!(
                "the quantiser gives {num_levels} levels (collisions: {collision:?}), the catalog \
                 has {}",
                snapshot.num_levels()
            );
            return Err(Error::InvalidField { field: "sid", reason });
        }
        if collision == Collision::Append {
            let cursor = snapshot.cursor(&codes);
            let is_taken = |digit: u16| {
                let leaf = cursor.and_then(|cursor| snapshot.child(cursor, digit));
                let items = leaf.into_iter().flat_map(|leaf| snapshot.items(leaf, num_levels));
                items.into_iter().any(|item| {
                    let other = snapshot.name(item);
                    other != name && snapshot.find(other) == Some(item)
                })
            };
            let free = (0..=u16::MAX).find(|&digit| !is_taken(digit));
            codes.push(free.ok_or_else(|| Error::InvalidField {
                field: "sid",
                reason: format!("65536 items have the codes {codes:?} already"),
            })?);
        }
        Sid::new(&codes)
    }

    /// The semantic IDs of many embeddings, `[items, dim]`, for a new catalog.
    ///
    /// # Errors
    /// Those of [`codes`](Quantizer::codes), with the row.
    pub fn sids(&self, embeddings: &[f32], collision: Collision) -> Result<Vec<Sid>> {
        let rows = embeddings.par_chunks(self.dim()).enumerate();
        let codes = rows.map(|(row, embedding)| {
            self.codes(embedding).map_err(|error| Error::InvalidField {
                field: "embeddings",
                reason: format!("row {row}: {error}"),
            })
        });
        let codes: Vec<Vec<u16>> = codes.collect::<Result<_>>()?;
        let mut seen: HashMap<Vec<u16>, u32> = HashMap::new();
        let sid = |mut codes: Vec<u16>| {
            if collision == Collision::Append {
                let digit = seen.entry(codes.clone()).or_default();
                let code = u16::try_from(*digit).map_err(|_| Error::InvalidField {
                    field: "sid",
                    reason: format!("more than 65536 items have the codes {codes:?}"),
                })?;
                *digit += 1;
                codes.push(code);
            }
            Sid::new(&codes)
        };
        codes.into_iter().map(sid).collect()
    }
}

fn leading_number(text: &str) -> Option<usize> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

/// Options of [`Quantizer::fit`].
#[derive(Debug, Clone)]
pub struct FitOptions {
    /// The number of levels; each is fitted to the residuals of the levels before.
    pub levels: usize,
    /// The number of codes of a level, at most the number of embeddings.
    pub codes: usize,
    /// Seed of the start: equal seeds give equal codebooks on one kind of machine.
    pub seed: u64,
    /// The most rounds of k-means. A level ends early once a round gains less than a ten-thousandth.
    pub max_rounds: usize,
}

impl Default for FitOptions {
    fn default() -> FitOptions {
        FitOptions { levels: 3, codes: 256, seed: 0, max_rounds: 50 }
    }
}

/// One round of a fit.
#[derive(Debug, Clone, Copy)]
pub struct FitRound {
    /// The level, from zero.
    pub level: usize,
    /// The round, from zero.
    pub round: usize,
    /// Mean squared distance to the nearest entry.
    pub error: f64,
}

/// How many embeddings k-means++ chooses from, for each code.
const SEEDS_PER_CODE: usize = 16;
/// How many embeddings go into one matrix product of distances.
const ROWS_PER_PRODUCT: usize = 512;

impl Quantizer {
    /// Fits codebooks to embeddings `[items, dim]` by k-means on residuals, with a k-means++ start
    /// (Arthur & Vassilvitskii 2007). `progress` is told of every round.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for impossible options; [`Error::InvalidField`] for ragged
    /// embeddings or numbers that are not finite.
    pub fn fit(
        embeddings: &[f32],
        dim: usize,
        options: &FitOptions,
        mut progress: impl FnMut(FitRound),
    ) -> Result<Quantizer> {
        let bad = |field, reason: String| Err(Error::InvalidField { field, reason });
        let wrong = |option, reason: String| Err(Error::InvalidOption { option, reason });
        if dim == 0 || embeddings.is_empty() || !embeddings.len().is_multiple_of(dim) {
            let reason = format!("{} numbers are not rows of {dim}", embeddings.len());
            return bad("embeddings", reason);
        }
        if let Some(at) = embeddings.iter().position(|number| !number.is_finite()) {
            let (row, column) = (at / dim, at % dim);
            return bad("embeddings", format!("row {row}, column {column} is not finite"));
        }
        if !(1..=MAX_LEVELS).contains(&options.levels) {
            return wrong(
                "levels",
                format!("{} is not between 1 and {MAX_LEVELS}", options.levels),
            );
        }
        if !(1..=1 << 16).contains(&options.codes) {
            return wrong("codes", format!("{} is not between 1 and 65536", options.codes));
        }
        let mut rng = fastrand::Rng::with_seed(options.seed);
        let mut residuals = embeddings.to_vec();
        let mut codebooks = Vec::new();
        for level in 0..options.levels {
            let report = |round, error| progress(FitRound { level, round, error });
            let entries = k_means(&residuals, dim, options, &mut rng, report);
            let (nearest, _) = nearest(&residuals, &entries, dim);
            residuals.chunks_mut(dim).zip(nearest).for_each(|(residual, code)| {
                let entry = &entries[code as usize * dim..(code as usize + 1) * dim];
                residual.iter_mut().zip(entry).for_each(|(x, e)| *x -= e);
            });
            codebooks.push(Codebook { entries, dim });
        }
        Ok(Quantizer::from_parts(Vec::new(), codebooks).expect("just checked"))
    }
}

fn k_means(
    points: &[f32],
    dim: usize,
    options: &FitOptions,
    rng: &mut fastrand::Rng,
    mut report: impl FnMut(usize, f64),
) -> Vec<f32> {
    let num_points = points.len() / dim;
    let mut centers = k_means_start(points, dim, options.codes.min(num_points), rng);
    let mut before = f64::INFINITY;
    for round in 0..options.max_rounds {
        let (codes, distances) = nearest(points, &centers, dim);
        let error = distances.iter().map(|&d| f64::from(d)).sum::<f64>() / num_points as f64;
        report(round, error);
        if error >= before * (1.0 - 1e-4) {
            break;
        }
        before = error;
        let mut sums = vec![0f64; centers.len()];
        let mut counts = vec![0u32; centers.len() / dim];
        for (point, &code) in points.chunks(dim).zip(&codes) {
            let code = code as usize;
            counts[code] += 1;
            let sum = &mut sums[code * dim..(code + 1) * dim];
            sum.iter_mut().zip(point).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        // A center without points moves to the point that is farthest from its own center.
        let mut farthest: Vec<u32> = (0..num_points as u32).collect();
        let num_empty = counts.iter().filter(|&&count| count == 0).count();
        if num_empty > 0 {
            farthest.sort_unstable_by(|&a, &b| {
                distances[b as usize].total_cmp(&distances[a as usize]).then(a.cmp(&b))
            });
        }
        let mut farthest = farthest.into_iter();
        for (code, center) in centers.chunks_mut(dim).enumerate() {
            if counts[code] > 0 {
                let sum = &sums[code * dim..(code + 1) * dim];
                let count = f64::from(counts[code]);
                center.iter_mut().zip(sum).for_each(|(c, sum)| *c = (sum / count) as f32);
            } else if let Some(point) = farthest.next() {
                center.copy_from_slice(&points[point as usize * dim..][..dim]);
            }
        }
    }
    centers
}

/// Start of k-means++: each point is drawn with a probability proportional to its squared distance
/// from the points before.
fn k_means_start(points: &[f32], dim: usize, codes: usize, rng: &mut fastrand::Rng) -> Vec<f32> {
    let num_points = points.len() / dim;
    let wanted = (codes * SEEDS_PER_CODE).min(num_points);
    let mut sample: Vec<usize> = rng.choose_multiple(0..num_points, wanted);
    sample.sort_unstable();
    let point = |at: usize| &points[sample[at] * dim..(sample[at] + 1) * dim];
    let mut centers: Vec<f32> = point(rng.usize(0..sample.len())).to_vec();
    let mut distances = vec![f32::INFINITY; sample.len()];
    while centers.len() < codes * dim {
        let newest = &centers[centers.len() - dim..];
        distances.par_iter_mut().enumerate().with_min_len(256).for_each(|(at, nearest)| {
            let squares = point(at).iter().zip(newest).map(|(a, b)| (a - b) * (a - b));
            *nearest = nearest.min(squares.sum());
        });
        let total: f64 = distances.iter().map(|&d| f64::from(d)).sum();
        let mut rest = rng.f64() * total;
        let drawn = distances.iter().position(|&distance| {
            rest -= f64::from(distance);
            rest < 0.0
        });
        // Where every point is a center already, any will do.
        let drawn = drawn.unwrap_or_else(|| rng.usize(0..sample.len()));
        centers.extend_from_slice(point(drawn));
    }
    centers
}

/// For each point its nearest center, and the squared distance to it.
fn nearest(points: &[f32], centers: &[f32], dim: usize) -> (Vec<u32>, Vec<f32>) {
    // |x - c|² = |x|² - 2 x·c + |c|²: all products x·c are one product of matrices.
    let backend = CpuBackend::default();
    let num_centers = centers.len() / dim;
    let matrix = backend
        .matrix(&[Tensor::new(&[num_centers, dim], centers.to_vec())])
        .expect("the CPU has memory");
    let square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
    let squares: Vec<f32> = centers.chunks(dim).map(square).collect();
    let of_stretch = |points: &[f32]| -> Vec<(u32, f32)> {
        let rows = Buffer::new(points.to_vec(), dim);
        let mut products = backend.buffer();
        backend.matmul(&rows, &matrix, None, Epilogue::Store, &mut products);
        let products = products.values().chunks(num_centers).zip(points.chunks(dim));
        let nearest = products.map(|(products, point)| {
            let mut best = (0, f32::INFINITY);
            for (center, (product, square)) in (0..).zip(products.iter().zip(&squares)) {
                let distance = square - 2.0 * product;
                if distance < best.1 {
                    best = (center, distance);
                }
            }
            (best.0, (best.1 + square(point)).max(0.0))
        });
        nearest.collect()
    };
    points.par_chunks(ROWS_PER_PRODUCT * dim).flat_map_iter(of_stretch).unzip()
}
