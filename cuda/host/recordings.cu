// When a step is run, recorded or repeated.
#include "host/recordings.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "device/memory.h"

namespace camelid::cuda {

Recordings::Recorded& Recordings::find(const StepKind& kind) {
  if (recorded_.size() >= kMost && !recorded_.contains(kind)) {
    finish(stream_);  // it may still run
    recorded_.erase(std::ranges::min_element(
        recorded_, {}, [](const auto& entry) { return entry.second.last_use; }));
  }
  Recorded& recorded = recorded_[kind];
  recorded.last_use = ++n_uses_;
  return recorded;
}

// Any memory taken since may have moved what a recording points to.
bool Recordings::begin(const StepKind* kind) {
  step_ = nullptr;
  if (kind == nullptr || !why_not_.empty()) return true;
  step_ = &find(*kind);
  if (step_->n_allocations != n_allocations) {
    if (step_->graph.is_there()) finish(stream_);
    step_->graph = {};
    step_->has_run = false;
    return true;
  }
  if (step_->graph.is_there()) return false;
  Graph::record(stream_);
  recording_ = true;
  return true;
}

bool Recordings::end() {
  if (step_ == nullptr) return true;
  try {
    if (std::exchange(recording_, false)) step_->graph = Graph::finish(stream_);
    if (step_->graph.is_there()) {
      step_->graph.launch(stream_);
      step_->has_run = true;
    } else {
      step_->n_allocations = n_allocations;
    }
    return true;
  } catch (const Error& error) {
    if (step_->has_run) throw;  // it can be repeated: something else is wrong
    give_up(error.what());
    return false;
  }
}

// What threw may do so only while it is recorded: the next time shows.
void Recordings::abandon() {
  if (!std::exchange(recording_, false)) return;
  Graph::abandon(stream_);
  give_up("[cuda] a call failed while it was recorded.");
}

void Recordings::give_up(const std::string& why) {
  if (!ask_less_of_launches()) why_not_ = why;  // else the next recording may succeed
  try {
    finish(stream_);
  } catch (const Error&) {  // told by whoever waits for the stream next
  }
  recorded_.clear();
  step_ = nullptr;
}

}  // namespace camelid::cuda
