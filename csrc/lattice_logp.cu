// From the candidates of neighbouring positions to a lattice's conditional log-probabilities. One block a position.
//
// With a selector the transition score of candidate c after p is <A[p] * g, B[c]>, all in float32 from codebooks A and B
// as they are stored; without, every predecessor row is the unary softmax and there is one.
#include "common.cuh"

namespace dflash {
namespace {

// Log-probability kept in [-inf, 0]: a NaN of a broken draft becomes a candidate of no probability.
__device__ inline float settled(float logp) { return logp == logp ? fminf(logp, 0.f) : -INFINITY; }

// log(sum(exp(x))) of row [k] in shared memory.
__device__ inline float lse_of(const float* row, int k) {
  float max = -INFINITY, sum = 0.f;
  for (int i = 0; i < k; ++i) max = fmaxf(max, row[i]);
  if (max == -INFINITY) return max;
  for (int i = 0; i < k; ++i) sum += expf(row[i] - max);
  return max + logf(sum);
}

__global__ void unary_kernel(const float* unary, const float* lse, float* logp, int k, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) logp[i] = settled(unary[i] - lse[i / k]);
}

template <typename T>
__global__ void selector_kernel(const float* unary, const float* lse, const int64_t* tokens, const int64_t* bonus,
                                const T* gate, const T* predecessors, const T* successors, float* logp, int d, int k,
                                int r) {
  DFLASH_DYNAMIC_SHARED(memory);
  // Rows one float wider than the rank, so that the lanes of a warp read from different banks.
  const int width = r + 1;
  float* before = reinterpret_cast<float*>(memory);  // [k, width], times the gate
  float* after = before + k * width;                 // [k, width]
  float* score = after + k * width;                  // [k, k]
  float* own = score + k * k;                        // [k]
  const int position = blockIdx.x, request = position / d, depth = position % d;
  const int64_t* here = tokens + static_cast<int64_t>(position) * k;
  if (threadIdx.x < k) own[threadIdx.x] = unary[position * k + threadIdx.x];
  for (int i = threadIdx.x; i < k * r; i += blockDim.x) {
    const int row = i / r, column = i % r;
    const int64_t p = depth == 0 ? bonus[request] : here[row - k];
    before[row * width + column] = to_float(predecessors[p * r + column]) * to_float(gate[position * r + column]);
    after[row * width + column] = to_float(successors[here[row] * r + column]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < k * k; i += blockDim.x) {
    const float *p = before + i / k * width, *c = after + i % k * width;
    float sum = 0.f;
    for (int j = 0; j < r; ++j) sum += p[j] * c[j];
    score[i] = own[i % k] + sum;
  }
  __syncthreads();
  const float share = lse_of(own, k) - lse[position];
  for (int i = threadIdx.x; i < k * k; i += blockDim.x)
    logp[static_cast<int64_t>(position) * k * k + i] = settled(score[i] - lse_of(score + i / k * k, k) + share);
}

template <typename T>
void run(TensorView unary, TensorView lse, TensorView tokens, TensorView bonus, TensorView gate,
         TensorView predecessors, TensorView successors, TensorView logp) {
  const int64_t bs = unary.size(0), d = unary.size(1), k = unary.size(2), r = gate.size(2), v = predecessors.size(0);
  const size_t shared = (2 * k * (r + 1) + k * k + k) * sizeof(float);
  launch(selector_kernel<T>, dim3(bs * d), 256, shared, stream_of(unary), data<float>(unary, "unary", {bs, d, k}),
         data<float>(lse, "lse", {bs, d}), data<int64_t>(tokens, "tokens", {bs, d, k}),
         data<int64_t>(bonus, "bonus", {bs}), data<T>(gate, "gate", {bs, d, r}),
         data<T>(predecessors, "predecessors", {v, r}), data<T>(successors, "successors", {v, r}),
         data<float>(logp, "logp", {bs, d, k, k}), d, k, r);
}

void lattice_unary(TensorView unary, TensorView lse, TensorView logp) {
  const int64_t bs = unary.size(0), d = unary.size(1), k = unary.size(2), count = bs * d * k;
  launch(unary_kernel, dim3((count + 255) / 256), 256, 0, stream_of(unary), data<float>(unary, "unary", {bs, d, k}),
         data<float>(lse, "lse", {bs, d}), data<float>(logp, "logp", {bs, d, 1, k}), k, count);
}

void lattice_selector(TensorView unary, TensorView lse, TensorView tokens, TensorView bonus, TensorView gate,
                      TensorView predecessors, TensorView successors, TensorView logp) {
  const DLDataType type = gate.dtype();
  if (same_type(type, TypeOf<float>::value))
    return run<float>(unary, lse, tokens, bonus, gate, predecessors, successors, logp);
  if (same_type(type, TypeOf<__half>::value))
    return run<__half>(unary, lse, tokens, bonus, gate, predecessors, successors, logp);
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "the gate is float32, float16 or bfloat16";
  run<__nv_bfloat16>(unary, lse, tokens, bonus, gate, predecessors, successors, logp);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(lattice_unary, dflash::lattice_unary);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lattice_selector, dflash::lattice_selector);
