// Accepted rows to the front of their window, in every cache at once. One block a cache and request.
//
// A thread owns 16 bytes of a row, in all rows: nothing is exchanged between threads. It goes by depth, and as a path's
// nodes ascend, what it reads later was never written before.
#include "common.cuh"

namespace dflash {
namespace {

constexpr int kMovers = 128;
constexpr int kRowsAtOnce = 4;  // rows on their way together

__global__ void move_rows_kernel(const int64_t* caches, const int64_t* rows_by_slot, const int64_t* sources,
                                 const int64_t* destinations, int m, int row_vectors) {
  uint4* cache = reinterpret_cast<uint4*>(caches[blockIdx.x]);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * m;
  for (int v = threadIdx.x; v < row_vectors; v += kMovers) {
    for (int base = 0; base < m; base += kRowsAtOnce) {
      uint4 row[kRowsAtOnce];
      int64_t to[kRowsAtOnce];
      for (int j = 0; j < kRowsAtOnce; ++j) {
        to[j] = -1;
        if (base + j >= m) continue;
        int64_t from = sources[first + base + j], there = destinations[first + base + j];
        if (from == there) continue;
        if (rows_by_slot != nullptr) from = rows_by_slot[from], there = rows_by_slot[there];
        row[j] = cache[from * row_vectors + v];
        to[j] = there;
      }
      for (int j = 0; j < kRowsAtOnce; ++j)
        if (to[j] >= 0) cache[to[j] * row_vectors + v] = row[j];
    }
  }
}

void move_rows(TensorView caches, Optional<TensorView> rows_by_slot, TensorView sources, TensorView destinations,
               int64_t bs, int64_t row_bytes) {
  const int64_t count = sources.size(0);
  TVM_FFI_ICHECK(row_bytes % 16 == 0) << "rows of " << row_bytes << " bytes are not whole 16-byte vectors";
  launch(move_rows_kernel, dim3(caches.size(0), bs), kMovers, 0, stream_of(sources),
         data<int64_t>(caches, "caches", {caches.size(0)}),
         rows_by_slot.has_value()
             ? data<int64_t>(rows_by_slot.value(), "rows_by_slot", {rows_by_slot.value().size(0)})
             : nullptr,
         data<int64_t>(sources, "sources", {count}),
         data<int64_t>(destinations, "destinations", {count}), count / bs, row_bytes / 16);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(move_rows, dflash::move_rows);
