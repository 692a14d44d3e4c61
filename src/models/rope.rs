//! Rotary position embeddings as configurations spell them (Su et al. 2021).
//!
//! Two spellings exist: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling`
//! (transformers 4). Where both are there, `rope_scaling` counts, as in transformers.

use serde_json::Value;

use super::config::Config;
use crate::error::{Error, Result};

/// How queries and keys are turned.
#[derive(Debug)]
pub(super) struct Rope {
    /// `[head_dim / 2]`, radians per position.
    pub frequencies: Vec<f32>,
    /// The frequencies before they were scaled for long contexts.
    pub plain: Vec<f32>,
    /// What attention's scores are multiplied by besides `head_dim^-0.5`. Published as a factor of
    /// both cosines and sines, of queries and keys alike, so its square is one of their products.
    pub score_scale: f32,
}

impl Rope {
    /// Reads the configuration of a decoder of `max_positions`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a kind that is not served; [`Error::ModelConfig`].
    pub fn read(config: &Config, head_dim: usize, max_positions: usize) -> Result<Rope> {
        let top_theta = config.number_or("rope_theta", 10_000.0)?;
        let older = config.object("rope_scaling")?.filter(|keys| !keys.is_empty());
        let scaling = match (older, config.object("rope_parameters")?) {
            (Some(older), _) => Some(older),
            (None, newer) => newer.map(|newer| of_full_attention(config, newer)).transpose()?,
        };
        refuse_partial(config)?;
        let Some(scaling) = scaling else {
            return Ok(Rope::unscaled(plain_frequencies(top_theta, head_dim)));
        };
        let theta = scaling.number_or("rope_theta", top_theta)?;
        let plain = plain_frequencies(theta, head_dim);
        refuse_partial(&scaling)?;
        let older_name = scaling.text_or("type", "default")?;
        let kind = scaling.text_or("rope_type", older_name)?;
        if scaling.text("type").is_some_and(|older_name| older_name != kind) {
            return Err(config.error(format!(
                "\"rope_type\" is {kind:?} and \"type\" {older_name:?}; correct the one that is wrong"
            )));
        }
        let trained_len = |scaling: &Config| {
            let own = scaling.size_or("original_max_position_embeddings", max_positions)?;
            config.size_or("original_max_position_embeddings", own)
        };
        let rope = match kind {
            "default" => Rope::unscaled(plain),
            "linear" => {
                let factor = factor_of(&scaling)? as f32;
                let frequencies = plain.iter().map(|frequency| frequency / factor).collect();
                Rope { frequencies, plain, score_scale: 1.0 }
            }
            // Frequencies change beyond the trained length only, and no context goes beyond it.
            "dynamic" => {
                factor_of(&scaling)?;
                let trained_len = trained_len(&scaling)?;
                if trained_len != max_positions {
                    return Err(config.error(format!(
                        "\"max_position_embeddings\" is {max_positions} and \
                         \"original_max_position_embeddings\" {trained_len}: dynamic scaling begins \
                         at one of them; make them equal"
                    )));
                }
                Rope::unscaled(plain)
            }
            "llama3" => {
                let frequencies = llama3_frequencies(&scaling, &plain, trained_len(&scaling)?)?;
                Rope { frequencies, plain, score_scale: 1.0 }
            }
            "yarn" => yarn(&scaling, theta, plain, trained_len(&scaling)?, max_positions)?,
            other => {
                return Err(Error::Unsupported {
                    what: format!("rope_type {other:?}"),
                    way_out: "default, linear, dynamic, llama3 and yarn are".into(),
                });
            }
        };
        scaling.finish()?;
        Ok(rope)
    }

    fn unscaled(plain: Vec<f32>) -> Rope {
        Rope { frequencies: plain.clone(), plain, score_scale: 1.0 }
    }
}

