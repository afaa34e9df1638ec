// Where a thread is, how threads meet, and how a kernel is launched: what kernels ask of CUDA's own
// language, by names that an emulation on the CPU can give another meaning. It never computes.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
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
  cudaGetLastError();  // where it is not sticky, the next call starts clean
  const ErrorCode code =
      status == cudaErrorMemoryAllocation ? ErrorCode::kCapacity : ErrorCode::kInternal;
  fail(code, "[cuda] ", what, ": ", cudaGetErrorString(status), ".",
       cudaPeekAtLastError() == cudaSuccess
           ? ""
           : " From here on the GPU refuses all that this process asks: restart the process.");
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  return device;
}
// What the driver said, on each GPU of the process, to a question about a kernel, or about none
// (null). Asking may cost more than a launch; answers stay. Callers come from any thread.
class Answers {
 public:
  template <typename Ask>
  int get(const void* kernel, std::int64_t question, const Ask& ask) {
    const std::lock_guard lock(mutex_);
    const std::tuple key(current_device(), kernel, question);
    const auto found = answers_.find(key);
    return found != answers_.end() ? found->second : answers_[key] = ask();
  }

 private:
  std::mutex mutex_;
  std::map<std::tuple<int, const void*, std::int64_t>, int> answers_;
};

inline int device_attribute(cudaDeviceAttr attribute) {
  static Answers answers;
  return answers.get(nullptr, attribute, [=] {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, current_device()), "device");
    return value;
  });
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// 90 for Hopper.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// The most bytes of shared memory that a block may ask for.
inline std::size_t shared_memory_limit() {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Lets launches of a kernel ask for so much shared memory; up to 48 KB they may anyway.
template <typename... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), std::size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, std::size_t> allowed;
  const std::lock_guard lock(mutex);
  std::size_t& most = allowed[{current_device(), reinterpret_cast<const void*>(kernel)}];
  if (shared_bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "shared memory");
  most = shared_bytes;
}

// How many blocks of a kernel one multiprocessor runs at once; 0 where not even one fits.
template <typename... Parameters>
int blocks_that_fit(void (*kernel)(Parameters...), int threads, std::size_t shared_bytes) {
  if (shared_bytes > shared_memory_limit()) return 0;
  static Answers answers;
  const std::int64_t question = static_cast<std::int64_t>(shared_bytes) * 2048 + threads;
  return answers.get(reinterpret_cast<const void*>(kernel), question, [&] {
    int count = 0;
    allow_shared_memory(kernel, shared_bytes);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared_bytes),
          "occupancy");
    return count;
  });
}

// Whether kernels may start before the one before has ended: on Hopper, whose own code waits for
// that (others run code for sm_80, which does not know how), with drivers that can record it.
inline bool can_overlap() {
  static const bool recordable = [] {
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "driver");
    return driver >= 12030;
  }();
  return recordable && compute_capability() == 90;
}

struct Launch {
  int blocks = 1;
  int threads = kWarp;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool together = false;  // all blocks run at once, so that they may wait for one another
  // May start while the kernel before it ends, on Hopper: it calls wait_for_previous_kernel()
  // before it touches anything that kernel writes or reads. Both at once cannot lock up: whoever
  // comes after it starts when all its blocks run, and whoever came before waits for nobody.
  bool overlaps = false;
};

// Whether a driver takes both at once, which is written nowhere: launches and recordings find out.
inline std::atomic<bool> takes_both{true};
// True where launches asked for both; from here on they ask for `together` alone.
inline bool ask_less_of_launches() { return takes_both.exchange(false); }

// Launches kernel(args...) and throws where the launch itself fails; nothing is waited for.
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Launch& how,
            Arguments&&... arguments) {
  allow_shared_memory(kernel, how.shared_bytes);
  cudaLaunchAttribute attributes[2]{};
  unsigned n = 0;
  if (how.together) {
    attributes[n].id = cudaLaunchAttributeCooperative;
    attributes[n++].val.cooperative = 1;
  }
  if (how.overlaps && can_overlap() && (n == 0 || takes_both)) {
    attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = n;
  const auto start = [&] {
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  };
  cudaError_t status = start();
  if (status != cudaSuccess && n == 2) {
    cudaGetLastError();
    config.numAttrs = 1;
    status = start();
    if (status == cudaSuccess) takes_both = false;
  }
  check(status, what);
}

}  // namespace camelid::cuda
