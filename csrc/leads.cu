// Leads in a lattice: `place_leads` puts them among the candidates, a thread a candidate; `follow_leads` says what comes
// behind what, a warp a predecessor, its lanes the candidates.
#include "common.cuh"

namespace dflash {
namespace {

// A trie of m places a request, [bs, m]; before: -1 of a first one. The last candidate of k is the first lead.
struct Leads {
  const int64_t *tokens, *before;
  int m;

  __device__ int64_t token(int request, int lead) const {
    return lead >= 0 && lead < m ? tokens[request * m + lead] : -1;
  }
};

// As torch has it: a NaN is the highest.
__device__ inline float highest(float a, float b) { return a != a || !(b != b || b > a) ? a : b; }

__global__ void place_kernel(const float* unary, const int64_t* tokens, Leads leads, float* out_unary,
                             int64_t* out_tokens, int d, int k, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int first = i / k * k, last = first + k - 1;
  const int64_t lead = leads.token(i / (d * k), last - i);
  out_tokens[i] = lead >= 0 ? lead : tokens[i];
  float score = unary[i];
  if (lead >= 0) {
    score = unary[last];
    for (int c = first; c < last; ++c) score = highest(score, tokens[c] == lead ? unary[c] : unary[last]);
  }
  out_unary[i] = score;
}

// What makes a row a distribution over the leads that enter it.
struct Odds { float least, sure, unsure; };

__global__ void follow_kernel(const float* logp, const int64_t* tokens, Leads leads, const int64_t* sure, Odds odds,
                              float* out, int d, int kp, int k, int rows) {
  const int row = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  const int p = row % k, position = row / k, depth = position % d, request = position / d;
  const int c = min(lane, k - 1), mine = k - 1 - c;  // a place among the candidates, and among the leads
  const bool is_lead = leads.token(request, mine) >= 0, behind_lead = leads.token(request, k - 1 - p) >= 0;
  const int64_t before = is_lead ? leads.before[request * leads.m + mine] : -1;
  const bool follows = is_lead && behind_lead && before == k - 1 - p;
  const bool enters = is_lead && lane < k && (before < 0 ? depth == 0 || !behind_lead : depth > 0 && follows);

  const int64_t token = tokens[position * k + c];
  bool never = is_lead && !enters;
  for (unsigned left = __ballot_sync(kAll, enters); left != 0; left &= left - 1) {
    const int64_t other = __shfl_sync(kAll, token, __ffs(left) - 1);
    never |= !is_lead && token == other;
  }
  const float given = logp[(static_cast<int64_t>(position) * kp + (kp > 1 ? p : 0)) * k + c];
  float mine_logp = never ? -INFINITY : fmaxf(given, odds.least);
  if (depth == 0 ? sure[request] != 0 : __ballot_sync(kAll, follows) != 0) {
    const float max = warp_max(enters ? mine_logp : -INFINITY);
    const float sum = warp_sum(enters ? expf(mine_logp - max) : 0.f);
    mine_logp = enters ? mine_logp - max - logf(sum) + odds.sure : mine_logp + odds.unsure;
  }
  if (lane < k) out[static_cast<int64_t>(row) * k + lane] = mine_logp;
}

Leads leads_of(TensorView tokens, TensorView before, int64_t bs, int64_t k) {
  const int64_t m = tokens.size(1);
  TVM_FFI_ICHECK(m < k && k <= kWarp) << "leads take fewer places than there are candidates, of which " << kWarp
                                      << " at most: got " << m << " of " << k;
  return {data<int64_t>(tokens, "leads' tokens", {bs, m}), data<int64_t>(before, "leads' before", {bs, m}),
          static_cast<int>(m)};
}

void place_leads(TensorView unary, TensorView tokens, TensorView lead_tokens, TensorView before, TensorView out_unary,
                 TensorView out_tokens) {
  const int64_t bs = unary.size(0), d = unary.size(1), k = unary.size(2), count = bs * d * k;
  launch(place_kernel, dim3((count + 255) / 256), 256, 0, stream_of(unary), data<float>(unary, "unary", {bs, d, k}),
         data<int64_t>(tokens, "tokens", {bs, d, k}), leads_of(lead_tokens, before, bs, k),
         data<float>(out_unary, "out_unary", {bs, d, k}), data<int64_t>(out_tokens, "out_tokens", {bs, d, k}), d, k,
         count);
}

void follow_leads(TensorView logp, TensorView tokens, TensorView lead_tokens, TensorView before, TensorView sure,
                  double least_logp, double sure_logp, double unsure_logp, TensorView out) {
  const int64_t bs = tokens.size(0), d = tokens.size(1), k = tokens.size(2), kp = logp.size(2), rows = bs * d * k;
  TVM_FFI_ICHECK(kp == 1 || kp == k) << "logp has " << kp << " predecessors";
  const Odds odds{static_cast<float>(least_logp), static_cast<float>(sure_logp), static_cast<float>(unsure_logp)};
  launch(follow_kernel, dim3((rows + kWarpsPerBlock - 1) / kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, stream_of(logp),
         data<float>(logp, "logp", {bs, d, kp, k}), data<int64_t>(tokens, "tokens", {bs, d, k}),
         leads_of(lead_tokens, before, bs, k), data<int64_t>(sure, "sure", {bs}), odds,
         data<float>(out, "out", {bs, d, k, k}), d, kp, k, rows);
}

}  // namespace
}  // namespace dflash

TVM_FFI_DLL_EXPORT_TYPED_FUNC(place_leads, dflash::place_leads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(follow_leads, dflash::follow_leads);
