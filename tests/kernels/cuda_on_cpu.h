// Runs the CUDA sources on a CPU, so that a machine without a GPU checks what they mean: one fiber a thread, blocks one
// after another. It knows what the sources use of CUDA and no more; timing and memory order it does not show.
#pragma once
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define DFLASH_ON_CPU
#undef __global__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define DFLASH_DYNAMIC_SHARED(name) unsigned char* name = on_cpu::dynamic_shared.data()

namespace on_cpu {

struct Barrier {
  int members = 0, arrived = 0, round = 0;
  void check() {
    if (arrived == members) arrived = 0, ++round;
  }
};

struct Warp : Barrier { uint64_t value[32]; };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  bool done = false;
};

inline std::vector<unsigned char> dynamic_shared;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline int block_votes = 0;
inline ucontext_t scheduler;
inline Fiber* current;
inline std::function<void()> body;

inline Warp& warp() { return warps[current->index.x / 32]; }
inline int lane() { return current->index.x % 32; }

inline void wait(Barrier& barrier) {
  const int round = barrier.round;
  ++barrier.arrived;
  barrier.check();
  while (barrier.round == round) swapcontext(&current->context, &scheduler);
}

inline void run_fiber() {
  body();
  current->done = true;
  --block.members, block.check();
  --warp().members, warp().check();
}

inline void run_block(int threads) {
  fibers = std::vector<Fiber>(threads);
  warps.assign((threads + 31) / 32, {});
  block = {};
  block.members = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {static_cast<unsigned>(i), 0, 0};
    ++warps[i / 32].members;
    fiber.stack = std::make_unique<char[]>(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, 1 << 16};
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      alive = true;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
    }
  }
}

// Every lane's value, seen by all lanes of the warp.
template <typename T>
void exchange(T mine, T (&all)[32]) {
  std::memcpy(&warp().value[lane()], &mine, sizeof(T));
  wait(warp());
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], &warp().value[i], sizeof(T));
  wait(warp());
}

}  // namespace on_cpu

inline dim3 gridDim, blockDim;
inline uint3 blockIdx;
#define threadIdx (on_cpu::current->index)

inline void __syncthreads() { on_cpu::wait(on_cpu::block); }
inline void __syncwarp() { on_cpu::wait(on_cpu::warp()); }
inline int __syncthreads_or(int vote) {
  on_cpu::block_votes += vote != 0;
  __syncthreads();
  const int any = on_cpu::block_votes > 0;
  __syncthreads();
  on_cpu::block_votes = 0;
  __syncthreads();
  return any;
}
template <typename T>
T __shfl_sync(unsigned, T mine, int from) {
  T all[32];
  on_cpu::exchange(mine, all);
  return all[from];
}
template <typename T>
T __shfl_xor_sync(unsigned, T mine, int step) {
  T all[32];
  on_cpu::exchange(mine, all);
  return all[on_cpu::lane() ^ step];
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  bool all[32];
  on_cpu::exchange(mine, all);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(all[i]) << i;
  return votes;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int atomicAdd(int* to, int more) {
  const int before = *to;
  *to += more;
  return before;
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace dflash {

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t, Args... args) {
  gridDim = grid, blockDim = dim3(threads);
  // What a kernel does not write is not zero on a GPU either.
  on_cpu::dynamic_shared.assign(shared, 0xa5);
  on_cpu::body = [=] { kernel(static_cast<Params>(args)...); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) on_cpu::run_block(threads);
}

}  // namespace dflash
