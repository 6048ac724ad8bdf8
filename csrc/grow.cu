// The n most probable paths of each request's lattice, best first. One block a request: all of it sorts the lattice's
// rows, its first warp pops.
//
// Every node of the tree so far offers its best child that is not in the tree; the best offer is the next node. A child
// is never more probable than its parent or than the sibling offered before it, so the nodes come out in the total
// order that `kernels.tree.grow` states. With sorted rows a node's next offer is the next of its row: a pop is two
// reductions over the warp, one shuffle and one read.
#include "common.cuh"

namespace dflash {
namespace {

constexpr int kGrowThreads = 512;
constexpr unsigned kNothing = 0xffffffffu;  // above every cost: non-negative floats order as their bits do

// Each row of k in place, highest first, equal ones as they stood; `ranks` says where each stood. A warp sorts as many
// whole rows at once as it has lanes for, by counting.
__device__ void sort_rows(float* logp, uint8_t* ranks, int count, int k) {
  const int lane = threadIdx.x % kWarp, at_once = kWarp / k * k, rank = lane % k;
  for (int base = threadIdx.x / kWarp * at_once; base < count; base += kGrowThreads / kWarp * at_once) {
    const int i = base + lane;
    const bool there = lane < at_once && i < count;
    const float mine = there ? logp[i] : 0.f;
    int place = 0;
    for (int j = 0; there && j < k; ++j) {
      const float other = logp[i - rank + j];
      place += other > mine || (other == mine && j < rank);
    }
    __syncwarp();
    if (there) logp[i - rank + place] = mine, ranks[i - rank + place] = rank;
  }
}

// A node, and the child it offers next; in the registers of one lane.
struct Node {
  float cost = 0.f;  // of the path to it
  int parent = 0, depth = 0, rank = 0;
  int next = 0, end = 0;  // its row of the lattice, from the child on offer
  unsigned offer = kNothing;  // bits of that child's cost
  int offer_rank = 0;

  __device__ void set_offer(const float* logp, const uint8_t* ranks) {
    offer = kNothing;
    if (next < end) offer = __float_as_uint(cost - logp[next]), offer_rank = ranks[next];
  }
};

template <int kSlots>  // nodes a lane holds
__global__ void grow_kernel(const int64_t* tokens, const float* logp, const int64_t* bonus_tokens, int64_t* out_tokens,
                            int64_t* out_parents, int64_t* out_depths, float* out_logp, bool* out_mask, int d, int kp,
                            int k, int n) {
  DFLASH_DYNAMIC_SHARED(memory);
  const int count = d * kp * k;
  float* lattice = reinterpret_cast<float*>(memory);             // [d, kp, k]
  uint8_t* ranks = reinterpret_cast<uint8_t*>(lattice + count);  // [d, kp, k]
  __shared__ int depth[kSlots * kWarp], rank[kSlots * kWarp];
  __shared__ unsigned above[kSlots * kWarp][kSlots];  // bit j of row i: node i sees node j

  const int request = blockIdx.x, lane = threadIdx.x % kWarp, w = n + 1;
  const int64_t first = static_cast<int64_t>(request) * w;
  for (int i = threadIdx.x; i < count; i += kGrowThreads) lattice[i] = logp[static_cast<int64_t>(request) * count + i];
  __syncthreads();
  sort_rows(lattice, ranks, count, k);
  __syncthreads();

  if (threadIdx.x < kWarp) {
    Node nodes[kSlots];
    auto open = [&](int node, float cost, int parent, int level, int taken) {
      const unsigned itself = node / kWarp == lane ? 1u << node % kWarp : 0u;
      if (lane < kSlots) above[node][lane] = (node ? above[parent][lane] : 0u) | itself;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (node != s * kWarp + lane) continue;
        const int row = (level * kp + (kp > 1 ? taken : 0)) * k;  // of its children
        nodes[s] = {cost, parent, level, taken, row, level < d ? row + k : row};
        nodes[s].set_offer(lattice, ranks);
      }
    };
    open(0, 0.f, 0, 0, 0);
    for (int node = 1; node < w; ++node) {
      unsigned best = kNothing;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) best = min(best, nodes[s].offer);
      best = __reduce_min_sync(kAll, best);
      // Of equal offers the shallower wins, then the lower parent.
      unsigned code = kNothing;
      int taken = 0;
#pragma unroll
      for (int s = kSlots - 1; s >= 0; --s) {
        const unsigned own = nodes[s].depth << 16 | (s * kWarp + lane);
        if (nodes[s].offer == best && own < code) code = own, taken = nodes[s].offer_rank;
      }
      code = __reduce_min_sync(kAll, code);
      const int parent = code & 0xffff;
      taken = __shfl_sync(kAll, taken, parent % kWarp);
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
        if (parent == s * kWarp + lane) ++nodes[s].next, nodes[s].set_offer(lattice, ranks);
      open(node, __uint_as_float(best), parent, (code >> 16) + 1, taken);
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int node = s * kWarp + lane;
      depth[node] = nodes[s].depth, rank[node] = nodes[s].rank;
      if (node < w) out_parents[first + node] = nodes[s].parent, out_logp[first + node] = 0.f - nodes[s].cost;
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < w; i += kGrowThreads) {
    out_tokens[first + i] = i == 0 ? bonus_tokens[request] : tokens[(request * d + depth[i] - 1) * k + rank[i]];
    out_depths[first + i] = depth[i];
  }
  bool* mask = out_mask + first * w;
  for (int i = threadIdx.x / kWarp; i < w; i += kGrowThreads / kWarp)
    for (int j = lane; j < w; j += kWarp) mask[i * w + j] = above[i][j / kWarp] >> lane & 1u;
}

void grow(TensorView tokens, TensorView logp, TensorView bonus_tokens, TensorView out_tokens, TensorView out_parents,
          TensorView out_depths, TensorView out_logp, TensorView out_mask) {
  const int64_t bs = tokens.size(0), d = tokens.size(1), k = tokens.size(2), kp = logp.size(2), w = out_tokens.size(1);
  TVM_FFI_ICHECK(k <= kWarp) << "grow takes " << kWarp << " candidates a position at most, got " << k;
  TVM_FFI_ICHECK(kp == 1 || kp == k) << "logp has " << kp << " predecessors";
  const auto kernel = w <= 32    ? grow_kernel<1>
                      : w <= 64  ? grow_kernel<2>
                      : w <= 128 ? grow_kernel<4>
                                 : grow_kernel<8>;
  TVM_FFI_ICHECK(w <= 256) << "grow takes 255 nodes at most, got " << w - 1;
  launch(kernel, dim3(bs), kGrowThreads, d * kp * k * (sizeof(float) + 1), stream_of(tokens),
         data<int64_t>(tokens, "tokens", {bs, d, k}), data<float>(logp, "logp", {bs, d, kp, k}),
         data<int64_t>(bonus_tokens, "bonus_tokens", {bs}), data<int64_t>(out_tokens, "out_tokens", {bs, w}),
         data<int64_t>(out_parents, "out_parents", {bs, w}), data<int64_t>(out_depths, "out_depths", {bs, w}),
         data<float>(out_logp, "out_logp", {bs, w}), data<bool>(out_mask, "out_mask", {bs, w, w}), d, kp, k, w - 1);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grow, dflash::grow);
