// Gumbel noise from a hash of seed, position and token: kernels/sampling.py says what it means.
#pragma once
#include "common.cuh"

namespace dflash {

__device__ inline uint32_t rotated(uint32_t word, int by) { return word << by | word >> (32 - by); }

__device__ inline uint32_t mixed(uint32_t state, uint32_t word) {
  state ^= rotated(word * 0xcc9e2d51u, 15) * 0x1b873593u;
  return rotated(state, 13) * 5u + 0xe6546b64u;
}

// What all tokens of a row share of the hash.
__device__ inline uint32_t row_state(int64_t seed, int64_t position) {
  const auto words = static_cast<uint64_t>(seed);
  const uint32_t state = mixed(mixed(0, static_cast<uint32_t>(words)), static_cast<uint32_t>(words >> 32));
  return mixed(state, static_cast<uint32_t>(position));
}

// 1 - u of a token's uniform u, in units of 2^-32.
__device__ inline float whole_rest_of(uint32_t state, int token) {
  uint32_t h = mixed(state, static_cast<uint32_t>(token)) ^ 16u;
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * -0xc2b2ae35u - 1u;  // ~x is -x - 1
  return static_cast<float>(h ^ h >> 16 ^ 0xffffu);  // the complement of the hash
}

// 1 - u in (0, 1): exact where u is near 1 and the noise is high.
__device__ inline float rest_of(uint32_t state, int token) {
  const float rest = whole_rest_of(state, token) * (1.f / 4294967295.f);
  return fminf(fmaxf(rest, 1.f / 4294967296.f), 1.f - 1.f / 16777216.f);
}

__device__ inline float gumbel(float rest) { return -logf(-log1pf(-rest)); }

constexpr float kRough = 1e-3f;  // more than rough_gumbel errs by

// The same in fast intrinsics, the same bits wherever it is inlined. Where rest is small the logarithm's series says more
// than the logarithm.
__device__ inline float rough_gumbel(float rest) {
  return -__logf(rest < 1.f / 256.f ? __fmul_rn(rest, __fmaf_rn(0.5f, rest, 1.f)) : -__logf(1.f - rest));
}

// No less than the noise, and little more where it is high: noise is below -log(rest), and a float's bits are below its
// logarithm. In units of log(2) / 2^23, without what the exponent's bias and rest's unit add.
constexpr float kNoiseUnits = 1.44269504f * 8388608.f, kNoiseBias = (127.f + 32.f) * 8388608.f;
__device__ inline float most_gumbel(uint32_t state, int token) {
  return -static_cast<float>(__float_as_uint(whole_rest_of(state, token)));
}

}  // namespace dflash
