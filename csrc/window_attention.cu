// A window pass's attention to the window itself, joined with what a library's kernel made of the prefix; and the window's
// keys and values into the cache, as they are at hand.
//
// In a tree a node sees its ancestors only, at most its depth of them: a dense masked product would do mostly nothing.
// One warp a token and few query heads of one key's visits the set bits of the token's row of the mask.
#include "common.cuh"

namespace dflash {
namespace {

// A lane's part of a row, loaded at once.
template <typename T, int kPerLane>
struct alignas(sizeof(T) * kPerLane < 16 ? sizeof(T) * kPerLane : 16) Part {
  T raw[kPerLane];
};

constexpr int kAtOnce = 4;  // ancestors whose rows are on their way together: a node's few are all latency

// Adds each of x up over the warp's lanes; lane l gets the sum of x[l / (32 / N)]. At N - 1 + log2(32 / N) shuffles.
template <int N>
__device__ float warp_sums(float (&x)[N], int lane) {
  int step = kWarp / 2;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAll, given, step);
    }
  }
  for (; step > 0; step /= 2) x[0] += __shfl_xor_sync(kAll, x[0], step);
  return x[0];
}

template <typename T, int kPerLane, int kHeads>  // head size = 32 * kPerLane; a warp's query heads share their key
__global__ void window_kernel(const T* q, const T* keys, const T* values, int64_t q_stride, int64_t k_stride,
                              int64_t v_stride, const bool* mask, const float* prefix_lse, T* out, T* key_cache,
                              T* value_cache, const int64_t* slots, int bs, int w, int heads, int group, float scale,
                              float softcap) {
  using Row = Part<T, kPerLane>;
  constexpr int kHead = kWarp * kPerLane, kLanes = kWarp / (kAtOnce * kHeads);
  const int unit = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int units = heads / kHeads;  // of a token
  if (unit >= bs * w * units) return;
  const int head = unit % units * kHeads, token = unit / units, request = token / w, node = token % w;
  auto part = [&](const T* row) { return reinterpret_cast<const Row*>(row)[lane]; };

  // A score is of an ancestor j and a head h. kLanes lanes hold score (j, h): those of one h differ in the top bits.
  const int own_j = lane / kLanes / kHeads, own_h = lane / kLanes % kHeads;
  auto lane_of = [&](int j, int h) { return (j * kHeads + h) * kLanes; };

  // Begin with the prefix: its softmax sum, relative to its own maximum, is 1 at this log-sum-exp.
  T* result = out + (static_cast<int64_t>(token) * heads + head) * kHead;
  float query[kHeads][kPerLane], sum[kHeads][kPerLane];
  float max = prefix_lse[(static_cast<int64_t>(request) * heads + head + own_h) * w + node];
  if (!(max > -INFINITY)) max = -INFINITY;  // without a prefix what stands in `out` is no number
  float total = max > -INFINITY ? 1.f : 0.f;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const Row own = part(q + token * q_stride + (head + h) * kHead), prefix = part(result + h * kHead);
    const bool any = __shfl_sync(kAll, total, lane_of(0, h)) > 0.f;
    for (int i = 0; i < kPerLane; ++i) query[h][i] = to_float(own.raw[i]) * scale;
    for (int i = 0; i < kPerLane; ++i) sum[h][i] = any ? to_float(prefix.raw[i]) : 0.f;
  }

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
      bool there = false;
      int other = 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (seen) other = base + __ffs(seen) - 1;  // else the last one again, to be left out below
        if (j == own_j) there = seen != 0;
        seen &= seen - 1;
        key[j] = part(first_key + other * k_stride);
        value[j] = part(first_value + other * v_stride);
      }
      float scores[kAtOnce * kHeads];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          float& score = scores[j * kHeads + h] = 0.f;
          for (int i = 0; i < kPerLane; ++i) score += query[h][i] * to_float(key[j].raw[i]);
        }
      float score = warp_sums(scores, lane);
      if (softcap > 0.f) score = softcap * tanhf(score / softcap);
      float higher = there ? score : -INFINITY;
      for (int step = kWarp / 2; step >= kWarp / kAtOnce; step /= 2)
        higher = fmaxf(higher, __shfl_xor_sync(kAll, higher, step));
      higher = fmaxf(higher, max);
      const float keep = __expf(max - higher), add = there ? __expf(score - higher) : 0.f;
      max = higher;
      float added = add;
      for (int step = kWarp / 2; step >= kWarp / kAtOnce; step /= 2) added += __shfl_xor_sync(kAll, added, step);
      total = total * keep + added;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float keep_h = __shfl_sync(kAll, keep, lane_of(0, h));
        for (int i = 0; i < kPerLane; ++i) sum[h][i] *= keep_h;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const float weight = __shfl_sync(kAll, add, lane_of(j, h));
          for (int i = 0; i < kPerLane; ++i) sum[h][i] += weight * to_float(value[j].raw[i]);
        }
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float share = 1.f / __shfl_sync(kAll, total, lane_of(0, h));
    Row done;
    for (int i = 0; i < kPerLane; ++i) done.raw[i] = from_float<T>(sum[h][i] * share);
    reinterpret_cast<Row*>(result + h * kHead)[lane] = done;
  }
}

