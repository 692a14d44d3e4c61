//! `kernels/generated/shared.cuh`: the constants and structs that Rust and kernels share, written
//! from their declarations here in Rust.

use std::fmt::Write as _;
use std::path::Path;

use super::shared::{Declaration, Shared};
use super::{
    add_embedding, advance_beams, apply_rope, attend_beams, attend_pointwise, attend_prefill,
    catalog, embed, gated_norm, gather_last, glu, gru, layer_norm, lm_head, logits, matmul, memory,
    metadata, plan, read_beams, rms_norm, rope_tables, rules, store_context, tiling,
};
use crate::backend::Activation;
use crate::catalog::sid::MAX_LEVELS;
use crate::pages::{PAGE_LEN, TAIL_PAGE_LEN};

const FILE: &str = "kernels/generated/shared.cuh";
/// Set to write the file instead of checking it.
const VARIABLE: &str = "SIDEREAL_WRITE_SHARED";
const COMMAND: &str = "SIDEREAL_WRITE_SHARED=1 cargo test --lib shared_header";

/// Name, value and meaning.
fn constants() -> Vec<(&'static str, usize, &'static str)> {
    let activation = |activation| matmul::activation_number(activation) as usize;
    vec![
        ("kPageLen", PAGE_LEN, "tokens of a context's page"),
        ("kTailPageLen", TAIL_PAGE_LEN, "rows of a tail's page"),
        ("kMaxPositions", tiling::MAX_POSITIONS, "of a tail: the start, and one for each step"),
        ("kMaxSplits", tiling::MAX_SPLITS, "parts of a context"),
        ("kMaxLevels", MAX_LEVELS, "of a trie"),
        ("kContinuationsChunk", plan::CHUNK, "that a block of advance_beams_expand takes"),
        ("kMaxParts", plan::MAX_PARTS, "that continuations are dealt out to"),
        ("kSelectChunk", advance_beams::SELECT_CHUNK, "keys that advance_beams_select takes"),
        ("kVocabularyStretch", logits::VOCABULARY_STRETCH, "tokens that lm_head_sums takes"),
        ("kPointwiseRows", attend_pointwise::TILE_ROWS, "that a block of attend_pointwise takes"),
        ("kProductTile", matmul::TILE, "rows and columns of a block's product"),
        ("kVocabulary", rules::BY_VOCABULARY as usize, "Rule::normalizer"),
        ("kLevel", rules::BY_LEVEL as usize, "Rule::normalizer"),
        ("kChildren", rules::BY_CHILDREN as usize, "Rule::normalizer"),
        ("kCertain", rules::CERTAIN as usize, "Rule::normalizer"),
        ("kOfTrie", rules::OF_TRIE as usize, "Rule::choices"),
        ("kOfLevel", rules::OF_LEVEL as usize, "Rule::choices"),
        ("kOfVocabulary", rules::OF_VOCABULARY as usize, "Rule::choices"),
        ("kForced", rules::FORCED as usize, "Rule::choices"),
        ("kNamed", rules::NAMED as usize, "Rule::choices"),
        ("kOccurring", rules::OCCURRING as usize, "Rule::choices"),
        ("kHasAdded", rules::HAS_ADDED as usize, "Rule::flags"),
        ("kHasSeed", rules::HAS_SEED as usize, "Rule::flags"),
        ("kKeepsLogProbs", rules::KEEPS_LOG_PROBS as usize, "Rule::flags"),
        ("kHasCandidates", rules::HAS_CANDIDATES as usize, "Rule::flags"),
        ("kHasList", rules::HAS_LIST as usize, "Rule::flags"),
        ("kRelu", activation(Activation::Relu), "nonlinearity"),
        ("kGelu", activation(Activation::Gelu), "nonlinearity"),
        ("kGeluTanh", activation(Activation::GeluTanh), "nonlinearity"),
        ("kSilu", activation(Activation::Silu), "nonlinearity"),
    ]
}

/// A struct comes before those that hold it.
fn structs() -> Vec<Declaration> {
    vec![
        metadata::PromptEntry::declaration(),
        metadata::SlotEntry::declaration(),
        metadata::BatchParams::declaration(),
        memory::Pages::declaration(),
        memory::Beams::declaration(),
        catalog::TrieEntry::declaration(),
        catalog::AllowedEntry::declaration(),
        rules::RuleEntry::declaration(),
        embed::Params::declaration(),
        add_embedding::Params::declaration(),
        layer_norm::Params::declaration(),
        rms_norm::Params::declaration(),
        matmul::ProductParams::declaration(),
        matmul::ActivateParams::declaration(),
        glu::Params::declaration(),
        rope_tables::Params::declaration(),
        apply_rope::Params::declaration(),
        store_context::Params::declaration(),
        attend_prefill::Params::declaration(),
        attend_pointwise::RowEntry::declaration(),
        attend_pointwise::Params::declaration(),
        gated_norm::Params::declaration(),
        gru::Params::declaration(),
        gather_last::Params::declaration(),
        attend_beams::Params::declaration(),
        attend_beams::CombineParams::declaration(),
        lm_head::Params::declaration(),
        advance_beams::Params::declaration(),
        read_beams::Part::declaration(),
        read_beams::Params::declaration(),
    ]
}

fn header() -> String {
    let mut text = format!(
        "// Made from src/backend/cuda by `{COMMAND}`: edit there.\n\
         #pragma once\n\n#include <stddef.h>\n\n#include \"../common/device.cuh\"\n\n"
    );
    for (name, value, meaning) in constants() {
        writeln!(text, "constexpr uint32_t {name} = {value};  // {meaning}").expect("text");
    }
    for declaration in structs() {
        write!(text, "\n{}", declaration.in_cpp()).expect("text");
    }
    text
}

#[test]
fn the_shared_header_is_what_rust_declares() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    let header = header();
    if std::env::var_os(VARIABLE).is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a writable folder");
        std::fs::write(&path, &header).expect("a writable file");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == header, "{FILE} is stale; renew it: {COMMAND}");
}
