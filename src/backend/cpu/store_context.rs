use std::sync::Arc;

use super::slot::HeadContext;
use super::{Buffer, CpuBackend, Heads, Slot};

impl CpuBackend {
    pub(super) fn store_context(
        &self,
        layer: usize,
        kv: &Buffer,
        offset: usize,
        heads: Heads,
        slots: &mut [Slot],
    ) {
        let head_dim = heads.head_dim;
        let mut first_row = 0;
        for slot in slots {
            let rows = first_row..first_row + slot.spec.context_len;
            first_row = rows.end;
            let pack = |head: usize| {
                let keys = offset + head * head_dim;
                let values = keys + heads.kv_dim();
                let keys = kv.view(rows.clone(), keys..keys + head_dim);
                let values = kv.view(rows.clone(), values..values + head_dim);
                HeadContext::new(self, keys, values)
            };
            let contexts = Arc::get_mut(&mut slot.contexts);
            let contexts = contexts.expect("a context is stored before its slot is forked");
            contexts[layer] = (0..heads.num_kv_heads).map(pack).collect();
        }
    }
}
