// The n most probable paths of each request's lattice, best first. One block a request; its first warp pops.
//
// Every node of the tree so far offers its best child that is not in the tree; the best offer is the next node. A child
// is never more probable than its parent or than the sibling offered before it, so the nodes come out in the total
// order that `kernels.tree.grow` states: path log-probability, then depth, parent, rank.
#include "common.cuh"

namespace dflash {
namespace {

constexpr unsigned kNothing = 0xffffffffu;  // above every cost: non-negative floats order as their bits do

struct Offer {
  unsigned cost;  // bits of the child's path cost
  int rank;
};

// The best child of a node after (cost, rank) in the order of (cost, rank). Lane r of the warp holds candidate r's.
__device__ Offer next_child(float parent_cost, const float* logp, int k, unsigned after_cost, int after_rank, int lane) {
  unsigned cost = kNothing;
  if (lane < k) {
    cost = __float_as_uint(parent_cost - logp[lane]);
    if (cost < after_cost || (cost == after_cost && lane <= after_rank)) cost = kNothing;
  }
  const unsigned best = __reduce_min_sync(kAll, cost);
  const unsigned owners = __ballot_sync(kAll, cost == best);
  return {best, __ffs(owners) - 1};
}

template <int kSlots>  // nodes a lane holds the offer of
__global__ void grow_kernel(const int64_t* tokens, const float* logp, const int64_t* bonus_tokens, int64_t* out_tokens,
                            int64_t* out_parents, int64_t* out_depths, float* out_logp, bool* out_mask, int d, int kp,
                            int k, int n) {
  constexpr int kNodes = kSlots * kWarp;
  DFLASH_DYNAMIC_SHARED(memory);
  float* lattice = reinterpret_cast<float*>(memory);  // [d, kp, k]
  __shared__ float cost[kNodes];
  __shared__ int parent[kNodes], depth[kNodes], rank[kNodes];
  __shared__ unsigned above[kNodes][kSlots];  // bit j of row i: node i sees node j

  const int request = blockIdx.x, lane = threadIdx.x % kWarp, w = n + 1;
  for (int i = threadIdx.x; i < d * kp * k; i += blockDim.x) lattice[i] = logp[request * d * kp * k + i];
  __syncthreads();

  if (threadIdx.x < kWarp) {
    unsigned offer_cost[kSlots];
    int offer_rank[kSlots];
    for (int s = 0; s < kSlots; ++s) offer_cost[s] = kNothing, offer_rank[s] = 0;
    if (lane == 0) cost[0] = 0.f, parent[0] = depth[0] = rank[0] = 0;
    if (lane < kSlots) above[0][lane] = lane == 0;
    __syncwarp();
    // A candidate's row in the lattice: its depth, and its parent's rank where that matters.
    auto children = [&](int node) { return lattice + (depth[node] * kp + (kp > 1 ? rank[node] : 0)) * k; };
    auto hold = [&](int node, Offer offer) {
      for (int s = 0; s < kSlots; ++s)
        if (node == s * kWarp + lane) offer_cost[s] = offer.cost, offer_rank[s] = offer.rank;
    };
    hold(0, next_child(0.f, children(0), k, 0u, -1, lane));

    for (int node = 1; node < w; ++node) {
      unsigned best = kNothing;
      for (int s = 0; s < kSlots; ++s) best = min(best, offer_cost[s]);
      best = __reduce_min_sync(kAll, best);
      // Of equal offers the shallower wins, then the lower parent.
      unsigned code = kNothing;
      for (int s = 0; s < kSlots; ++s) {
        const int from = s * kWarp + lane;
        if (offer_cost[s] == best && from < node) code = min(code, static_cast<unsigned>(depth[from] << 16 | from));
      }
      code = __reduce_min_sync(kAll, code);
      const int from = code & 0xffff;
      int mine = 0;
      for (int s = 0; s < kSlots; ++s)
        if (from / kWarp == s) mine = offer_rank[s];
      const int taken = __shfl_sync(kAll, mine, from % kWarp);
      if (lane == 0) {
        cost[node] = __uint_as_float(best);
        parent[node] = from;
        depth[node] = depth[from] + 1;
        rank[node] = taken;
      }
      if (lane < kSlots) above[node][lane] = above[from][lane] | (node / kWarp == lane ? 1u << node % kWarp : 0u);
      __syncwarp();
      hold(from, next_child(cost[from], children(from), k, best, taken, lane));
      hold(node, depth[node] < d ? next_child(cost[node], children(node), k, 0u, -1, lane) : Offer{kNothing, 0});
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < w; i += blockDim.x) {
    const int64_t row = static_cast<int64_t>(request) * w + i;
    out_tokens[row] = i == 0 ? bonus_tokens[request] : tokens[(request * d + depth[i] - 1) * k + rank[i]];
    out_parents[row] = parent[i];
    out_depths[row] = depth[i];
    out_logp[row] = 0.f - cost[i];
  }
  bool* mask = out_mask + static_cast<int64_t>(request) * w * w;
  for (int i = threadIdx.x; i < w * w; i += blockDim.x) {
    const int j = i % w;
    mask[i] = above[i / w][j / kWarp] >> j % kWarp & 1u;
  }
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
  launch(kernel, dim3(bs), 128, d * kp * k * sizeof(float), stream_of(tokens),
         data<int64_t>(tokens, "tokens", {bs, d, k}), data<float>(logp, "logp", {bs, d, kp, k}),
         data<int64_t>(bonus_tokens, "bonus_tokens", {bs}), data<int64_t>(out_tokens, "out_tokens", {bs, w}),
         data<int64_t>(out_parents, "out_parents", {bs, w}), data<int64_t>(out_depths, "out_depths", {bs, w}),
         data<float>(out_logp, "out_logp", {bs, w}), data<bool>(out_mask, "out_mask", {bs, w, w}), d, kp, k, w - 1);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grow, dflash::grow);
