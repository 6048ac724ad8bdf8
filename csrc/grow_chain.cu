// Greedy descent through each request's lattice: at each depth the best candidate after the one before. One warp a request.
#include "common.cuh"

namespace dflash {
namespace {

__global__ void grow_chain_kernel(const int64_t* tokens, const float* logp, const int64_t* bonus_tokens,
                                  int64_t* out_tokens, float* out_logp, int d, int kp, int k, int n) {
  const int request = blockIdx.x, lane = threadIdx.x;
  int rank = 0;
  float total = 0.f;
  const int64_t out = static_cast<int64_t>(request) * (n + 1);
  if (lane == 0) out_tokens[out] = bonus_tokens[request], out_logp[out] = 0.f;
  for (int depth = 0; depth < n; ++depth) {
    const int64_t position = static_cast<int64_t>(request) * d + depth;
    // Costs are non-negative floats, which order as their bits do; past the candidates nothing is cheaper.
    const unsigned cost =
        lane < k ? __float_as_uint(0.f - logp[(position * kp + (kp > 1 ? rank : 0)) * k + lane]) : kAll;
    const unsigned best = warp_min(cost);
    rank = __ffs(__ballot_sync(kAll, cost == best)) - 1;
    total -= __uint_as_float(best);
    if (lane == 0) out_tokens[out + depth + 1] = tokens[position * k + rank], out_logp[out + depth + 1] = total;
  }
}

void grow_chain(TensorView tokens, TensorView logp, TensorView bonus_tokens, TensorView out_tokens,
                TensorView out_logp) {
  const int64_t bs = tokens.size(0), d = tokens.size(1), k = tokens.size(2), kp = logp.size(2), w = out_tokens.size(1);
  TVM_FFI_ICHECK(k <= kWarp) << "grow_chain takes " << kWarp << " candidates a position at most, got " << k;
  TVM_FFI_ICHECK(w <= d + 1) << "a chain of " << w - 1 << " tokens is deeper than the lattice";
  launch(grow_chain_kernel, dim3(bs), kWarp, 0, stream_of(tokens), data<int64_t>(tokens, "tokens", {bs, d, k}),
         data<float>(logp, "logp", {bs, d, kp, k}), data<int64_t>(bonus_tokens, "bonus_tokens", {bs}),
         data<int64_t>(out_tokens, "out_tokens", {bs, w}), data<float>(out_logp, "out_logp", {bs, w}), d, kp, k, w - 1);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grow_chain, dflash::grow_chain);
