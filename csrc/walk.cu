// From each request's root, follow the target's samples for as long as they are children. One warp a request.
#include "common.cuh"

namespace dflash {
namespace {

constexpr int kNodes = 256;

__global__ void walk_kernel(const int64_t* tokens, const int64_t* parents, const int64_t* sampled, const int64_t* limit,
                            int64_t* out_nodes, int64_t* out_emitted, int32_t* out_lens, int64_t* out_last, int w,
                            int m) {
  __shared__ int64_t token[kNodes], sample[kNodes];
  __shared__ int parent[kNodes];
  const int request = blockIdx.x, lane = threadIdx.x;
  const int64_t first = static_cast<int64_t>(request) * w, out = static_cast<int64_t>(request) * m;
  for (int i = lane; i < w; i += kWarp) {
    token[i] = tokens[first + i];
    sample[i] = sampled[first + i];
    parent[i] = parents[first + i];
  }
  __syncwarp();

  const int64_t most = limit == nullptr ? m : min(static_cast<int64_t>(m), limit[request] + 1);
  int node = 0, walked = 0;
  while (true) {
    if (lane == 0) out_nodes[out + walked] = node, out_emitted[out + walked] = sample[node];
    if (++walked >= most) break;
    int child = 0;  // the root is no node's child
    for (int i = lane; i < w; i += kWarp)
      if (i > 0 && parent[i] == node && token[i] == sample[node]) child = i;
    child = warp_max(child);
    if (child == 0) break;
    node = child;
  }
  for (int i = walked + lane; i < m; i += kWarp) out_nodes[out + i] = node, out_emitted[out + i] = 0;
  if (lane == 0) out_lens[request] = walked, out_last[request] = sample[node];
}

void walk(TensorView tokens, TensorView parents, TensorView sampled, Optional<TensorView> limit, TensorView out_nodes,
          TensorView out_emitted, TensorView out_lens, TensorView out_last) {
  const int64_t bs = tokens.size(0), w = tokens.size(1), m = out_nodes.size(1);
  TVM_FFI_ICHECK(w <= kNodes) << "walk takes trees of " << kNodes << " nodes at most, got " << w;
  launch(walk_kernel, dim3(bs), kWarp, 0, stream_of(tokens), data<int64_t>(tokens, "tokens", {bs, w}),
         data<int64_t>(parents, "parents", {bs, w}), data<int64_t>(sampled, "sampled", {bs, w}),
         limit.has_value() ? data<int64_t>(limit.value(), "limit", {bs}) : nullptr,
         data<int64_t>(out_nodes, "out_nodes", {bs, m}), data<int64_t>(out_emitted, "out_emitted", {bs, m}),
         data<int32_t>(out_lens, "out_lens", {bs}), data<int64_t>(out_last, "out_last", {bs}), w, m);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(walk, dflash::walk);