/// The parameters of full attention, where they are given for each type of layer.
fn of_full_attention(config: &Config, parameters: Config) -> Result<Config> {
    let is_nested = parameters.given("full_attention").is_some_and(Value::is_object);
    if !is_nested {
        return Ok(parameters);
    }
    let types = config.texts("layer_types")?;
    if types.is_empty() || types.iter().any(|kind| kind != "full_attention") {
        return Err(Error::Unsupported {
            what: "rope_parameters of several types of layers".into(),
            way_out: "those of one type, named by \"layer_types\", are".into(),
        });
    }
    Ok(parameters.object("full_attention")?.unwrap_or(parameters))
}

/// Refuses to turn a part of each head only.
fn refuse_partial(keys: &Config) -> Result<()> {
    match keys.number_or("partial_rotary_factor", 1.0)? {
        1.0 => Ok(()),
        other => Err(Error::Unsupported {
            what: format!("partial_rotary_factor {other}"),
            way_out: "1.0 is".into(),
        }),
    }
}

/// What positions are stretched by.
fn factor_of(scaling: &Config) -> Result<f64> {
    let factor = scaling.number_or("factor", f64::NAN)?;
    match factor.is_nan() {
        true => Err(scaling.error("the scaling of RoPE has no \"factor\"".into())),
        false => Ok(factor),
    }
}

fn plain_frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    let frequency = |pair| {
        let exponent = (2 * pair) as f64 / head_dim as f64;
        (1.0 / theta.powf(exponent)) as f32
    };
    (0..head_dim / 2).map(frequency).collect()
}

/// Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between
/// blended (Grattafiori et al. 2024; in f32 as published).
fn llama3_frequencies(scaling: &Config, plain: &[f32], trained_len: usize) -> Result<Vec<f32>> {
    let factor = scaling.number_or("factor", 8.0)? as f32;
    let low = scaling.number_or("low_freq_factor", 1.0)? as f32;
    let high = scaling.number_or("high_freq_factor", 4.0)? as f32;
    let trained_len = trained_len as f32;
    if high <= low {
        return Err(
            scaling.error(format!("high_freq_factor {high} must be above low_freq_factor {low}"))
        );
    }
    let scale = |&frequency: &f32| {
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength < trained_len / high {
            frequency
        } else if wavelength > trained_len / low {
            frequency / factor
        } else {
            let smooth = (trained_len / wavelength - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    };
    Ok(plain.iter().map(scale).collect())
}

/// YaRN: frequencies that turn often within the trained length are kept, those that turn seldom
/// stretched by `factor`, those between blended; scores are scaled (Peng et al. 2023).
fn yarn(
    scaling: &Config,
    theta: f64,
    plain: Vec<f32>,
    trained_len: usize,
    max_positions: usize,
) -> Result<Rope> {
    let factor = match trained_len == max_positions {
        true => factor_of(scaling)?,
        false => scaling.number_or("factor", max_positions as f64 / trained_len as f64)?,
    };
    let mscale = |scale: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * scale * factor.ln() + 1.0,
    };
    // Zero counts as absent, as published.
    let (all, of_all) =
        (scaling.number_or_zero("mscale")?, scaling.number_or_zero("mscale_all_dim")?);
    let by_factor = match all != 0.0 && of_all != 0.0 {
        true => mscale(all) / mscale(of_all),
        false => mscale(1.0),
    };
    let attention_factor = scaling.number_or("attention_factor", by_factor)?;
    let dim = 2.0 * plain.len() as f64;
    // The pair of dimensions that turns this many times within the trained length.
    let pair = |turns: f64| {
        let ratio = trained_len as f64 / (turns * 2.0 * std::f64::consts::PI);
        dim * ratio.ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) =
        (pair(scaling.number_or("beta_fast", 32.0)?), pair(scaling.number_or("beta_slow", 1.0)?));
    if scaling.flag("truncate")?.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(pair, &frequency): (usize, &f32)| {
        let stretched = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let frequency = f64::from(frequency);
        (frequency / factor * stretched + frequency * (1.0 - stretched)) as f32
    };
    let frequencies: Vec<f32> = plain.iter().enumerate().map(blend).collect();
    if frequencies.iter().any(|frequency| !frequency.is_finite()) {
        return Err(scaling.error(format!("yarn over a rope_theta of {theta} has no frequencies")));
    }
    Ok(Rope { frequencies, plain, score_scale: (attention_factor * attention_factor) as f32 })
}
