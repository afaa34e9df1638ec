// The one exception type of the engine: a code that becomes one Python class, and a message that
// says where, what was got, what was wanted and what to do. Knows nothing of Python.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace camelid {

// Each code is one class of python/camelid/errors.py (csrc/convert.h maps them).
enum class ErrorCode {
  kInvalidRequest,
  kCheckpoint,
  kCapacity,
  kUnsupported,
  kCancelled,
  kInternal,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

// Concatenates anything that can be streamed: cat("got ", 3, ", wanted ", 4).
template <class... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
  throw Error(code, cat(parts...));
}

}  // namespace camelid
