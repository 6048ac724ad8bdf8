// New slots into each request's row of the slot table; those of all requests come one after another. A warp a request.
#include "common.cuh"

namespace dflash {
namespace {

__global__ void assign_slots_kernel(const int64_t* rows, int32_t* slot_table, const int64_t* begin, const int64_t* end,
                                    const int64_t* slots, int64_t columns) {
  const int request = blockIdx.x;
  int64_t before = 0;  // slots of the requests ahead
  for (int i = threadIdx.x; i < request; i += kWarp) before += end[i] - begin[i];
  before = warp_sum(before);
  int32_t* row = slot_table + rows[request] * columns;
  const int64_t first = begin[request], count = end[request] - first;
  for (int64_t i = threadIdx.x; i < count; i += kWarp) row[first + i] = static_cast<int32_t>(slots[before + i]);
}

void assign_slots(TensorView rows, TensorView slot_table, TensorView begin, TensorView end, TensorView slots) {
  const int64_t bs = rows.size(0), requests = slot_table.size(0), columns = slot_table.size(1);
  launch(assign_slots_kernel, dim3(bs), kWarp, 0, stream_of(slots), data<int64_t>(rows, "rows", {bs}),
         data<int32_t>(slot_table, "slot_table", {requests, columns}), data<int64_t>(begin, "begin", {bs}),
         data<int64_t>(end, "end", {bs}), data<int64_t>(slots, "slots", {slots.size(0)}), columns);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(assign_slots, dflash::assign_slots);
