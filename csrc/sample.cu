// One token of each row: of those that its request's filters keep, the one of the highest logit / temperature + noise.
//
// Two launches and no sort. The first cuts rows into parts, a block each, and takes from every part its best token and
// its highest logit. The second joins a row's parts and asks whether the filters keep the best token: counting the tokens
// that are more probable, and their probability, is one look at the row. These alone are in question where it is not
// kept: threads remember them, and the best of them is tried next. A row is looked at by one block, so its sums, and its
// token, do not depend on the batch.
#include "noise.cuh"

namespace dflash {
namespace {

constexpr int kSampleThreads = 256;
constexpr int kFilterThreads = 1024;  // few rows have filters, and each look waits for the one before
constexpr int kKept = 8;              // tokens in question that a thread remembers
constexpr int kAhead = 2;             // vectors that a thread waits for together

struct Settings {
  const int64_t *positions, *seeds;
  const float *temperatures, *top_ps, *min_ps;
  const int32_t* top_ks;
  int w;  // rows of a request
};

// How a row is sampled: without noise where greedy.
struct Row {
  uint32_t state;
  float temperature, inverse;
  bool greedy;

  __device__ Row(const Settings& settings, int row) {
    const int request = row / settings.w;
    greedy = settings.top_ks[request] == 1;
    temperature = greedy ? 1.f : settings.temperatures[request];
    inverse = 1.f / temperature;
    state = row_state(settings.seeds[request], settings.positions[row]);
  }
};

// A score that a thread of the block has found. Which one is a matter of timing, so it decides nothing but what need not
// be worked out exactly, being lower for sure.
using Bound = volatile float*;

// A token and its score; of equal ones the lower token is the better.
struct Best {
  float score;
  int token;

  __device__ static Best none() { return {-INFINITY, INT32_MAX}; }

  __device__ void take(float other, int at) {
    if (other > score || (other == score && at < token)) score = other, token = at;
  }

  __device__ void try_token(const Row& row, float logit, int at, Bound bound) {
    if (!(logit > -INFINITY)) return;  // nor NaN
    if (row.greedy) return take(logit, at);
    const float rest = rest_of(row.state, at), scaled = logit * row.inverse;
    if (scaled + rough_gumbel(rest) + kRough * (1.f + fabsf(scaled) * 1e-3f) < *bound) return;
    const float exact = logit / row.temperature + gumbel(rest);
    take(exact, at);
    if (exact > *bound) *bound = exact;
  }
};

__device__ inline Best best_of_warp(Best mine) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float score = __shfl_xor_sync(kAll, mine.score, step);
    mine.take(score, __shfl_xor_sync(kAll, mine.token, step));
  }
  return mine;
}

// What a part, or a row, comes to.
struct alignas(16) Found {
  Best best;
  float high;  // the highest logit
};

// All threads' together, for all of them.
__device__ Found block_found(Found mine) {
  __shared__ Found of_warp[kWarp];
  mine.best = best_of_warp(mine.best), mine.high = warp_max(mine.high);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (lane < warps) mine = of_warp[lane];
  mine.best = best_of_warp(mine.best), mine.high = warp_max(mine.high);
  __syncthreads();
  return mine;
}

// The tokens more probable than one, and of all that were looked at.
struct Look {
  float count, above, all;  // `all` and `above`: the sum of exp((logit - high) / temperature)
};

__device__ Look block_look(Look mine) {
  __shared__ Look of_warp[kWarp];
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  mine = {warp_sum(mine.count), warp_sum(mine.above), warp_sum(mine.all)};
  if (lane == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  mine = lane < warps ? of_warp[lane] : Look{0.f, 0.f, 0.f};
  mine = {warp_sum(mine.count), warp_sum(mine.above), warp_sum(mine.all)};
  __syncthreads();
  return mine;
}

// visit(vector, first token) of a thread's share of [begin, end) of row `line`; begin is at a whole vector. What a vector
// has beyond the end is -inf.
template <typename T, typename Visit>
__device__ void each_vector(const T* line, int begin, int end, Visit visit) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(line) % 16 == 0;
  const int step = blockDim.x * kVector;
  for (int first = begin + threadIdx.x * kVector; first < end; first += step * kAhead) {
    alignas(16) T values[kAhead][kVector];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = first + i * step;
      auto* whole = reinterpret_cast<uint4*>(values[i]);
      if (aligned && at + kVector <= end) *whole = *reinterpret_cast<const uint4*>(line + at);
      else for (int j = 0; j < kVector; ++j) values[i][j] = at + j < end ? line[at + j] : from_float<T>(-INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) visit(values[i], first + i * step);
  }
}

template <typename T>
__global__ void sample_part_kernel(const T* logits, int64_t stride, int vocab, Settings settings, Found* found) {
  constexpr int kVector = 16 / sizeof(T);
  __shared__ volatile float bound;
  if (threadIdx.x == 0) bound = -INFINITY;
  __syncthreads();
  const int row = blockIdx.y, part = blockIdx.x, parts = gridDim.x;
  const int vectors = (vocab + kVector - 1) / kVector, per_part = (vectors + parts - 1) / parts * kVector;
  const T* line = logits + row * stride;
  const Row how(settings, row);
  const float to_units = how.inverse * kNoiseUnits;
  Found mine{Best::none(), -INFINITY};
  each_vector(line, part * per_part, min((part + 1) * per_part, vocab), [&](const T(&values)[kVector], int first) {
    const float low = bound;
    // The margin is more than all that rounds; it is finite, so that what is infinite is no NaN.
    const float least = (low - kRough - fminf(fabsf(low), 1e30f) * 1e-6f) * kNoiseUnits - kNoiseBias;
    bool any = how.greedy;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float logit = to_float(values[i]);
      mine.high = fmaxf(mine.high, logit);
      any |= logit * to_units + most_gumbel(how.state, first + i) >= least;
    }
    if (!any) return;
#pragma unroll 1
    for (int at = first; at < min(first + kVector, vocab); ++at) mine.best.try_token(how, to_float(line[at]), at, &bound);
  });
  mine = block_found(mine);
  if (threadIdx.x == 0) found[row * parts + part] = mine;
}

