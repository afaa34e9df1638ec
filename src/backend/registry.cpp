// The table of backends. A new one is a new line in make_backend.
#include <charconv>
#include <string_view>

#include "backend/backend.h"
#include "backend/cuda.h"
#include "base/error.h"
#include "cpu/backend.h"

namespace camelid {
namespace {

[[noreturn]] void refuse(std::string_view device) {
  fail(ErrorCode::kUnsupported, "[device] no device is called '", device,
       "'; choose auto, cpu, cuda or cuda:N.");
}

// "cuda" is 0, "cuda:N" is N.
int cuda_ordinal(std::string_view device) {
  constexpr std::string_view kPrefix = "cuda:";
  if (device == "cuda") return 0;
  if (!device.starts_with(kPrefix)) refuse(device);
  const std::string_view digits = device.substr(kPrefix.size());
  int ordinal = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), ordinal);
  if (error != std::errc() || end != digits.data() + digits.size() || ordinal < 0) refuse(device);
  return ordinal;
}

}  // namespace

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device == "cpu") return make_cpu_backend(options);
  if (options.device != "auto")
    return make_cuda_backend(cuda_ordinal(options.device), options.threads);
  return cuda_available() ? make_cuda_backend(0, options.threads) : make_cpu_backend(options);
}

}  // namespace camelid
