// A window pass's attention to the window itself, joined with what a library's kernel made of the prefix.
//
// In a tree a node sees its ancestors only, at most its depth of them: a dense masked product would do mostly nothing.
// One warp a query head and token visits the set bits of its mask's row.
#include "common.cuh"

namespace dflash {
namespace {

template <typename T, int kPerLane>  // head size = 32 * kPerLane
__global__ void window_kernel(const T* q, const T* keys, const T* values, int64_t q_stride, int64_t k_stride,
                              int64_t v_stride, const bool* mask, const float* prefix_lse, T* out, int bs, int w,
                              int heads, int group, float scale, float softcap) {
  constexpr int kHead = kWarp * kPerLane;
  const int unit = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (unit >= bs * w * heads) return;
  const int head = unit % heads, token = unit / heads, request = token / w, node = token % w;

  auto load = [&](const T* row, float (&x)[kPerLane]) {
    alignas(sizeof(T) * kPerLane) T raw[kPerLane];
    for (int i = 0; i < kPerLane; ++i) raw[i] = row[lane * kPerLane + i];
    for (int i = 0; i < kPerLane; ++i) x[i] = to_float(raw[i]);
  };
  float query[kPerLane], sum[kPerLane], x[kPerLane];
  load(q + token * q_stride + head * kHead, query);
  for (int i = 0; i < kPerLane; ++i) query[i] *= scale;

  // Begin with the prefix: its softmax sum, relative to its own maximum, is 1 at this log-sum-exp.
  T* result = out + (static_cast<int64_t>(token) * heads + head) * kHead;
  load(result, sum);
  float max = prefix_lse[(static_cast<int64_t>(request) * heads + head) * w + node], total = 1.f;
  if (!(max > -INFINITY)) {  // no prefix: what stands in `out` then is no number
    max = -INFINITY, total = 0.f;
    for (int i = 0; i < kPerLane; ++i) sum[i] = 0.f;
  }

  const bool* row = mask + (static_cast<int64_t>(request) * w + node) * w;
  const int64_t first = static_cast<int64_t>(request) * w;
  for (int base = 0; base < w; base += kWarp) {
    unsigned seen = __ballot_sync(kAll, base + lane < w && row[base + lane]);
    for (; seen; seen &= seen - 1) {
      const int64_t other = first + base + __ffs(seen) - 1;
      load(keys + other * k_stride + head / group * kHead, x);
      float score = 0.f;
      for (int i = 0; i < kPerLane; ++i) score += query[i] * x[i];
      score = warp_sum(score);
      if (softcap > 0.f) score = softcap * tanhf(score / softcap);
      const float higher = fmaxf(max, score), keep = __expf(max - higher), add = __expf(score - higher);
      load(values + other * v_stride + head / group * kHead, x);
      total = total * keep + add;
      for (int i = 0; i < kPerLane; ++i) sum[i] = sum[i] * keep + add * x[i];
      max = higher;
    }
  }
  for (int i = 0; i < kPerLane; ++i) result[lane * kPerLane + i] = from_float<T>(sum[i] / total);
}

template <typename T>
void run(TensorView q, TensorView k, TensorView v, TensorView mask, TensorView prefix_lse, TensorView out, double scale,
         double softcap) {
  const int64_t tokens = q.size(0), heads = q.size(1), size = q.size(2), kv_heads = k.size(1);
  const int64_t bs = mask.size(0), w = mask.size(1);
  TVM_FFI_ICHECK_EQ(bs * w, tokens) << "the mask is of another window";
  TVM_FFI_ICHECK(k.size(0) == tokens && v.size(0) == tokens && v.size(1) == kv_heads && heads % kv_heads == 0)
      << "keys, values and queries do not belong together";
  for (const TensorView* t : {&q, &k, &v})
    TVM_FFI_ICHECK(t->ndim() == 3 && t->size(2) == size && t->stride(2) == 1 && t->stride(1) == size &&
                   same_type(t->dtype(), TypeOf<T>::value))
        << "queries, keys and values are [tokens, heads, size] of one type";
  const auto kernel = size == 64 ? window_kernel<T, 2> : size == 128 ? window_kernel<T, 4> : window_kernel<T, 8>;
  TVM_FFI_ICHECK(size == 64 || size == 128 || size == 256) << "head size " << size << " is not 64, 128 or 256";
  launch(kernel, dim3((tokens * heads + kWarpsPerBlock - 1) / kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, stream_of(q),
         static_cast<const T*>(q.data_ptr()), static_cast<const T*>(k.data_ptr()), static_cast<const T*>(v.data_ptr()),
         q.stride(0), k.stride(0), v.stride(0), data<bool>(mask, "mask", {bs, w, w}),
         data<float>(prefix_lse, "prefix_lse", {bs, heads, w}), data<T>(out, "out", {tokens, heads, size}), bs, w,
         heads, heads / kv_heads, scale, softcap);
}

void window_attention(TensorView q, TensorView k, TensorView v, TensorView mask, TensorView prefix_lse, TensorView out,
                      double scale, double softcap) {
  const DLDataType type = q.dtype();
  TVM_FFI_ICHECK_EQ(q.ndim(), 3);
  if (same_type(type, TypeOf<float>::value)) return run<float>(q, k, v, mask, prefix_lse, out, scale, softcap);
  if (same_type(type, TypeOf<__half>::value)) return run<__half>(q, k, v, mask, prefix_lse, out, scale, softcap);
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "attention is in float32, float16 or bfloat16";
  run<__nv_bfloat16>(q, k, v, mask, prefix_lse, out, scale, softcap);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(window_attention, dflash::window_attention);
