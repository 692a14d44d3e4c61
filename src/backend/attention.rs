//! What an attention is: heads, score rule, what a query attends to, scale and bias.

/// How the columns of a projection are shared out: `num_heads` query heads, then `num_kv_heads`
/// key heads, then as many value heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads` (grouped-query attention, Ainslie et al. 2023).
    pub num_kv_heads: usize,
    /// Columns of a query head and of a key head.
    pub key_dim: usize,
    /// Columns of a value head. No kernel serves values of another width than keys yet:
    /// [`DeviceOps::memory`](super::DeviceOps::memory) refuses them.
    pub value_dim: usize,
}

impl Heads {
    /// Heads whose keys and values are `head_dim` wide.
    pub const fn new(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Heads {
        Heads { num_heads, num_kv_heads, key_dim: head_dim, value_dim: head_dim }
    }

    /// Columns of a head, for kernels that take keys and values of one width.
    ///
    /// # Panics
    /// Where the widths differ: memory for such heads is refused.
    pub fn head_dim(&self) -> usize {
        assert_eq!(self.key_dim, self.value_dim, "memory is refused where widths differ");
        self.key_dim
    }

    /// Columns of all queries.
    pub fn query_dim(&self) -> usize {
        self.num_heads * self.key_dim
    }

    /// Columns of all keys.
    pub fn keys_dim(&self) -> usize {
        self.num_kv_heads * self.key_dim
    }

    /// Columns of all values.
    pub fn values_dim(&self) -> usize {
        self.num_kv_heads * self.value_dim
    }

    /// Columns of an attention's output.
    pub fn out_dim(&self) -> usize {
        self.num_heads * self.value_dim
    }

    /// Columns of all keys, and of all values, for kernels that take them of one width.
    ///
    /// # Panics
    /// Where the widths differ: memory for such heads is refused.
    pub fn kv_dim(&self) -> usize {
        self.num_kv_heads * self.head_dim()
    }

    /// Columns of queries, keys and values together.
    pub fn qkv_dim(&self) -> usize {
        self.query_dim() + self.keys_dim() + self.values_dim()
    }
}

/// How products of queries and keys become the weights of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScoreRule {
    /// Weights are the softmax of the scores, in f32.
    Softmax,
}

/// Which positions of its prompt a position attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Itself and the earlier ones.
    Causal,
    /// All.
    Bidirectional,
}

/// Which keys and values a beam attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvScope {
    /// The request's context alone: cross-attention.
    Context,
    /// The beam's own tail alone: self-attention of a decoder behind an encoder.
    Tail,
    /// Context and tail under one softmax: self-attention of a decoder-only network.
    Both,
}

/// An attention, as [`AttendPrefill`](super::AttendPrefill) and [`AttendBeams`](super::AttendBeams)
/// take it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec<Scope, Bias> {
    /// How the queries' columns are shared out.
    pub heads: Heads,
    /// How scores become weights.
    pub score_rule: ScoreRule,
    /// What a query attends to: a [`Mask`] for prompts, a [`KvScope`] for beams.
    pub scope: Scope,
    /// Multiplies the product of a query and a key.
    pub scale: f32,
    /// Added to the scaled product, by head and distance.
    pub bias: Option<Bias>,
}

/// An attention of prompts. The bias is `[num_heads, 2 * longest - 1]` over key minus query
/// position, where `longest` is the longest context and the middle column stands for distance zero.
pub type PrefillAttention<'a> = AttentionSpec<Mask, &'a [f32]>;

impl<Scope, Bias> AttentionSpec<Scope, Bias> {
    /// Softmax attention without a bias.
    pub fn softmax(heads: Heads, scope: Scope, scale: f32) -> AttentionSpec<Scope, Bias> {
        AttentionSpec { heads, score_rule: ScoreRule::Softmax, scope, scale, bias: None }
    }

    /// Adds a bias to the scores.
    pub fn with_bias(self, bias: Bias) -> AttentionSpec<Scope, Bias> {
        AttentionSpec { bias: Some(bias), ..self }
    }
}
