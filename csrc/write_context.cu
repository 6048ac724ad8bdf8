// Committed tokens' keys, normed and rotated, and values, into every draft layer's KV pool. One warp a head's row.
#include "common.cuh"

namespace dflash {
namespace {

template <typename T, int kPerLane>  // head size = 32 * kPerLane; a lane holds dimensions lane, lane + 32, ...
__global__ void write_context_kernel(const T* kv, const T* k_norm, const float* cos_sin, const int64_t* positions,
                                     const int64_t* slots, const int64_t* pools, int tokens, int layers, int heads,
                                     float eps) {
  constexpr int kHead = kWarp * kPerLane, kHalf = kPerLane / 2;
  const int unit = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (unit >= tokens * 2 * layers * heads) return;
  // kv is [tokens, 2, layers, heads, size]: keys of all layers, then values.
  const int head = unit % heads, layer = unit / heads % layers;
  const bool is_value = unit / heads / layers % 2;
  const int token = unit / heads / layers / 2;
  const int64_t slot = slots[token];
  if (slot == 0) return;
  const T* row = kv + static_cast<int64_t>(unit) * kHead;
  T* out = reinterpret_cast<T*>(pools[is_value * layers + layer]) + (slot * heads + head) * kHead;
  if (is_value) {
    for (int i = 0; i < kPerLane; ++i) out[i * kWarp + lane] = row[i * kWarp + lane];
    return;
  }
  float x[kPerLane];
  for (int i = 0; i < kPerLane; ++i) x[i] = to_float(row[i * kWarp + lane]);
  if (k_norm != nullptr) {
    float squares = 0.f;
    for (int i = 0; i < kPerLane; ++i) squares += x[i] * x[i];
    const float factor = rsqrtf(warp_sum(squares) / kHead + eps);
    for (int i = 0; i < kPerLane; ++i) x[i] *= factor * to_float(k_norm[layer * kHead + i * kWarp + lane]);
  }
  const float* angles = cos_sin + positions[token] * kHead;  // cosines of all pairs, then sines
  for (int i = 0; i < kHalf; ++i) {
    const float cosine = angles[i * kWarp + lane], sine = angles[kHead / 2 + i * kWarp + lane];
    out[i * kWarp + lane] = from_float<T>(x[i] * cosine - x[i + kHalf] * sine);
    out[(i + kHalf) * kWarp + lane] = from_float<T>(x[i + kHalf] * cosine + x[i] * sine);
  }
}

template <typename T>
void run(TensorView kv, Optional<TensorView> k_norm, TensorView cos_sin, TensorView positions, TensorView slots,
         TensorView pools, double eps) {
  const int64_t tokens = kv.size(0), layers = kv.size(2), heads = kv.size(3), size = kv.size(4);
  TVM_FFI_ICHECK(size == 64 || size == 128 || size == 256) << "head size " << size << " is not 64, 128 or 256";
  const auto kernel = size == 64    ? write_context_kernel<T, 2>
                      : size == 128 ? write_context_kernel<T, 4>
                                    : write_context_kernel<T, 8>;
  const int64_t units = tokens * 2 * layers * heads;
  launch(kernel, dim3((units + kWarpsPerBlock - 1) / kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, stream_of(kv),
         data<T>(kv, "kv", {tokens, 2, layers, heads, size}),
         k_norm.has_value() ? data<T>(k_norm.value(), "k_norm", {layers, 1, size}) : nullptr,
         data<float>(cos_sin, "cos_sin", {cos_sin.size(0), size}), data<int64_t>(positions, "positions", {tokens}),
         data<int64_t>(slots, "slots", {tokens}), data<int64_t>(pools, "pools", {2, layers}), tokens, layers, heads,
         eps);
}

void write_context(TensorView kv, Optional<TensorView> k_norm, TensorView cos_sin, TensorView positions,
                   TensorView slots, TensorView pools, double eps) {
  const DLDataType type = kv.dtype();
  TVM_FFI_ICHECK_EQ(kv.ndim(), 5);
  if (same_type(type, TypeOf<float>::value)) return run<float>(kv, k_norm, cos_sin, positions, slots, pools, eps);
  if (same_type(type, TypeOf<__half>::value)) return run<__half>(kv, k_norm, cos_sin, positions, slots, pools, eps);
  TVM_FFI_ICHECK(same_type(type, TypeOf<__nv_bfloat16>::value)) << "kv is float32, float16 or bfloat16";
  run<__nv_bfloat16>(kv, k_norm, cos_sin, positions, slots, pools, eps);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(write_context, dflash::write_context);