// A thread's share of a row's tokens that are in question: those more probable than the last one tried.
template <typename T>
struct Share {
  struct Token { float logit; int token; };
  const T* line;
  int vocab;
  Token* kept;  // of all threads
  int count = kKept + 1;
  float floor = -INFINITY;

  __device__ Token& at(int i) const { return kept[i * kFilterThreads + threadIdx.x]; }

  // visit(logit, token): from the row where there are more of them than are kept.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    constexpr int kVector = 16 / sizeof(T);
    if (count <= kKept) {
      for (int i = 0; i < count; ++i) visit(at(i).logit, at(i).token);
      return;
    }
    each_vector(line, 0, vocab, [&](const T(&values)[kVector], int first) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float logit = to_float(values[i]);
        if (logit > floor) visit(logit, first + i);
      }
    });
  }

  // Leaves those above `least` in question.
  __device__ Look look(float least, float high, float inverse) {
    int more = 0;
    float above = 0.f, all = 0.f;
    each([&](float logit, int token) {
      const float mass = __expf((logit - high) * inverse);
      all += mass;
      if (!(logit > least)) return;
      above += mass;
      if (more < kKept) at(more) = {logit, token};
      ++more;
    });
    count = more, floor = least;
    return block_look({static_cast<float>(more), above, all});
  }

  __device__ Best best(const Row& how, Bound bound) const {
    if (threadIdx.x == 0) *bound = -INFINITY;
    __syncthreads();
    Found mine{Best::none(), -INFINITY};
    each([&](float logit, int token) { mine.best.try_token(how, logit, token, bound); });
    return block_found(mine).best;
  }
};

template <typename T>
__global__ void __launch_bounds__(kFilterThreads)
    filter_kernel(const T* logits, int64_t stride, int vocab, Settings settings, const Found* found, int parts,
                  bool filtered, int64_t* out) {
  DFLASH_DYNAMIC_SHARED(memory);
  __shared__ volatile float bound;
  const int row = blockIdx.x, request = row / settings.w;
  const T* line = logits + row * stride;
  const Row how(settings, row);
  Found whole{Best::none(), -INFINITY};
  for (int i = threadIdx.x; i < parts; i += blockDim.x) {
    const Found part = found[row * parts + i];
    whole.best.take(part.best.score, part.best.token);
    whole.high = fmaxf(whole.high, part.high);
  }
  whole = block_found(whole);
  Best best = whole.best;
  const int top_k = settings.top_ks[request];
  const float top_p = settings.top_ps[request], min_p = settings.min_ps[request];
  const bool by_p = top_p < 1.f;
  bool tried = !filtered || how.greedy || whole.high == -INFINITY || (top_k >= vocab && !by_p && min_p <= 0.f);
  Share<T> share{line, vocab, reinterpret_cast<typename Share<T>::Token*>(memory)};
  float total = -1.f;
  while (!tried) {
    const float of_best = to_float(line[best.token]);
    const Look look = share.look(of_best, whole.high, how.inverse);
    if (total < 0.f) total = look.all;  // the first look is at the whole row
    const bool unlikely = of_best / how.temperature < whole.high / how.temperature + logf(min_p);  // none for 0: -inf
    tried = look.count == 0.f || (look.count < top_k && (!by_p || look.above < top_p * total) && !unlikely);
    if (!tried) best = share.best(how, &bound);
  }
  if (threadIdx.x == 0) out[row] = best.token < vocab ? best.token : 0;
}

template <typename T>
void run_sample(TensorView logits, const Settings& settings, bool filtered, TensorView scratch, TensorView out) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0), parts = scratch.size(1);
  TVM_FFI_ICHECK(logits.stride(1) == 1) << "logits are not rows";
  static_assert(sizeof(Found) == 16);
  auto* found = reinterpret_cast<Found*>(data<int64_t>(scratch, "scratch", {rows, parts, 2}));
  const auto* line = static_cast<const T*>(logits.data_ptr());
  const cudaStream_t stream = stream_of(logits);
  const size_t kept = sizeof(typename Share<T>::Token) * kKept * kFilterThreads;
  launch(sample_part_kernel<T>, dim3(parts, rows), kSampleThreads, 0, stream, line, stride, vocab, settings, found);
  launch(filter_kernel<T>, dim3(rows), filtered ? kFilterThreads : kWarp, filtered ? kept : 0, stream, line, stride,
         vocab, settings, found, parts, filtered, data<int64_t>(out, "out", {rows}));
}

void sample(TensorView logits, TensorView positions, TensorView seeds, TensorView temperatures, TensorView top_ks,
            TensorView top_ps, TensorView min_ps, bool filtered, TensorView scratch, TensorView out) {
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
  if (same_type(type, TypeOf<float>::value)) return run_sample<float>(logits, settings, filtered, scratch, out);
  if (same_type(type, TypeOf<__half>::value)) return run_sample<__half>(logits, settings, filtered, scratch, out);
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "logits are float32, float16 or bfloat16";
  run_sample<__nv_bfloat16>(logits, settings, filtered, scratch, out);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, dflash::sample);
