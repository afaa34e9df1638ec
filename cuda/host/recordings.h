// Steps that were recorded, by their kind, and which of them to keep: a step of decoding is
// recorded at its second time, since the first takes what memory it needs, and repeated from then
// on. It knows no calls of a step.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "device/graph.h"

namespace camelid::cuda {

// What all calls of a repeatable step depend on: how many tokens and rows, and in which pages.
struct StepKind {
  std::int32_t n_tokens = 0, n_rows = 0;
  const void *local = nullptr, *global = nullptr;
  auto operator<=>(const StepKind&) const = default;
};

class Recordings {
 public:
  explicit Recordings(cudaStream_t stream) : stream_(stream) {}

  // False where the calls of the step need not be made, since end() repeats them. Null: a step that
  // is never recorded.
  bool begin(const StepKind* kind);
  // False where they need to be made again: they were recorded and cannot be repeated. Nothing is
  // recorded from then on, but for a second try with launches that ask less.
  bool end();
  void abandon();  // after a call that threw
  // Why nothing is recorded any more, or empty.
  const std::string& why_not() const { return why_not_; }

 private:
  // A recording takes some megabytes of the device.
  static constexpr std::size_t kMost = 64;
  struct Recorded {
    Graph graph;
    std::uint64_t n_allocations = 0;  // when it was recorded, or last run: addresses are of then
    std::int64_t last_use = 0;
    bool has_run = false;
  };
  Recorded& find(const StepKind& kind);
  void give_up(const std::string& why);

  cudaStream_t stream_;
  std::map<StepKind, Recorded> recorded_;
  Recorded* step_ = nullptr;  // the one under way, where it is repeatable
  bool recording_ = false;
  std::int64_t n_uses_ = 0;
  std::string why_not_;
};

}  // namespace camelid::cuda
