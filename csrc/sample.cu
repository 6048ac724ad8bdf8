// One token of each row: of those that its request's filters keep, the one of the highest logit / temperature + noise.
//
// Two launches and no sort. The first cuts rows into parts, a block each, and takes from every part its best token, its
// highest logit and the sum behind the softmax. The second joins a row's parts and asks whether the filters keep the
// best token: counting the tokens that are more probable, and their probability, is one look at the row, and finds on
// its way the best of these, which is tried next where the first is not kept. Parts depend on the vocabulary alone, so a
// row's sums, and its token, do not depend on the batch.
#include "noise.cuh"

namespace dflash {
namespace {

constexpr int kSampleThreads = 256;
constexpr int kFilterThreads = 1024;  // few rows have filters, and each look waits for the one before
constexpr int kPart = 8192;           // tokens

struct Settings {
  const int64_t *positions, *seeds;
  const float *temperatures, *top_ps, *min_ps;
  const int32_t* top_ks;
  int w;  // rows of a request
};

// How a row is sampled: without noise where greedy.
struct Row {
  uint32_t state;
  float temperature;
  bool greedy;

  __device__ Row(const Settings& settings, int row) {
    const int request = row / settings.w;
    greedy = settings.top_ks[request] == 1;
    temperature = greedy ? 1.f : settings.temperatures[request];
    state = row_state(settings.seeds[request], settings.positions[row]);
  }
};

// A token and its score; of equal ones the lower token is the better.
struct Best {
  float score;
  int token;

  __device__ static Best none() { return {-INFINITY, INT32_MAX}; }

  __device__ void take(float other, int at) {
    if (other > score || (other == score && at < token)) score = other, token = at;
  }

  // The exact score is worked out for those alone that may be better.
  __device__ void try_token(const Row& row, float logit, float inverse, int at) {
    if (row.greedy) return take(logit, at);
    const float rest = rest_of(row.state, at);
    if (logit * inverse + rough_gumbel(rest) + kRough * (1.f + fabsf(logit * inverse) * 1e-3f) < score) return;
    take(logit / row.temperature + gumbel(rest), at);
  }
};

__device__ inline Best best_of_warp(Best mine) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float score = __shfl_xor_sync(kAll, mine.score, step);
    mine.take(score, __shfl_xor_sync(kAll, mine.token, step));
  }
  return mine;
}

__device__ inline float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// visit(logit, token) of a block's share of row `line`, NaN as -inf.
template <typename T, typename Visit>
__device__ void each_logit(const T* line, int begin, int end, Visit visit) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(line) % 16 == 0;
  for (int at = begin + threadIdx.x * kVector; at < end; at += blockDim.x * kVector) {
    const int count = min(kVector, end - at);
    alignas(16) T values[kVector];
    if (aligned && count == kVector) *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(line + at);
    else for (int i = 0; i < count; ++i) values[i] = line[at + i];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= count) break;
      const float logit = to_float(values[i]);
      visit(logit == logit ? logit : -INFINITY, at + i);
    }
  }
}

// What a part, or a row, comes to.
struct Sum {
  Best best;
  float high, mass;  // the highest logit, and the sum of exp((logit - high) / temperature)
};

template <typename T>
__global__ void sample_part_kernel(const T* logits, int64_t stride, int vocab, Settings settings, Sum* sums) {
  __shared__ Best bests[kSampleThreads / kWarp];
  __shared__ float highs[kSampleThreads / kWarp], masses[kSampleThreads / kWarp];
  const int row = blockIdx.y, warp = threadIdx.x / kWarp;
  const int begin = blockIdx.x * kPart, end = min(begin + kPart, vocab);
  const T* line = logits + row * stride;
  const Row how(settings, row);
  const float inverse = 1.f / how.temperature;
  Best best = Best::none();
  float high = -INFINITY;
  each_logit(line, begin, end, [&](float logit, int token) {
    high = fmaxf(high, logit);
    best.try_token(how, logit, inverse, token);
  });
  best = best_of_warp(best), high = warp_max(high);
  if (threadIdx.x % kWarp == 0) bests[warp] = best, highs[warp] = high;
  __syncthreads();
  for (int i = 0; i < kSampleThreads / kWarp; ++i) best.take(bests[i].score, bests[i].token), high = fmaxf(high, highs[i]);
  float mass = 0.f;
  if (high > -INFINITY)
    each_logit(line, begin, end, [&](float logit, int) { mass += __expf((logit - high) * inverse); });
  mass = warp_sum(mass);
  if (threadIdx.x % kWarp == 0) masses[warp] = mass;
  __syncthreads();
  if (threadIdx.x != 0) return;
  mass = 0.f;
  for (int i = 0; i < kSampleThreads / kWarp; ++i) mass += masses[i];
  sums[row * gridDim.x + blockIdx.x] = {best, high, mass};
}

