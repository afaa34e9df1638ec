// Device addresses that memory backs granule by granule, through the driver's virtual memory.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/memory.h"

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
  explicit AddressRange(std::size_t bytes) : device_(current_device()) {
    cudaFree(nullptr);  // the context exists from here on
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, device_};
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
    int others = 0;
    cudaGetDevice(&others);
    cudaSetDevice(device_);
    cudaDeviceSynchronize();  // nobody reads it any more
    cudaSetDevice(others);
    for (std::size_t i = 0; i < backing_.size(); ++i) unback(i);
    VirtualMemory::get().free(base_, backing_.size() * granule_);
  }

  std::byte* data() const { return reinterpret_cast<std::byte*>(base_); }  // NOLINT
  std::size_t granule_bytes() const { return granule_; }
  std::size_t n_granules() const { return backing_.size(); }
  bool is_backed(std::size_t i) const { return backing_[i].is_there; }

  std::size_t backed_bytes() const { return n_backed_ * granule_; }

  // Gives the granules that have none memory of any contents. Throws kCapacity; some may have got
  // theirs then.
  void back(std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last; ++i) {
      if (backing_[i].is_there) continue;
      std::size_t end = i;
      try {
        for (; end < last && !backing_[end].is_there; ++end) map(end);
      } catch (...) {
        allow_access(i, end);
        throw;
      }
      allow_access(i, end);
      i = end;
    }
  }
  // Takes granule i's memory away, where it has some. Nothing on the device may use it.
  void unback(std::size_t i) {
    Backing& backing = backing_[i];
    if (!backing.is_there) return;
    VirtualMemory::get().unmap(base_ + i * granule_, granule_);
    VirtualMemory::get().release(backing.memory);
    backing.is_there = false;
    --n_backed_;
  }

 private:
  struct Backing {
    CUmemGenericAllocationHandle memory = 0;
    bool is_there = false;
  };

  void map(std::size_t i) {
    const VirtualMemory& calls = VirtualMemory::get();
    CUmemGenericAllocationHandle memory = 0;
    check_driver(calls.create(&memory, granule_, &properties_, 0), "create");
    const CUresult result = calls.map(base_ + i * granule_, granule_, 0, memory, 0);
    if (result != CUDA_SUCCESS) calls.release(memory);
    check_driver(result, "map");
    backing_[i] = {memory, true};
    ++n_backed_;
  }
  // One call for neighbours: it takes longer than all others.
  void allow_access(std::size_t first, std::size_t last) {
    if (first == last) return;
    CUmemAccessDesc access{};
    access.location = properties_.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    const CUresult result = VirtualMemory::get().set_access(base_ + first * granule_,
                                                            (last - first) * granule_, &access, 1);
    if (result == CUDA_SUCCESS) return;
    for (std::size_t i = first; i < last; ++i) unback(i);
    check_driver(result, "access");
  }

  void check_driver(CUresult result, const char* what) const {
    if (result == CUDA_SUCCESS) return;
    if (result == CUDA_ERROR_OUT_OF_MEMORY) {
      fail_full(granule_, free_bytes());
    }
    if (result == CUDA_ERROR_NOT_SUPPORTED) {
      fail(ErrorCode::kUnsupported, "[cuda] this GPU or its driver has no virtual memory, which ",
           "the KV cache needs (a shared vGPU?). Use device=\"cpu\".");
    }
    fail(ErrorCode::kInternal, "[cuda] virtual memory: ", what, " failed with ",
         static_cast<int>(result), ".");
  }

  int device_;
  CUmemAllocationProp properties_{};
  CUdeviceptr base_ = 0;
  std::size_t granule_ = 0;  // bytes
  std::vector<Backing> backing_;
  std::size_t n_backed_ = 0;
};

}  // namespace camelid::cuda
