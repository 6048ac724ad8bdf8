// The k tokens of the highest score of each row, and the log-sum-exp of its scores, in two launches. A score is the logit,
// and where the request samples the noise that its sample will be drawn with is added, times a weight.
//
// Rows are cut into parts, one block each. A block's threads first find each their own highest element: the k-th highest
// of these is a floor that at least k elements of the part reach, and no more than k threads' elements can. So the
// second look at the part, now in cache, picks a few dozen candidates, and they are ranked by counting. Equal scores are
// ranked by index, the lower one first, so keys are distinct and the answer does not depend on timing.
#include "noise.cuh"

namespace dflash {
namespace {

constexpr int kThreads = 256;
constexpr int kMostK = 32;

using Key = unsigned long long;

// Orders as (score, lower index): the float's bits made monotone above the index's complement. NaN counts as -inf.
__device__ inline Key key_of(float score, int index) {
  if (!(score == score)) score = -INFINITY;
  const unsigned bits = __float_as_uint(score);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ordered) << 32 | static_cast<unsigned>(~index);
}

__device__ inline int index_of(Key key) { return ~static_cast<unsigned>(key); }

__device__ inline float score_of(Key key) {
  const unsigned ordered = key >> 32;
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// sum(exp(x)) as a maximum and a sum relative to it.
struct Lse { float max, sum; };

__device__ inline Lse join(Lse a, Lse b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return {max, 0.f};
  return {max, a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max)};
}

__device__ inline float block_max(float mine, float* of_warp) {
  mine = warp_max(mine);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  for (int i = 0; i < kThreads / kWarp; ++i) mine = fmaxf(mine, of_warp[i]);
  return mine;
}

__device__ inline float block_sum(float mine, float* of_warp) {
  mine = warp_sum(mine);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  mine = 0.f;
  for (int i = 0; i < kThreads / kWarp; ++i) mine += of_warp[i];
  return mine;
}

// By request; a row's position is its request's first one, and its place among the request's rows.
struct Noise {
  const int64_t *seeds, *positions;
  const float* weights;
  int each;  // rows of a request
};

// How a row's logits become scores.
struct Scores {
  float weight = 0.f;
  uint32_t state = 0;

  __device__ Scores(const Noise& noise, int row) {
    if (noise.each == 0) return;
    const int request = row / noise.each;
    weight = noise.weights[request];
    if (weight != 0.f) state = row_state(noise.seeds[request], noise.positions[request] + row % noise.each);
  }

  // The fast noise is near enough: it decides what is drafted, never what is said. Both looks must see the same bits.
  __device__ float of(float logit, int index) const {
    return weight == 0.f ? logit : __fmaf_rn(weight, rough_gumbel(rest_of(state, index)), logit);
  }
};

// How many of keys [count] are higher than `key`.
__device__ inline int rank_of(Key key, const Key* keys, int count) {
  int rank = 0;
  for (int i = 0; i < count; ++i) rank += keys[i] > key;
  return rank;
}

template <typename T>
__global__ void part_kernel(const T* logits, int64_t stride, int vocab, Noise noise, int parts, int k, Key* part_keys,
                            float2* part_lse) {
  constexpr int kVector = 16 / sizeof(T);
  DFLASH_DYNAMIC_SHARED(memory);
  Key* candidates = reinterpret_cast<Key*>(memory);  // [k * elements of a thread]
  __shared__ Key highest[kThreads];
  __shared__ float max_of_warp[kThreads / kWarp], sum_of_warp[kThreads / kWarp];
  __shared__ Key floor_key;
  __shared__ int found;

  const int part = blockIdx.x, row = blockIdx.y;
  const T* line = logits + row * stride;
  const Scores scores(noise, row);
  // Parts begin at whole vectors. A thread owns the same elements at both looks.
  const int vectors = (vocab + kVector - 1) / kVector, per_part = (vectors + parts - 1) / parts;
  const int begin = part * per_part, end = min(begin + per_part, vectors);
  auto each = [&](auto visit) {
    for (int v = begin + threadIdx.x; v < end; v += kThreads) {
      alignas(16) T values[kVector];
      *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(line + v * kVector);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (v * kVector + i < vocab) visit(scores.of(to_float(values[i]), v * kVector + i), v * kVector + i);
    }
  };

  float high = -INFINITY;
  int at = (begin + threadIdx.x) * kVector;  // of equal scores, and where all are -inf or NaN, the first
  const bool any = begin + threadIdx.x < end;
  each([&](float score, int index) {
    if (score > high) high = score, at = index;
  });
  const Key mine = any ? key_of(high, at) : 0;
  highest[threadIdx.x] = mine;
  if (threadIdx.x == 0) found = 0, floor_key = 0;
  const float max = block_max(high, max_of_warp);  // and a barrier
  if (any && rank_of(mine, highest, kThreads) == k - 1) floor_key = mine;
  __syncthreads();
  const Key least = ::max(floor_key, Key{1});  // with fewer than k threads at work every element is a candidate
  const float low = least == 1 ? -INFINITY : score_of(least);
  float sum = 0.f;
  each([&](float score, int index) {
    sum += score > -INFINITY ? __expf(score - max) : 0.f;
    if (!(score < low) && key_of(score, index) >= least) candidates[atomicAdd(&found, 1)] = key_of(score, index);
  });
  sum = block_sum(sum, sum_of_warp);  // and a barrier
  Key* out = part_keys + (static_cast<int64_t>(row) * parts + part) * k;
  for (int i = threadIdx.x; i < k; i += kThreads)
    if (i >= found) out[i] = 0;
  for (int i = threadIdx.x; i < found; i += kThreads) {
    const int rank = rank_of(candidates[i], candidates, found);
    if (rank < k) out[rank] = candidates[i];
  }
  if (threadIdx.x == 0) part_lse[row * parts + part] = {max, sum};
}

__global__ void join_kernel(const Key* part_keys, const float2* part_lse, int parts, int k, float* values,
                            int64_t* indices, float* out_lse) {
  DFLASH_DYNAMIC_SHARED(memory);
  Key* keys = reinterpret_cast<Key*>(memory);  // [parts * k]
  const int row = blockIdx.x, count = parts * k;
  for (int i = threadIdx.x; i < count; i += blockDim.x) keys[i] = part_keys[static_cast<int64_t>(row) * count + i];
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    if (keys[i] == 0) continue;
    const int rank = rank_of(keys[i], keys, count);
    if (rank < k) {
      values[row * k + rank] = score_of(keys[i]);
      indices[row * k + rank] = index_of(keys[i]);
    }
  }
  if (threadIdx.x == 0) {
    Lse lse{-INFINITY, 0.f};
    for (int i = 0; i < parts; ++i) lse = join(lse, {part_lse[row * parts + i].x, part_lse[row * parts + i].y});
    out_lse[row] = lse.max + logf(lse.sum);
  }
}

