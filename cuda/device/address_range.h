// Device addresses that are backed by memory granule by granule, through the driver's virtual memory.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
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

class AddressRange {
 public:
  // At least so many bytes, none of them backed.
  explicit AddressRange(std::size_t bytes) {
    cudaFree(nullptr);  // the context exists from here on
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, current_device()};
    const VirtualMemory& calls = VirtualMemory::get();
    check_driver(calls.granularity(&granule_, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                 "granularity");
    const std::size_t n = std::max<std::size_t>((bytes + granule_ - 1) / granule_, 1);
    check_driver(calls.reserve(&base_, n * granule_, 0, 0, 0), "reserve");
    backing_.resize(n);
  }
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;
  ~AddressRange() {
    cudaDeviceSynchronize();  // nobody reads it any more
    for (std::size_t i = 0; i < backing_.size(); ++i) unback(i);
    VirtualMemory::get().free(base_, backing_.size() * granule_);
  }

  std::byte* data() const { return reinterpret_cast<std::byte*>(base_); }  // NOLINT
  std::size_t granule_bytes() const { return granule_; }
  std::size_t n_granules() const { return backing_.size(); }
  bool is_backed(std::size_t i) const { return backing_[i].is_there; }

  // Gives granule i memory of any contents, where it has none. Throws kCapacity.
  void back(std::size_t i) {
    Backing& backing = backing_[i];
    if (backing.is_there) return;
    const VirtualMemory& calls = VirtualMemory::get();
    check_driver(calls.create(&backing.memory, granule_, &properties_, 0), "create");
    const CUdeviceptr at = base_ + i * granule_;
    CUmemAccessDesc access{};
    access.location = properties_.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    CUresult result = calls.map(at, granule_, 0, backing.memory, 0);
    if (result == CUDA_SUCCESS) {
      result = calls.set_access(at, granule_, &access, 1);
      if (result != CUDA_SUCCESS) calls.unmap(at, granule_);
    }
    if (result != CUDA_SUCCESS) calls.release(backing.memory);
    check_driver(result, "map");
    backing.is_there = true;
  }
  // Takes granule i's memory away, where it has some. Nothing on the device may use it.
  void unback(std::size_t i) {
    Backing& backing = backing_[i];
    if (!backing.is_there) return;
    VirtualMemory::get().unmap(base_ + i * granule_, granule_);
    VirtualMemory::get().release(backing.memory);
    backing.is_there = false;
  }

 private:
  struct Backing {
    CUmemGenericAllocationHandle memory = 0;
    bool is_there = false;
  };

  static void check_driver(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    const bool full = result == CUDA_ERROR_OUT_OF_MEMORY;
    fail(full ? ErrorCode::kCapacity : ErrorCode::kInternal, "[cuda] virtual memory: ", what,
         " failed with ", static_cast<int>(result), full ? ": the GPU's memory is full." : ".");
  }

  CUmemAllocationProp properties_{};
  CUdeviceptr base_ = 0;
  std::size_t granule_ = 0;  // bytes
  std::vector<Backing> backing_;
};

}  // namespace camelid::cuda
