// Anonymous mappings, and the memory that is left.
#include "base/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

#include "base/cgroup.h"
#include "base/error.h"

#ifndef MAP_NORESERVE  // not everywhere; reserving is then up to the system's overcommit policy
#define MAP_NORESERVE 0
#endif

namespace camelid {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;  // x86-64 and AArch64 with 4 KiB pages
constexpr std::size_t kUnlimited = std::numeric_limits<std::size_t>::max();

std::size_t round_up(std::size_t value, std::size_t step) {
  return (value + step - 1) / step * step;
}

// The number after `key` in a "key value" or "key: value" listing; `missing` when absent.
std::size_t number_after(const std::string& text, const std::string& key, std::size_t missing) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    std::istringstream rest(line.substr(key.size()));
    std::size_t value = 0;
    if (rest >> value) return value;
  }
  return missing;
}

// The first of the two files that holds a number ("max" is none).
std::size_t first_number(const std::string& path, const std::string& other) {
  for (const std::string& candidate : {path, other}) {
    std::istringstream text(read_small_file(candidate));
    std::size_t value = 0;
    if (text >> value) return value;
  }
  return kUnlimited;
}

std::size_t cgroup_available() {
  std::size_t available = kUnlimited;
  for (const std::string& folder : cgroup_folders("memory")) {
    const std::size_t limit =
        first_number(folder + "/memory.max", folder + "/memory.limit_in_bytes");
    const std::size_t used =
        first_number(folder + "/memory.current", folder + "/memory.usage_in_bytes");
    if (limit == kUnlimited || used == kUnlimited) continue;
    const std::string stat = read_small_file(folder + "/memory.stat");
    const std::size_t cache =
        number_after(stat, "inactive_file ", 0) + number_after(stat, "active_file ", 0);
    const std::size_t held = used - std::min(used, cache);
    available = std::min(available, limit - std::min(limit, held));
  }
  return available;
}

}  // namespace

std::shared_ptr<void> map_memory(std::size_t bytes) {
  // Huge pages need an aligned start, so ask for one huge page more than is used.
  const bool huge = bytes >= kHugePage;
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const bool overflow = bytes > std::numeric_limits<std::size_t>::max() / 2;
  const std::size_t mapped =
      round_up(std::max<std::size_t>(bytes, 1), page) + (huge ? kHugePage : 0);
  void* base = overflow ? MAP_FAILED
                        : mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    fail(ErrorCode::kCapacity, "[memory] the system refused a buffer of ", bytes, " bytes; ",
         available_memory(),
         " bytes are available. Use a smaller model, weight format or context, or a larger "
         "machine.");
  }
  std::uintptr_t start = reinterpret_cast<std::uintptr_t>(base);
  if (huge) {
    start = round_up(start, kHugePage);
#ifdef MADV_HUGEPAGE
    // Advice only: without it the memory is the same, slower.
    madvise(reinterpret_cast<void*>(start), round_up(bytes, page), MADV_HUGEPAGE);
#endif
  }
  return std::shared_ptr<void>(reinterpret_cast<void*>(start),
                               [base, mapped](void*) { munmap(base, mapped); });
}

void discard_memory(void* data, std::size_t bytes) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = round_up(start, page);
  const std::uintptr_t last = (start + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

std::size_t available_memory() {
  const std::size_t kib = number_after(read_small_file("/proc/meminfo"), "MemAvailable:", 0);
  std::size_t machine = kib * 1024;
#ifdef _SC_AVPHYS_PAGES
  if (machine == 0) {
    machine = static_cast<std::size_t>(sysconf(_SC_AVPHYS_PAGES)) *
              static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  }
#endif
  return std::min(machine, cgroup_available());
}

}  // namespace camelid
