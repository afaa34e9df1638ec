// Where a thread is, how threads meet, and how a kernel is launched: what kernels ask of CUDA's own
// language, by names that an emulation on the CPU can give another meaning. It never computes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "base/error.h"

namespace camelid::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int block_index() { return static_cast<int>(blockIdx.x); }
__device__ inline int block_size() { return static_cast<int>(blockDim.x); }
__device__ inline int grid_size() { return static_cast<int>(gridDim.x); }

// The block's dynamic shared memory, aligned to 1024 bytes (what swizzled tiles need).
__device__ inline std::byte* shared_memory() {
  extern __shared__ __align__(1024) std::byte camelid_shared[];
  return camelid_shared;
}

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

template <typename T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(kWholeWarp, value, lane);
}
template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kWholeWarp, value, mask);
}

// Whether it is true in any lane of the warp.
__device__ inline bool any_of_warp(bool value) { return __any_sync(kWholeWarp, value) != 0; }

// Throws where a CUDA call failed; `what` names it: "[cuda] matmul: out of memory".
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call starts clean
  const ErrorCode code =
      status == cudaErrorMemoryAllocation ? ErrorCode::kCapacity : ErrorCode::kInternal;
  fail(code, "[cuda] " + std::string(what) + ": " + cudaGetErrorString(status) + ".");
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

// 90 for Hopper.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  return 10 * major + minor;
}

// The most bytes of shared memory that a block may ask for.
inline std::size_t shared_memory_limit() {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
  return static_cast<std::size_t>(limit);
}

// How many blocks of a kernel one multiprocessor runs at once; 0 where not even one fits.
template <typename... Parameters>
int blocks_that_fit(void (*kernel)(Parameters...), int threads, std::size_t shared_bytes) {
  if (shared_bytes > shared_memory_limit()) return 0;
  int count = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared_bytes),
        "occupancy");
  return count;
}

// Whether kernels may start before the one before has ended: from Hopper on. Asked once, since it is
// asked for every launch, and one process has GPUs of one kind.
inline bool can_overlap() {
  constexpr int kHopper = 90;
  static const bool can = compute_capability() >= kHopper;
  return can;
}

struct Launch {
  int blocks = 1;
  int threads = kWarp;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool together = false;  // all blocks run at once, so that they may wait for one another
  // May start while the kernel before it ends, from Hopper on: it calls wait_for_previous_kernel()
  // before it touches anything that kernel writes or reads.
  bool overlaps = false;
};

// Launches kernel(args...) and throws where the launch itself fails; nothing is waited for.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Launch& how,
            Arguments&&... arguments) {
  if (how.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(how.shared_bytes)),
          what);
  }
  cudaLaunchAttribute attribute{};
  if (how.together) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = how.together || (how.overlaps && can_overlap()) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

}  // namespace camelid::cuda
