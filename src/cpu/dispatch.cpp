// Which table of kernels runs here. A new instruction set is a new line in kTables.
#include <cstdlib>
#include <string>

#include "base/error.h"
#include "cpu/kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace camelid::cpu {
namespace {

// __builtin_cpu_supports also asks whether the operating system saves the registers (XGETBV).
#if defined(__x86_64__) || defined(__i386__)
// Clang 14 does not know "f16c"; AVX2, asked for as well, vouches for the operating system.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512vnni() { return false; }
bool has_avx512bf16() { return false; }
#endif

// Best first. Each table begins as the one its `base` names.
struct Choice {
  std::string_view name;
  std::string_view base;
  bool (*add)(Kernels& table);
  bool (*runs_here)();
};
constexpr Choice kTables[] = {
    {"avx512bf16", "avx512vnni", add_avx512bf16_kernels, has_avx512bf16},
    {"avx512vnni", "avx512", add_avx512vnni_kernels, has_avx512vnni},
    {"avx512", "", add_avx512_kernels, has_avx512},
    {"avx2", "", add_avx2_kernels, has_avx2},
    {"scalar", "", add_scalar_kernels, [] { return true; }},
};

bool fill(std::string_view name, Kernels& table) {
  for (const Choice& choice : kTables) {
    if (choice.name != name) continue;
    return choice.runs_here() && (choice.base.empty() || fill(choice.base, table)) &&
           choice.add(table);
  }
  return false;
}

// The tables this machine can run, best first.
const std::vector<Kernels>& usable_tables() {
  static const std::vector<Kernels> tables = [] {
    std::vector<Kernels> all;
    for (const Choice& choice : kTables) {
      Kernels table{};
      if (fill(choice.name, table)) all.push_back(table);
    }
    return all;
  }();
  return tables;
}

}  // namespace

std::vector<std::string_view> supported_isas() {
  std::vector<std::string_view> names;
  for (const Kernels& table : usable_tables()) names.emplace_back(table.name);
  return names;
}

const Kernels& kernels_by_name(std::string_view name) {
  for (const Kernels& table : usable_tables()) {
    if (table.name == name) return table;
  }
  std::string usable_names;
  for (const std::string_view isa : supported_isas()) {
    usable_names += usable_names.empty() ? "" : ", ";
    usable_names += isa;
  }
  fail(ErrorCode::kUnsupported, "[cpu] instruction set '", name,
       "' is unknown or not supported here; CAMELID_CPU_ISA may be ", usable_names, ".");
}

const Kernels& select_kernels() {
  const char* forced = std::getenv("CAMELID_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return kernels_by_name(forced);
  return kernels_by_name(supported_isas().front());
}

}  // namespace camelid::cpu
