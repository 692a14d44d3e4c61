// The nonlinearities of feed-forward layers.
#pragma once

#include "../generated/shared.cuh"

__device__ __forceinline__ float activated(uint32_t activation, float x) {
  switch (activation) {
    case kRelu: return fmaxf(x, 0.0f);
    case kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case kGeluTanh: {
      const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
      return 0.5f * x * (1.0f + tanhf(inner));
    }
    default: return x / (1.0f + expf(-x));
  }
}
