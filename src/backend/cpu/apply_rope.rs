//! Queries and keys turned to their positions, then keys and values stored.

use rayon::prelude::*;
use rten_simd::SimdOp;

use super::buffer::VALUES_PER_TASK;
use super::rms_norm::NormRows;
use super::{Buffer, CpuBackend};
use crate::backend::{AppendTail, ApplyRope, Batch, HeadNorms, Heads, StoreContext};

impl ApplyRope for CpuBackend {
    fn apply_rope(
        &self,
        layer: usize,
        qkv: &mut Buffer,
        heads: Heads,
        norms: Option<HeadNorms<'_, CpuBackend>>,
        rope_tables: &Buffer,
        batch: &mut Batch<'_, CpuBackend>,
    ) {
        rotate(qkv, heads, norms, rope_tables);
        self.store_context(layer, qkv, heads.query_dim(), heads, batch);
        self.append_tail(layer, qkv, heads, batch);
    }
}

fn rotate(
    qkv: &mut Buffer,
    heads: Heads,
    norms: Option<HeadNorms<'_, CpuBackend>>,
    rope_tables: &Buffer,
) {
    let columns = qkv.columns;
    let (query_dim, head_dim) = (heads.query_dim(), heads.key_dim);
    let rows_per_task = (VALUES_PER_TASK / columns).max(1);
    let tables = rope_tables.values.par_chunks(rows_per_task * head_dim);
    let tasks = qkv.values.par_chunks_mut(rows_per_task * columns).zip(tables);
    tasks.for_each(|(rows, tables)| {
        for (row, rope) in rows.chunks_exact_mut(columns).zip(tables.chunks(head_dim)) {
            let (queries, keys) = row[..query_dim + heads.keys_dim()].split_at_mut(query_dim);
            if let Some(HeadNorms { query, key, epsilon }) = norms {
                NormRows { x: None, weight: query, epsilon, out: queries }.dispatch();
                NormRows { x: None, weight: key, epsilon, out: keys }.dispatch();
            }
            let (cosines, sines) = rope.split_at(head_dim / 2);
            let turn_heads =
                queries.chunks_exact_mut(head_dim).chain(keys.chunks_exact_mut(head_dim));
            turn_heads.for_each(|head| turn(head, cosines, sines));
        }
    });
}

fn turn(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (firsts, seconds) = head.split_at_mut(cosines.len());
    let pairs = firsts.iter_mut().zip(seconds).zip(cosines.iter().zip(sines));
    for ((first, second), (cosine, sine)) in pairs {
        let (x, y) = (*first, *second);
        *first = x * cosine - y * sine;
        *second = y * cosine + x * sine;
    }
}
