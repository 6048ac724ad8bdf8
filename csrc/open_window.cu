// The slots that a step writes behind each request's prefix, how far it may walk there, and the draft block's tokens and
// positions. One thread a slot.
#include "common.cuh"

namespace dflash {
namespace {

__global__ void open_window_kernel(const int32_t* slot_table, const int64_t* rows, const int64_t* prefix_lens,
                                   const int64_t* held, const int64_t* most, const int64_t* bonus_tokens,
                                   int64_t* slots, int64_t* deepest, int64_t* tokens, int64_t* positions,
                                   int64_t columns, int64_t mask_token, int w, int block, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int request = i / w, place = i % w;
  const int64_t prefix = prefix_lens[request], position = prefix + place, end = held[request];
  slots[i] = position < end ? slot_table[rows[request] * columns + position] : 0;
  if (place == 0) deepest[request] = prefix + w <= end ? max(most[request] - prefix - 2, int64_t{0}) : 0;
  if (place >= block) return;
  tokens[request * block + place] = place == 0 ? bonus_tokens[request] : mask_token;
  positions[request * block + place] = position;
}

void open_window(TensorView slot_table, TensorView rows, TensorView prefix_lens, TensorView held, TensorView most,
                 TensorView bonus_tokens, int64_t mask_token, TensorView slots, TensorView deepest, TensorView tokens,
                 TensorView positions) {
  const int64_t bs = slots.size(0), w = slots.size(1), block = tokens.size(1), count = bs * w;
  const int64_t requests = slot_table.size(0), columns = slot_table.size(1);
  TVM_FFI_ICHECK(block <= w) << "the window of " << w << " is narrower than the block of " << block;
  launch(open_window_kernel, dim3((count + 127) / 128), 128, 0, stream_of(slots),
         data<int32_t>(slot_table, "slot_table", {requests, columns}), data<int64_t>(rows, "rows", {bs}),
         data<int64_t>(prefix_lens, "prefix_lens", {bs}), data<int64_t>(held, "held", {bs}),
         data<int64_t>(most, "most", {bs}), data<int64_t>(bonus_tokens, "bonus_tokens", {bs}),
         data<int64_t>(slots, "slots", {bs, w}), data<int64_t>(deepest, "deepest", {bs}),
         data<int64_t>(tokens, "tokens", {bs, block}), data<int64_t>(positions, "positions", {bs, block}), columns,
         mask_token, w, block, count);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_window, dflash::open_window);