// The kernel of a head size, and the heads its warps take together.
template <typename T, int kPerLane>
auto kernel_of(int heads_at_once) {
  return heads_at_once == 4   ? window_kernel<T, kPerLane, 4>
         : heads_at_once == 2 ? window_kernel<T, kPerLane, 2>
                              : window_kernel<T, kPerLane, 1>;
}

template <typename T>
void run(TensorView q, TensorView k, TensorView v, TensorView mask, TensorView prefix_lse, TensorView out,
         TensorView key_cache, TensorView value_cache, Optional<TensorView> slots, double scale, double softcap,
         int64_t at_once) {
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
  const int group = heads / kv_heads;
  TVM_FFI_ICHECK((at_once == 1 || at_once == 2 || at_once == 4) && group % at_once == 0)
      << "a warp takes 1, 2 or 4 of the " << group << " heads of a key, got " << at_once;
  const auto kernel = size == 64    ? kernel_of<T, 2>(at_once)
                      : size == 128 ? kernel_of<T, 4>(at_once)
                                    : kernel_of<T, 8>(at_once);
  const int64_t units = tokens * heads / at_once;
  TVM_FFI_ICHECK(size == 64 || size == 128 || size == 256) << "head size " << size << " is not 64, 128 or 256";
  launch(kernel, dim3((units + kWarpsPerBlock - 1) / kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, stream_of(q),
         static_cast<const T*>(q.data_ptr()), static_cast<const T*>(k.data_ptr()), static_cast<const T*>(v.data_ptr()),
         q.stride(0), k.stride(0), v.stride(0), data<bool>(mask, "mask", {bs, w, w}),
         data<float>(prefix_lse, "prefix_lse", {bs, heads, w}), data<T>(out, "out", {tokens, heads, size}),
         data<T>(key_cache, "key_cache", {room, kv_heads, size}),
         data<T>(value_cache, "value_cache", {room, kv_heads, size}),
         slots.has_value() ? data<int64_t>(slots.value(), "slots", {tokens}) : nullptr, bs, w, heads, group, scale,
         softcap);
}

void window_attention(TensorView q, TensorView k, TensorView v, TensorView mask, TensorView prefix_lse, TensorView out,
                      TensorView key_cache, TensorView value_cache, Optional<TensorView> slots, double scale,
                      double softcap, int64_t at_once) {
  const DLDataType type = q.dtype();
  TVM_FFI_ICHECK_EQ(q.ndim(), 3);
  TVM_FFI_ICHECK_EQ(key_cache.ndim(), 3);
  auto run_as = [&](auto element) {
    run<decltype(element)>(q, k, v, mask, prefix_lse, out, key_cache, value_cache, slots, scale, softcap, at_once);
  };
  if (same_type(type, TypeOf<float>::value)) return run_as(float{});
  if (same_type(type, TypeOf<__half>::value)) return run_as(__half{});
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "attention is in float32, float16 or bfloat16";
  run_as(__nv_bfloat16{});
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(window_attention, dflash::window_attention);
