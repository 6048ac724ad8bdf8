// What a pass has emitted counts from now on, where its request has penalties. A thread a token.
#include "common.cuh"

namespace dflash {
namespace {

constexpr int kCountThreads = 128;

__global__ void count_emitted_kernel(const int64_t* address, const int64_t* places, const int64_t* requests,
                                     const int64_t* tokens, const int32_t* lens, int vocab, int bs, int n) {
  const int i = blockIdx.x * kCountThreads + threadIdx.x;
  if (i >= bs * n || i % n >= lens[i / n]) return;
  const int64_t place = places[requests[i / n]];
  if (place < 0) return;
  atomicAdd(reinterpret_cast<int32_t*>(*address) + place * vocab + tokens[i], 1);  // a run may repeat a token
}

void count_emitted(TensorView address, TensorView places, int64_t vocab, TensorView requests, TensorView tokens,
                   TensorView lens) {
  const int64_t bs = tokens.size(0), n = tokens.size(1), blocks = (bs * n + kCountThreads - 1) / kCountThreads;
  launch(count_emitted_kernel, dim3(blocks), kCountThreads, 0, stream_of(tokens),
         data<int64_t>(address, "address", {1}), data<int64_t>(places, "places", {places.size(0)}),
         data<int64_t>(requests, "requests", {bs}), data<int64_t>(tokens, "tokens", {bs, n}),
         data<int32_t>(lens, "lens", {bs}), vocab, bs, n);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(count_emitted, dflash::count_emitted);
