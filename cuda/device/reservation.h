// A range of device addresses of which only the parts in use are backed by memory. Pages of the KV
// cache lie in it: two pools each reserve what they could need at most, and share what there is.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "device/launch.cuh"

namespace camelid::cuda {

// The driver's calls for virtual memory, found when they are first needed: the runtime has none of
// its own, and linking the driver would keep the module from loading where there is none.
struct VirtualMemory {
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;

  static const VirtualMemory& get() {
    static const VirtualMemory calls = [] {
      VirtualMemory found;
      find("cuMemGetAllocationGranularity", found.granularity);
      find("cuMemAddressReserve", found.reserve);
      find("cuMemAddressFree", found.free);
      find("cuMemCreate", found.create);
      find("cuMemRelease", found.release);
      find("cuMemMap", found.map);
      find("cuMemUnmap", found.unmap);
      find("cuMemSetAccess", found.set_access);
      return found;
    }();
    return calls;
  }

 private:
  template <class Call>
  static void find(const char* name, Call& call) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    constexpr unsigned kVersion = 12000;  // of the calls' signatures
    check(cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found),
          name);
#else
    check(cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found), name);
#endif
    if (found != cudaDriverEntryPointSuccess || address == nullptr) {
      fail(ErrorCode::kUnsupported, "[cuda] this driver has no ", name, "; install a newer one.");
    }
    call = reinterpret_cast<Call>(address);
  }
};

class Reservation {
 public:
  explicit Reservation(std::size_t bytes) {
    cudaFree(nullptr);  // the context exists from here on
    int device = 0;
    check(cudaGetDevice(&device), "device");
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    const VirtualMemory& calls = VirtualMemory::get();
    check_driver(calls.granularity(&granule_, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                 "granularity");
    const std::size_t n = (bytes + granule_ - 1) / granule_;
    check_driver(calls.reserve(&base_, std::max<std::size_t>(n, 1) * granule_, 0, 0, 0), "reserve");
    granules_.resize(std::max<std::size_t>(n, 1));
  }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  ~Reservation() {
    cudaDeviceSynchronize();  // nobody reads it any more
    reclaim();
    VirtualMemory::get().free(base_, granules_.size() * granule_);
  }

  void* data() const { return reinterpret_cast<void*>(base_); }  // NOLINT

  // Backs the bytes from `data` on with memory, of any contents. Throws kCapacity.
  void commit(void* data, std::size_t bytes) {
    const auto [first, last] = granules_of(data, bytes);
    for (std::size_t i = first; i < last; ++i) {
      try {
        back(i);
      } catch (...) {
        while (i-- > first) --granules_[i].n_users;
        throw;
      }
      ++granules_[i].n_users;
    }
  }

  // Those bytes are no longer needed. Their memory stays until reclaim().
  void discard(void* data, std::size_t bytes) {
    const auto [first, last] = granules_of(data, bytes);
    for (std::size_t i = first; i < last; ++i) --granules_[i].n_users;
  }

  // Gives back the memory that nobody uses; true if there was any. The device must be idle.
  bool reclaim() {
    const VirtualMemory& calls = VirtualMemory::get();
    bool any = false;
    for (std::size_t i = 0; i < granules_.size(); ++i) {
      Granule& granule = granules_[i];
      if (!granule.is_backed || granule.n_users > 0) continue;
      calls.unmap(base_ + i * granule_, granule_);
      calls.release(granule.memory);
      granule.is_backed = false;
      any = true;
    }
    return any;
  }

 private:
  struct Granule {
    CUmemGenericAllocationHandle memory = 0;
    std::int32_t n_users = 0;  // pages that lie in it, in whole or in part
    bool is_backed = false;
  };

  static void check_driver(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    const bool full = result == CUDA_ERROR_OUT_OF_MEMORY;
    fail(full ? ErrorCode::kCapacity : ErrorCode::kInternal, "[cuda] virtual memory: ", what,
         " failed with ", static_cast<int>(result), full ? ": the GPU's memory is full." : ".");
  }

  std::pair<std::size_t, std::size_t> granules_of(void* data, std::size_t bytes) const {
    const std::size_t at = reinterpret_cast<CUdeviceptr>(data) - base_;
    return {at / granule_, (at + bytes + granule_ - 1) / granule_};
  }

  void back(std::size_t i) {
    Granule& granule = granules_[i];
    if (granule.is_backed) return;
    const VirtualMemory& calls = VirtualMemory::get();
    check_driver(calls.create(&granule.memory, granule_, &properties_, 0), "create");
    const CUdeviceptr at = base_ + i * granule_;
    CUmemAccessDesc access{};
    access.location = properties_.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    CUresult result = calls.map(at, granule_, 0, granule.memory, 0);
    if (result == CUDA_SUCCESS) {
      result = calls.set_access(at, granule_, &access, 1);
      if (result != CUDA_SUCCESS) calls.unmap(at, granule_);
    }
    if (result != CUDA_SUCCESS) calls.release(granule.memory);
    check_driver(result, "map");
    granule.is_backed = true;
  }

  CUmemAllocationProp properties_{};
  CUdeviceptr base_ = 0;
  std::size_t granule_ = 0;  // bytes
  std::vector<Granule> granules_;
};

}  // namespace camelid::cuda
