// Logits of a request penalised in place by what it has emitted, and at a tree's nodes by their paths too.
//
// A request's vocabulary is cut into parts, a block each. A block looks at its part of the counts once, chunk by chunk,
// and lists the tokens that were emitted or end the request, few as they are: then its threads share the pairs of a
// listed token and a row of logits, so that many are read at once. The tree's tokens are left out there: all blocks
// share the pairs of a node and one of these. So each logit has one writer. A request without penalties is seen by its
// place, before anything else is read.
#include "common.cuh"

namespace dflash {
namespace {

constexpr int kPenaliseThreads = 256;
constexpr int kCountsAtOnce = 8;  // counts that a thread reads at once
constexpr int kChunk = kCountsAtOnce * kPenaliseThreads;
constexpr int kTreeNodes = 256;
constexpr int32_t kEnd = 1 << 30;  // as kernels/penalties.py: END

// By SGLang's numbers of requests; counts by place.
struct Emitted {
  const int64_t* address;
  const int64_t* places;
  const float* settings;
  const int64_t* fewest;
};

struct Penalty {
  float frequency, presence, repetition;
  int64_t fewest;

  // As torch rounds it: no multiplication is joined with an addition.
  __device__ float of(float logit, int32_t entry, int32_t on_path, int64_t position) const {
    const int32_t count = entry % kEnd + on_path;
    if (entry >= kEnd && position + 1 < fewest) return -INFINITY;
    if (count == 0) return logit;
    const float x = logit - (__fmul_rn(frequency, static_cast<float>(count)) + presence);
    return x < 0.f ? x * repetition : x / repetition;
  }
};

template <typename T>
__global__ void penalise_kernel(T* logits, int64_t stride, int w, int vocab, const int64_t* requests,
                                const int64_t* positions, int64_t columns, Emitted emitted, const int64_t* tokens,
                                const bool* mask) {
  __shared__ int64_t own[kTreeNodes];
  __shared__ int listed[kChunk], found;
  __shared__ int32_t entries[kChunk];
  const int b = blockIdx.y, parts = gridDim.x;
  const int64_t request = requests[b], place = emitted.places[request];
  if (place < 0) return;
  const int32_t* counts = reinterpret_cast<const int32_t*>(*emitted.address) + place * vocab;
  const float* settings = emitted.settings + 3 * request;
  const Penalty penalty{settings[0], settings[1], settings[2], emitted.fewest[request]};
  const int64_t* position = positions + b * columns;
  T* rows = logits + b * w * stride;
  auto write = [&](int node, int64_t token, int32_t entry, int32_t on_path) {
    T* logit = rows + node * stride + token;
    *logit = from_float<T>(penalty.of(to_float(*logit), entry, on_path, position[node]));
  };

  const int nodes = tokens == nullptr ? 0 : w;
  for (int i = threadIdx.x; i < nodes; i += kPenaliseThreads) own[i] = tokens[static_cast<int64_t>(b) * w + i];
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  auto seen_before = [&](int64_t token, int end) {
    for (int i = 0; i < end; ++i)
      if (own[i] == token) return true;
    return false;
  };

  const int part = (vocab + parts - 1) / parts, begin = blockIdx.x * part, end = min(begin + part, vocab);
  for (int chunk = begin; chunk < end; chunk += kChunk) {
    const int first = chunk + static_cast<int>(threadIdx.x);
    int32_t entry[kCountsAtOnce];
#pragma unroll
    for (int i = 0; i < kCountsAtOnce; ++i)
      entry[i] = first + i * kPenaliseThreads < end ? counts[first + i * kPenaliseThreads] : 0;
#pragma unroll
    for (int i = 0; i < kCountsAtOnce; ++i) {
      const int token = first + i * kPenaliseThreads;
      if (entry[i] == 0 || seen_before(token, nodes)) continue;
      const int at = atomicAdd(&found, 1);
      listed[at] = token, entries[at] = entry[i];
    }
    __syncthreads();
    const int pairs = found * w;
    for (int i = threadIdx.x; i < pairs; i += kPenaliseThreads) write(i % w, listed[i / w], entries[i / w], 0);
    __syncthreads();
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
  }

  for (int i = blockIdx.x * kPenaliseThreads + threadIdx.x; i < nodes * nodes; i += parts * kPenaliseThreads) {
    const int node = i / nodes, of = i % nodes;
    const int64_t token = own[of];
    if (seen_before(token, of)) continue;  // another thread's
    const bool* sees = mask + (static_cast<int64_t>(b) * w + node) * w;
    int32_t on_path = 0;
    for (int other = max(of, 1); other < nodes; ++other) on_path += own[other] == token && sees[other];
    const int32_t entry = counts[token];
    if (entry != 0 || on_path != 0) write(node, token, entry, on_path);
  }
}

template <typename T>
void run_penalise(TensorView logits, TensorView requests, TensorView positions, const Emitted& emitted, int64_t vocab,
                  const int64_t* tokens, const bool* mask, int64_t parts) {
  const int64_t bs = logits.size(0), w = logits.size(1), columns = positions.size(1);
  const int64_t stride = logits.stride(w == 1 ? 0 : 1);
  TVM_FFI_ICHECK(logits.stride(2) == 1 && (bs == 1 || logits.stride(0) == w * stride)) << "logits are not even rows";
  TVM_FFI_ICHECK(columns >= w && logits.size(2) >= vocab) << "positions or logits are too few";
  launch(penalise_kernel<T>, dim3(parts, bs), kPenaliseThreads, 0, stream_of(logits),
         static_cast<T*>(logits.data_ptr()), stride, w, vocab, data<int64_t>(requests, "requests", {bs}),
         data<int64_t>(positions, "positions", {bs, columns}), columns, emitted, tokens, mask);
}

void penalise(TensorView logits, TensorView requests, TensorView positions, TensorView address, TensorView places,
              TensorView settings, TensorView fewest, int64_t vocab, Optional<TensorView> tokens,
              Optional<TensorView> mask, int64_t parts) {
  TVM_FFI_ICHECK_EQ(logits.ndim(), 3) << "logits are rows of requests";
  TVM_FFI_ICHECK_EQ(positions.ndim(), 2) << "positions are rows of requests";
  const int64_t bs = logits.size(0), w = logits.size(1), all = places.size(0);
  const Emitted emitted{data<int64_t>(address, "address", {1}), data<int64_t>(places, "places", {all}),
                        data<float>(settings, "settings", {all, 3}), data<int64_t>(fewest, "fewest", {all})};
  const int64_t* own = tokens.has_value() ? data<int64_t>(tokens.value(), "tokens", {bs, w}) : nullptr;
  const bool* sees = own == nullptr ? nullptr : data<bool>(mask.value(), "mask", {bs, w, w});
  TVM_FFI_ICHECK(own == nullptr || w <= kTreeNodes)
      << "penalise takes trees of " << kTreeNodes << " nodes at most, got " << w;
  auto run = [&](auto as) { as(logits, requests, positions, emitted, vocab, own, sees, parts); };
  const DLDataType type = logits.dtype();
  if (same_type(type, TypeOf<float>::value)) return run(run_penalise<float>);
  if (same_type(type, TypeOf<__half>::value)) return run(run_penalise<__half>);
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "logits are float32, float16 or bfloat16";
  run(run_penalise<__nv_bfloat16>);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(penalise, dflash::penalise);
