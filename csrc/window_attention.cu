// A window pass's attention to the window itself, joined with what a library's kernel made of the prefix; and the window's
// keys and values into the cache, as they are at hand.
//
// In a tree a node sees its ancestors only, at most its depth of them: a dense masked product would do mostly nothing.
// One warp a query head and token visits the set bits of its mask's row.
#include "common.cuh"

namespace dflash {
namespace {

// A lane's part of a row, loaded at once.
template <typename T, int kPerLane>
struct alignas(sizeof(T) * kPerLane < 16 ? sizeof(T) * kPerLane : 16) Part {
  T raw[kPerLane];
};

constexpr int kAtOnce = 4;  // ancestors whose rows are on their way together: a node's few are all latency

template <typename T, int kPerLane>  // head size = 32 * kPerLane
__global__ void window_kernel(const T* q, const T* keys, const T* values, int64_t q_stride, int64_t k_stride,
                              int64_t v_stride, const bool* mask, const float* prefix_lse, T* out, T* key_cache,
                              T* value_cache, const int64_t* slots, int bs, int w, int heads, int group, float scale,
                              float softcap) {
  using Row = Part<T, kPerLane>;
  constexpr int kHead = kWarp * kPerLane;
  const int unit = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (unit >= bs * w * heads) return;
  const int head = unit % heads, token = unit / heads, request = token / w, node = token % w;
  auto part = [&](const T* row) { return reinterpret_cast<const Row*>(row)[lane]; };

  const Row own = part(q + token * q_stride + head * kHead);
  float query[kPerLane], sum[kPerLane];
  for (int i = 0; i < kPerLane; ++i) query[i] = to_float(own.raw[i]) * scale;

  // Begin with the prefix: its softmax sum, relative to its own maximum, is 1 at this log-sum-exp.
  T* result = out + (static_cast<int64_t>(token) * heads + head) * kHead;
  const Row prefix = part(result);
  float max = prefix_lse[(static_cast<int64_t>(request) * heads + head) * w + node], total = 1.f;
  const bool any = max > -INFINITY;  // without a prefix what stands in `out` is no number
  if (!any) max = -INFINITY, total = 0.f;
  for (int i = 0; i < kPerLane; ++i) sum[i] = any ? to_float(prefix.raw[i]) : 0.f;

  const bool* row = mask + (static_cast<int64_t>(request) * w + node) * w;
  const T* first_key = keys + static_cast<int64_t>(request) * w * k_stride + head / group * kHead;
  const T* first_value = values + static_cast<int64_t>(request) * w * v_stride + head / group * kHead;
  if (slots != nullptr && head % group == 0) {
    const int64_t to = slots[token] * (heads / group) * kHead + head / group * kHead;
    reinterpret_cast<Row*>(key_cache + to)[lane] = part(first_key + node * k_stride);
    reinterpret_cast<Row*>(value_cache + to)[lane] = part(first_value + node * v_stride);
  }
  for (int base = 0; base < w; base += kWarp) {
    unsigned seen = __ballot_sync(kAll, base + lane < w && row[base + lane]);
    while (seen) {
      Row key[kAtOnce], value[kAtOnce];
      bool there[kAtOnce];
      int other = 0;
      for (int j = 0; j < kAtOnce; ++j) {
        there[j] = seen != 0;
        if (there[j]) other = base + __ffs(seen) - 1;  // else the last one again, to be left out below
        seen &= seen - 1;
        key[j] = part(first_key + other * k_stride);
        value[j] = part(first_value + other * v_stride);
      }
      float score[kAtOnce], higher = max;
      for (int j = 0; j < kAtOnce; ++j) {
        score[j] = 0.f;
        for (int i = 0; i < kPerLane; ++i) score[j] += query[i] * to_float(key[j].raw[i]);
      }
      for (int j = 0; j < kAtOnce; ++j) {
        score[j] = warp_sum(score[j]);
        if (softcap > 0.f) score[j] = softcap * tanhf(score[j] / softcap);
        if (there[j]) higher = fmaxf(higher, score[j]);
      }
      const float keep = __expf(max - higher);
      total *= keep;
      for (int i = 0; i < kPerLane; ++i) sum[i] *= keep;
      for (int j = 0; j < kAtOnce; ++j) {
        const float add = there[j] ? __expf(score[j] - higher) : 0.f;
        total += add;
        for (int i = 0; i < kPerLane; ++i) sum[i] += add * to_float(value[j].raw[i]);
      }
      max = higher;
    }
  }
  Row done;
  for (int i = 0; i < kPerLane; ++i) done.raw[i] = from_float<T>(sum[i] / total);
  reinterpret_cast<Row*>(result)[lane] = done;
}

template <typename T>
void run(TensorView q, TensorView k, TensorView v, TensorView mask, TensorView prefix_lse, TensorView out,
         TensorView key_cache, TensorView value_cache, Optional<TensorView> slots, double scale, double softcap) {
  const int64_t tokens = q.size(0), heads = q.size(1), size = q.size(2), kv_heads = k.size(1);
  const int64_t bs = mask.size(0), w = mask.size(1);
  TVM_FFI_ICHECK_EQ(bs * w, tokens) << "the mask is of another window";
  TVM_FFI_ICHECK(k.size(0) == tokens && v.size(0) == tokens && v.size(1) == kv_heads && heads % kv_heads == 0)
      << "keys, values and queries do not belong together";
  for (const TensorView* t : {&q, &k, &v})
    TVM_FFI_ICHECK(t->ndim() == 3 && t->size(2) == size && t->stride(2) == 1 && t->stride(1) == size &&
                   same_type(t->dtype(), TypeOf<T>::value))
        << "queries, keys and values are [tokens, heads, size] of one type";
  const int64_t room = key_cache.size(0);
  for (const TensorView* t : {&q, &k, &v, &out, &key_cache, &value_cache})
    TVM_FFI_ICHECK(reinterpret_cast<uintptr_t>(t->data_ptr()) % 16 == 0 && t->stride(0) * sizeof(T) % 16 == 0)
        << "queries, keys, values and output begin at whole 16 bytes";
  const auto kernel = size == 64 ? window_kernel<T, 2> : size == 128 ? window_kernel<T, 4> : window_kernel<T, 8>;
  TVM_FFI_ICHECK(size == 64 || size == 128 || size == 256) << "head size " << size << " is not 64, 128 or 256";
  launch(kernel, dim3((tokens * heads + kWarpsPerBlock - 1) / kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, stream_of(q),
         static_cast<const T*>(q.data_ptr()), static_cast<const T*>(k.data_ptr()), static_cast<const T*>(v.data_ptr()),
         q.stride(0), k.stride(0), v.stride(0), data<bool>(mask, "mask", {bs, w, w}),
         data<float>(prefix_lse, "prefix_lse", {bs, heads, w}), data<T>(out, "out", {tokens, heads, size}),
         data<T>(key_cache, "key_cache", {room, kv_heads, size}),
         data<T>(value_cache, "value_cache", {room, kv_heads, size}),
         slots.has_value() ? data<int64_t>(slots.value(), "slots", {tokens}) : nullptr, bs, w, heads, heads / kv_heads,
         scale, softcap);
}

void window_attention(TensorView q, TensorView k, TensorView v, TensorView mask, TensorView prefix_lse, TensorView out,
                      TensorView key_cache, TensorView value_cache, Optional<TensorView> slots, double scale,
                      double softcap) {
  const DLDataType type = q.dtype();
  TVM_FFI_ICHECK_EQ(q.ndim(), 3);
  TVM_FFI_ICHECK_EQ(key_cache.ndim(), 3);
  auto run_as = [&](auto element) {
    run<decltype(element)>(q, k, v, mask, prefix_lse, out, key_cache, value_cache, slots, scale, softcap);
  };
  if (same_type(type, TypeOf<float>::value)) return run_as(float{});
  if (same_type(type, TypeOf<__half>::value)) return run_as(__half{});
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "attention is in float32, float16 or bfloat16";
  run_as(__nv_bfloat16{});
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(window_attention, dflash::window_attention);
