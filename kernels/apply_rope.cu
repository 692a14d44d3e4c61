// Turns each query and key head of a row by its row of the RoPE tables, first and second half of a head paired
// (RoPE, Su et al. 2021), after an RMS norm of each head where weights are given; then keeps the
// keys and values, those of prompts in contexts and those of beams in tails.
// Grid: a block a row. Block: 256 threads, a warp a head. Bound by memory: reads a row once, writes
// it once, and its keys and values once more.
#include "common/batch.cuh"

namespace apply_rope {

constexpr uint32_t kThreads = 256;

template <class T>
__device__ __forceinline__ void turn(T* head, const float* rope, const float* norm,
                                     uint32_t head_dim, float epsilon) {
  const uint32_t lane = threadIdx.x % kWarpSize, half = head_dim / 2;
  float scale = 1;
  if (norm) {
    float sum = 0;
    for (uint32_t i = lane; i < head_dim; i += kWarpSize) {
      const float value = widened(head[i]);
      sum += value * value;
    }
    scale = rsqrtf(warp_sum(sum) / float(head_dim) + epsilon);
    __syncwarp();  // all have read the head that each now writes a part of
  }
  for (uint32_t i = lane; i < half; i += kWarpSize) {
    const float x = widened(head[i]) * scale * (norm ? norm[i] : 1.0f);
    const float y = widened(head[half + i]) * scale * (norm ? norm[half + i] : 1.0f);
    const float cosine = rope[i], sine = rope[half + i];
    head[i] = narrowed<T>(x * cosine - y * sine);
    head[half + i] = narrowed<T>(y * cosine + x * sine);
  }
}

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const uint32_t row = blockIdx.x, head_dim = params.pages.head_dim;
  const uint32_t num_kv_heads = params.pages.num_kv_heads;
  T* qkv = static_cast<T*>(params.qkv) +
           size_t(row) * (params.num_heads + 2 * num_kv_heads) * head_dim;
  const float* rope = params.rope + size_t(row) * head_dim;
  for (uint32_t head = threadIdx.x / kWarpSize; head < params.num_heads + num_kv_heads;
       head += kThreads / kWarpSize) {
    const float* norm = head < params.num_heads ? params.query_norm : params.key_norm;
    turn(qkv + head * head_dim, rope, norm, head_dim, params.epsilon);
  }
  __syncthreads();
  store_kv(params.batch, params.pages, params.layer, row, qkv + params.num_heads * head_dim);
}

}  // namespace apply_rope

KERNEL(apply_rope_f32, apply_rope::Params, apply_rope::kThreads) { apply_rope::run<float>(params); }
KERNEL(apply_rope_bf16, apply_rope::Params, apply_rope::kThreads) { apply_rope::run<bf16>(params); }
