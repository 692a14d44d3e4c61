// The states of a gated recurrent unit over the rows of a prompt    (Cho et al. 2014, torch's form):
//   r = sigmoid(a_r + b_r), z = sigmoid(a_z + b_z), n = tanh(a_n + r * b_n)
//   state = (1 - z) * n + z * state, with a: a row of inputs, b = W state + bias
// The state in f32, in shared memory twice: a row reads one and writes the other.
// Grid: a block a prompt. Block: 256 threads, a warp for the three gates of a column. Bound by latency:
// rows follow one another, and each reads the weights, from L2 once they are there.
#include "generated/shared.cuh"

namespace gru {

constexpr uint32_t kThreads = 256, kNumGates = 3;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class T> __device__ __forceinline__ void run(const Params& params) {
  const Prompt& prompt = params.batch.prompts[blockIdx.x];
  const uint32_t width = params.width;
  SharedMemory shared;
  float* state = shared.take<float>(width, "state");
  float* next = shared.take<float>(width, "next");
  for (uint32_t i = threadIdx.x; i < width; i += kThreads) state[i] = 0;
  __syncthreads();
  const T* weight = static_cast<const T*>(params.weight);
  const uint32_t lane = threadIdx.x % kWarpSize;
  for (uint32_t row = prompt.first_row; row < prompt.first_row + prompt.num_rows; row++) {
    const T* inputs = static_cast<const T*>(params.inputs) + size_t(row) * kNumGates * width;
    T* out = static_cast<T*>(params.out) + size_t(row) * width;
    for (uint32_t column = threadIdx.x / kWarpSize; column < width; column += kThreads / kWarpSize) {
      float sums[kNumGates] = {};
      for (uint32_t i = lane; i < width; i += kWarpSize) {
#pragma unroll
        for (uint32_t gate = 0; gate < kNumGates; gate++)
          sums[gate] += state[i] * widened(weight[(size_t(gate) * width + column) * width + i]);
      }
#pragma unroll
      for (uint32_t gate = 0; gate < kNumGates; gate++) {
        sums[gate] = warp_sum(sums[gate]);
        if (params.bias) sums[gate] += params.bias[gate * width + column];
      }
      if (lane == 0) {
        const float reset = sigmoid(widened(inputs[column]) + sums[0]);
        const float update = sigmoid(widened(inputs[width + column]) + sums[1]);
        const float fresh = tanhf(widened(inputs[2 * width + column]) + reset * sums[2]);
        const float value = (1.0f - update) * fresh + update * state[column];
        next[column] = value;
        out[column] = narrowed<T>(value);
      }
    }
    __syncthreads();
    float* const read = state;
    state = next;
    next = read;
  }
}

}  // namespace gru

KERNEL(gru_f32, gru::Params, gru::kThreads) { gru::run<float>(params); }
KERNEL(gru_bf16, gru::Params, gru::kThreads) { gru::run<bf16>(params); }