template <typename T>
__global__ void __launch_bounds__(kFilterThreads)
    filter_kernel(const T* logits, int64_t stride, int vocab, Settings settings, const Sum* sums, int parts, int64_t* out) {
  constexpr int kWarps = kFilterThreads / kWarp;
  __shared__ Best bests[kWarps];
  __shared__ float masses[kWarps];
  __shared__ int counts[kWarps];
  const int row = blockIdx.x, request = row / settings.w, warp = threadIdx.x / kWarp;
  const T* line = logits + row * stride;
  const Row how(settings, row);
  const float inverse = 1.f / how.temperature;
  Best best = Best::none();
  float high = -INFINITY, total = 0.f;
  for (int i = 0; i < parts; ++i) {
    const Sum part = sums[row * parts + i];
    best.take(part.best.score, part.best.token);
    high = fmaxf(high, part.high);
  }
  for (int i = 0; i < parts; ++i) {
    const Sum part = sums[row * parts + i];
    if (part.high > -INFINITY) total += part.mass * __expf((part.high - high) * inverse);
  }
  const int top_k = settings.top_ks[request];
  const float top_p = settings.top_ps[request], min_p = settings.min_ps[request];
  const bool by_p = top_p < 1.f;
  bool tried = how.greedy || high == -INFINITY || (top_k >= vocab && !by_p && min_p <= 0.f);
  while (!tried) {
    const float of_best = to_float(line[best.token]);
    Best next = Best::none();
    int count = 0;
    float mass = 0.f;
    each_logit(line, 0, vocab, [&](float logit, int token) {
      if (!(logit > of_best)) return;
      ++count;
      mass += __expf((logit - high) * inverse);
      next.try_token(how, logit, inverse, token);
    });
    next = best_of_warp(next), mass = warp_sum(mass);
    for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(kAll, count, step);
    if (threadIdx.x % kWarp == 0) bests[warp] = next, masses[warp] = mass, counts[warp] = count;
    __syncthreads();
    next = Best::none(), mass = 0.f, count = 0;
    for (int i = 0; i < kWarps; ++i)
      next.take(bests[i].score, bests[i].token), mass += masses[i], count += counts[i];
    __syncthreads();
    tried = count == 0 || (count < top_k && (!by_p || mass < top_p * total) &&
                           (min_p <= 0.f || of_best / how.temperature >= high / how.temperature + logf(min_p)));
    if (!tried) best = next;
  }
  if (threadIdx.x == 0) out[row] = best.token < vocab ? best.token : 0;
}

template <typename T>
void run_sample(TensorView logits, const Settings& settings, TensorView scratch, TensorView out) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  TVM_FFI_ICHECK(logits.stride(1) == 1) << "logits are not rows";
  const int64_t parts = (vocab + kPart - 1) / kPart;
  static_assert(sizeof(Sum) == 16);
  auto* sums = reinterpret_cast<Sum*>(data<int64_t>(scratch, "scratch", {rows, parts, 2}));
  const auto* line = static_cast<const T*>(logits.data_ptr());
  const cudaStream_t stream = stream_of(logits);
  launch(sample_part_kernel<T>, dim3(parts, rows), kSampleThreads, 0, stream, line, stride, vocab, settings, sums);
  launch(filter_kernel<T>, dim3(rows), kFilterThreads, 0, stream, line, stride, vocab, settings, sums, parts,
         data<int64_t>(out, "out", {rows}));
}

void sample(TensorView logits, TensorView positions, TensorView seeds, TensorView temperatures, TensorView top_ks,
            TensorView top_ps, TensorView min_ps, TensorView scratch, TensorView out) {
  TVM_FFI_ICHECK_EQ(logits.ndim(), 2) << "logits are rows";
  const int64_t rows = logits.size(0), bs = seeds.size(0);
  TVM_FFI_ICHECK(bs > 0 && rows % bs == 0) << rows << " rows are not as many for each of " << bs << " requests";
  const Settings settings{data<int64_t>(positions, "positions", {rows}),
                          data<int64_t>(seeds, "seeds", {bs}),
                          data<float>(temperatures, "temperatures", {bs}),
                          data<float>(top_ps, "top_ps", {bs}),
                          data<float>(min_ps, "min_ps", {bs}),
                          data<int32_t>(top_ks, "top_ks", {bs}),
                          static_cast<int>(rows / bs)};
  const DLDataType type = logits.dtype();
  if (same_type(type, TypeOf<float>::value)) return run_sample<float>(logits, settings, scratch, out);
  if (same_type(type, TypeOf<__half>::value)) return run_sample<__half>(logits, settings, scratch, out);
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "logits are float32, float16 or bfloat16";
  run_sample<__nv_bfloat16>(logits, settings, scratch, out);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, dflash::sample);
