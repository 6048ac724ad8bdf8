// Where everything that a walk accepted comes from and goes to. One thread a walked place.
#include "common.cuh"

namespace dflash {
namespace {

__global__ void commit_rows_kernel(const int64_t* slots, const int64_t* prefix_lens, const int64_t* nodes,
                                   const int32_t* lens, int64_t* sources, int64_t* destinations, int64_t* rows,
                                   int64_t* positions, int64_t* context_slots, int w, int slots_width, int m,
                                   int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int request = i / m, depth = i % m;
  const int64_t* window = slots + static_cast<int64_t>(request) * slots_width;
  const int64_t node = nodes[i], slot = window[depth];
  const bool kept = depth < lens[request];
  sources[i] = kept ? window[node] : slot;
  destinations[i] = slot;
  rows[i] = static_cast<int64_t>(request) * w + node;
  positions[i] = prefix_lens[request] + depth;
  context_slots[i] = kept ? slot : 0;
}

void commit_rows(TensorView slots, TensorView prefix_lens, TensorView nodes, TensorView lens, int64_t w,
                 TensorView sources, TensorView destinations, TensorView rows, TensorView positions,
                 TensorView context_slots) {
  const int64_t bs = nodes.size(0), m = nodes.size(1), width = slots.size(1), count = bs * m;
  TVM_FFI_ICHECK(m <= width && w <= width) << "the window is narrower than the walk";
  launch(commit_rows_kernel, dim3((count + 127) / 128), 128, 0, stream_of(slots),
         data<int64_t>(slots, "slots", {bs, width}), data<int64_t>(prefix_lens, "prefix_lens", {bs}),
         data<int64_t>(nodes, "nodes", {bs, m}), data<int32_t>(lens, "lens", {bs}),
         data<int64_t>(sources, "sources", {count}), data<int64_t>(destinations, "destinations", {count}),
         data<int64_t>(rows, "rows", {count}), data<int64_t>(positions, "positions", {count}),
         data<int64_t>(context_slots, "context_slots", {count}), w, width, m, count);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(commit_rows, dflash::commit_rows);