template <typename T>
void run(TensorView logits, const Noise& noise, TensorView values, TensorView indices, TensorView lse,
         TensorView scratch) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), k = values.size(1), stride = logits.stride(0);
  constexpr int kVector = 16 / sizeof(T);
  TVM_FFI_ICHECK(logits.stride(1) == 1 && stride % kVector == 0) << "logits are not rows of whole 16-byte vectors";
  TVM_FFI_ICHECK(k <= kMostK && k <= vocab) << "top-k takes 1 to " << kMostK << " of the row, got " << k;
  // scratch: a row's keys of all parts, then their sums.
  const int64_t parts = scratch.size(1), width = k + 1;
  auto* keys = reinterpret_cast<Key*>(data<int64_t>(scratch, "scratch", {rows, parts, width}));
  auto* sums = reinterpret_cast<float2*>(keys + rows * parts * k);
  const int64_t vectors = (vocab + kVector - 1) / kVector, per_part = (vectors + parts - 1) / parts;
  const int64_t per_thread = (per_part + kThreads - 1) / kThreads * kVector;
  const cudaStream_t stream = stream_of(logits);
  launch(part_kernel<T>, dim3(parts, rows), kThreads, k * per_thread * sizeof(Key), stream,
         static_cast<const T*>(logits.data_ptr()), stride, vocab, noise, parts, k, keys, sums);
  launch(join_kernel, dim3(rows), kThreads, parts * k * sizeof(Key), stream, keys, sums, parts, k,
         data<float>(values, "values", {rows, k}), data<int64_t>(indices, "indices", {rows, k}),
         data<float>(lse, "lse", {rows}));
}

Noise noise_of(Optional<TensorView> seeds, Optional<TensorView> positions, Optional<TensorView> weights, int64_t rows) {
  if (!seeds.has_value()) return {};
  const int64_t bs = seeds.value().size(0);
  TVM_FFI_ICHECK(bs > 0 && rows % bs == 0) << rows << " rows are not as many for each of " << bs << " requests";
  return {data<int64_t>(seeds.value(), "seeds", {bs}), data<int64_t>(positions.value(), "positions", {bs}),
          data<float>(weights.value(), "weights", {bs}), static_cast<int>(rows / bs)};
}

void topk_lse(TensorView logits, Optional<TensorView> seeds, Optional<TensorView> positions,
              Optional<TensorView> weights, TensorView values, TensorView indices, TensorView lse, TensorView scratch) {
  const DLDataType type = logits.dtype();
  TVM_FFI_ICHECK_EQ(logits.ndim(), 2) << "logits are rows";
  const Noise noise = noise_of(seeds, positions, weights, logits.size(0));
  if (same_type(type, TypeOf<float>::value)) return run<float>(logits, noise, values, indices, lse, scratch);
  if (same_type(type, TypeOf<__half>::value)) return run<__half>(logits, noise, values, indices, lse, scratch);
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "logits are float32, float16 or bfloat16";
  run<__nv_bfloat16>(logits, noise, values, indices, lse, scratch);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_lse, dflash::topk_lse);
