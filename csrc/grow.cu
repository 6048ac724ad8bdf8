// The n most probable paths of each request's lattice, best first. One block a request: all of it sorts the lattice's
// rows, its first warp pops.
//
// Every node of the tree so far offers its best child that is not in the tree; the best offer is the next node. A child
// is never more probable than its parent or than the sibling offered before it, so the nodes come out in the total
// order that `kernels.tree.grow` states. With sorted rows a node's next offer is the next of its row.
//
// Pops follow one another, so their latency is what this takes: two reductions over the warp and a shuffle. What a pop
// puts on offer, the sibling behind and the first child below, was read when its own node was put there.
#include "common.cuh"

namespace dflash {
namespace {

constexpr int kGrowThreads = 512;
constexpr unsigned kNothing = 0xffffffffu;  // above every cost: non-negative floats order as their bits do

// A request's lattice in shared memory, each row highest first, equal ones as they stood; `ranks` says where each stood.
struct Lattice {
  float* logp;     // [d, kp, k]
  uint8_t* ranks;  // [d, kp, k]
  int d, kp, k;

  __device__ int count() const { return d * kp * k; }

  // Where the children of a node begin, given its depth, less than d, and where in its own row it stood.
  __device__ int row(int depth, int rank) const { return (depth * kp + (kp > 1 ? rank : 0)) * k; }

  // A warp sorts as many whole rows at once as it has lanes for, by counting.
  __device__ void sort() const {
    const int lane = threadIdx.x % kWarp, at_once = kWarp / k * k, rank = lane % k, total = count();
    for (int base = threadIdx.x / kWarp * at_once; base < total; base += kGrowThreads / kWarp * at_once) {
      const int i = base + lane;
      const bool there = lane < at_once && i < total;
      const float mine = there ? logp[i] : 0.f;
      int place = 0;
#pragma unroll 8
      for (int j = 0; j < k; ++j) {
        const float other = __shfl_sync(kAll, mine, (lane - rank + j) % kWarp);
        place += other > mine || (other == mine && j < rank);
      }
      if (there) logp[i - rank + place] = mine, ranks[i - rank + place] = rank;
    }
  }
};

// A child on offer: bits of the cost of the path to it, and where in its row it stood.
struct Offer {
  unsigned cost = kNothing;
  int rank = 0;
};

// A node of the tree, in the registers of one lane.
struct Node {
  Offer offer, behind, below;  // its best child not in the tree, the one behind that, and the first child of that
  float cost = 0.f;            // of the path to it
  int depth = 0, next = 0, end = 0;  // what is left of its row from `behind` on

  __device__ void read(const Lattice& lattice) {
    const bool more = next < end, deeper = offer.cost != kNothing && depth + 1 < lattice.d;
    const int i = more ? next : 0, j = deeper ? lattice.row(depth + 1, offer.rank) : 0;
    behind = {more ? __float_as_uint(cost - lattice.logp[i]) : kNothing, lattice.ranks[i]};
    below = {deeper ? __float_as_uint(__uint_as_float(offer.cost) - lattice.logp[j]) : kNothing, lattice.ranks[j]};
  }
};

struct alignas(16) Popped {
  float cost;
  int parent, depth, rank;
};

// The warp's first n + 1 nodes, the root first, into `popped`.
template <int kSlots>  // nodes a lane holds
__device__ void pop(const Lattice& lattice, Popped* popped, int n) {
  const int lane = threadIdx.x % kWarp;
  Node nodes[kSlots];
  if (lane == 0) {
    nodes[0].offer = {__float_as_uint(0.f - lattice.logp[0]), lattice.ranks[0]};
    nodes[0].next = 1, nodes[0].end = lattice.k;
    nodes[0].read(lattice);
    popped[0] = {0.f, 0, 0, 0};
  }
  for (int node = 1; node <= n; ++node) {
    unsigned best = kNothing;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) best = min(best, nodes[s].offer.cost);
    best = __reduce_min_sync(kAll, best);
    // Of equal offers the shallower wins, then the lower parent.
    unsigned code = kNothing;
    Offer below;
    int ranks = 0;
#pragma unroll
    for (int s = kSlots - 1; s >= 0; --s) {
      const unsigned own = nodes[s].depth << 16 | (s * kWarp + lane);
      if (nodes[s].offer.cost != best || own > code) continue;
      code = own, below = nodes[s].below, ranks = nodes[s].offer.rank << 8 | below.rank;
    }
    code = __reduce_min_sync(kAll, code);
    const int parent = code & 0xffff, depth = (code >> 16) + 1;
    below.cost = __shfl_sync(kAll, below.cost, parent % kWarp);
    ranks = __shfl_sync(kAll, ranks, parent % kWarp);
    const int rank = ranks >> 8;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const bool popping = parent == s * kWarp + lane, opened = node == s * kWarp + lane;
      if (!popping && !opened) continue;
      if (popping) {
        nodes[s].offer = nodes[s].behind;
        ++nodes[s].next;
      } else {
        const int first = lattice.row(depth, rank);
        nodes[s].offer = {below.cost, ranks & 0xff};
        nodes[s].cost = __uint_as_float(best), nodes[s].depth = depth;
        nodes[s].next = first + 1, nodes[s].end = depth < lattice.d ? first + lattice.k : 0;
      }
      nodes[s].read(lattice);
    }
    if (lane == 0) popped[node] = {__uint_as_float(best), parent, depth, rank};
  }
}

template <int kSlots>
__global__ void grow_kernel(const int64_t* tokens, const float* logp, const int64_t* bonus_tokens, int64_t* out_tokens,
                            int64_t* out_parents, int64_t* out_depths, float* out_logp, bool* out_mask, int d, int kp,
                            int k, int n) {
  DFLASH_DYNAMIC_SHARED(memory);
  const int count = d * kp * k;
  float* sorted = reinterpret_cast<float*>(memory);
  const Lattice lattice{sorted, reinterpret_cast<uint8_t*>(sorted + count), d, kp, k};
  __shared__ Popped popped[kSlots * kWarp];
  __shared__ unsigned above[kSlots * kWarp][kSlots];  // bit j of row i: node i sees node j

  const int request = blockIdx.x, lane = threadIdx.x % kWarp, w = n + 1;
  const int64_t first = static_cast<int64_t>(request) * w;
  for (int i = threadIdx.x; i < count; i += kGrowThreads) sorted[i] = logp[static_cast<int64_t>(request) * count + i];
  __syncthreads();
  lattice.sort();
  __syncthreads();
  if (threadIdx.x < kWarp) pop<kSlots>(lattice, popped, n);
  __syncthreads();

  for (int i = threadIdx.x; i < w; i += kGrowThreads) {
    const Popped node = popped[i];
    out_tokens[first + i] = i == 0 ? bonus_tokens[request] : tokens[(request * d + node.depth - 1) * k + node.rank];
    out_parents[first + i] = node.parent;
    out_depths[first + i] = node.depth;
    out_logp[first + i] = 0.f - node.cost;
    unsigned seen[kSlots] = {};
    for (int j = i;; j = popped[j].parent) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) seen[s] |= j / kWarp == s ? 1u << j % kWarp : 0u;
      if (j == 0) break;
    }
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
