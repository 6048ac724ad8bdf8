// The n most probable paths of each request's lattice, best first. One block a request: all of it sorts the lattice's
// rows, its first warp pops.
//
// Every node of the tree so far offers its best child that is not in the tree; the best offer is the next node. A child
// is never more probable than its parent or than the sibling offered before it, so the nodes come out in the total
// order that `kernels.tree.grow` states. With sorted rows a node's next offer is the next of its row. All lanes do the
// same in a pop, whether it concerns their nodes or not: a branch would wait for shared memory once a side.
#include "common.cuh"

namespace dflash {
namespace {

constexpr int kGrowThreads = 512;
constexpr unsigned kNothing = 0xffffffffu;  // above every cost: non-negative floats order as their bits do

// Each row of k, highest first, equal ones as they stood; `ranks` says where each stood. A warp sorts as many whole rows
// at once as it has lanes for, by counting.
__device__ void sort_rows(const float* __restrict__ logp, float* sorted, uint8_t* ranks, int count, int k) {
  const int lane = threadIdx.x % kWarp, at_once = kWarp / k * k, rank = lane % k;
#pragma unroll 4
  for (int base = threadIdx.x / kWarp * at_once; base < count; base += kGrowThreads / kWarp * at_once) {
    const int i = base + lane;
    const bool there = lane < at_once && i < count;
    const float mine = there ? logp[i] : 0.f;
    int place = 0;
#pragma unroll 8
    for (int j = 0; j < k; ++j) {
      const float other = __shfl_sync(kAll, mine, min(lane - rank + j, kWarp - 1));
      place += other > mine || (other == mine && j < rank);
    }
    if (there) sorted[i - rank + place] = mine, ranks[i - rank + place] = rank;
  }
}

// A node, and the child it offers next; in the registers of one lane.
struct Node {
  float cost = 0.f;  // of the path to it
  int parent = 0, depth = 0, rank = 0;
  int next = 0, end = 0;      // its row of the lattice, from the child on offer
  unsigned offer = kNothing;  // bits of that child's cost
  int offer_rank = 0;
};

template <int kSlots>  // nodes a lane holds
__global__ void grow_kernel(const int64_t* tokens, const float* logp, const int64_t* bonus_tokens, int64_t* out_tokens,
                            int64_t* out_parents, int64_t* out_depths, float* out_logp, bool* out_mask, int d, int kp,
                            int k, int n) {
  DFLASH_DYNAMIC_SHARED(memory);
  const int count = d * kp * k;
  float* sorted = reinterpret_cast<float*>(memory);             // [d, kp, k]
  uint8_t* ranks = reinterpret_cast<uint8_t*>(sorted + count);  // [d, kp, k]
  __shared__ int parents[kSlots * kWarp], depths[kSlots * kWarp], taken_ranks[kSlots * kWarp];
  __shared__ unsigned above[kSlots * kWarp][kSlots];  // bit j of row i: node i sees node j

  const int request = blockIdx.x, lane = threadIdx.x % kWarp, w = n + 1;
  const int64_t first = static_cast<int64_t>(request) * w;
  sort_rows(logp + static_cast<int64_t>(request) * count, sorted, ranks, count, k);
  __syncthreads();

  if (threadIdx.x < kWarp) {
    Node nodes[kSlots];
    auto set_offer = [&](Node& node) {
      const int next = min(node.next, count - 1);
      const float cost = node.cost - sorted[next];
      node.offer_rank = ranks[next];
      node.offer = node.next < node.end ? __float_as_uint(cost) : kNothing;
    };
    if (lane == 0) nodes[0].end = k;  // the root's children are the first row
    set_offer(nodes[0]);
    for (int node = 1; node < w; ++node) {
      unsigned best = kNothing;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) best = min(best, nodes[s].offer);
      best = warp_min(best);
      // Of equal offers the shallower wins, then the lower parent.
      unsigned code = kNothing;
      int rank = 0;
#pragma unroll
      for (int s = kSlots - 1; s >= 0; --s) {
        const unsigned own = nodes[s].depth << 8 | (s * kWarp + lane);
        const bool better = nodes[s].offer == best && own < code;
        code = better ? own : code, rank = better ? nodes[s].offer_rank : rank;
      }
      unsigned who = __ballot_sync(kAll, code != kNothing);
      if (who & (who - 1)) who = __ballot_sync(kAll, code == warp_min(code));
      const unsigned won = __shfl_sync(kAll, code << 8 | rank, __ffs(who) - 1);
      const int parent = won >> 8 & 0xff, level = (won >> 16) + 1, taken = won & 0xff;
      const int row = (level * kp + (kp > 1 ? taken : 0)) * k;  // of its children
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const bool opens = node == s * kWarp + lane, gave = parent == s * kWarp + lane;
        Node& own = nodes[s];
        own.cost = opens ? __uint_as_float(best) : own.cost;
        own.parent = opens ? parent : own.parent;
        own.depth = opens ? level : own.depth;
        own.rank = opens ? taken : own.rank;
        own.next = opens ? row : own.next + gave;
        own.end = opens ? (level < d ? row + k : row) : own.end;
        set_offer(own);
      }
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int node = s * kWarp + lane;
      parents[node] = nodes[s].parent, depths[node] = nodes[s].depth, taken_ranks[node] = nodes[s].rank;
      if (node < w) out_logp[first + node] = 0.f - nodes[s].cost;
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < w; i += kGrowThreads) {
    out_parents[first + i] = parents[i];
    out_depths[first + i] = depths[i];
    out_tokens[first + i] = i == 0 ? bonus_tokens[request] : tokens[(request * d + depths[i] - 1) * k + taken_ranks[i]];
    unsigned seen[kSlots] = {1u};  // the root
    for (int node = i; node > 0; node = parents[node])
#pragma unroll
      for (int s = 0; s < kSlots; ++s) seen[s] |= node / kWarp == s ? 1u << node % kWarp : 0u;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) above[i][s] = seen[s];
  }
  __syncthreads();
  bool* mask = out_mask + first * w;
  for (int i = threadIdx.x / kWarp; i < w; i += kGrowThreads / kWarp)
    for (int j = lane; j < w; j += kWarp) mask[i * w + j] = above[i][j / kWarp] >> lane & 1u;
}

void grow(TensorView tokens, TensorView logp, TensorView bonus_tokens, TensorView out_tokens, TensorView out_parents,
          TensorView out_depths, TensorView out_logp, TensorView out_mask) {
  const int64_t bs = tokens.size(0), d = tokens.size(1), k = tokens.size(2), kp = logp.size(2), w = out_tokens.size(1);
  TVM_FFI_ICHECK(k <= kWarp) << "grow takes " << kWarp << " candidates a position at most, got " << k;
  TVM_FFI_ICHECK(kp == 1 || kp == k) << "logp has " << kp << " predecessors";
  const auto kernel = w <= 32 ? grow_kernel<1> : w <= 64 ? grow_kernel<2> : w <= 128 ? grow_kernel<4> : grow_kernel<8>;
  TVM_FFI_ICHECK(d < 256) << "grow goes 255 deep at most, got " << d;
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
