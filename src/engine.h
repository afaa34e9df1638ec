// The whole public C++ surface: open a model from named weights, run steps over sequences, sample.
// One Engine belongs to one model; calls are served one by one, in the order in which they come, so
// threads may share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/timed.h"
#include "base/fair_mutex.h"
#include "kv/cache.h"
#include "model/config.h"
#include "model/llama4.h"
#include "model/vision.h"
#include "model/weights.h"
#include "step/batch.h"
#include "step/sampler.h"
#include "step/step.h"

namespace camelid {

struct EngineOptions {
  BackendOptions backend;
  WeightChoice weights = WeightChoice::kAsStored;
  bool int8_head = false;  // hold a plain output head as int8
  OnPacked on_packed;
  KvType kv_cache = KvType::kF32;
  std::int64_t page_size = 64;   // tokens
  std::size_t memory_bytes = 0;  // weights, KV pages and workspace together; 0: what is available
  std::int64_t max_step_tokens = 512;  // the workspace reserve; larger steps take more
  bool timed = false;                  // start_timeline() may be called
};

struct MemoryReport {
  std::size_t weight_bytes = 0;
  std::size_t workspace_bytes = 0;
  std::size_t kv_limit_bytes = 0;
  std::size_t kv_used_bytes = 0;
  std::int64_t page_size = 0;
};

class Engine {
 public:
  Engine(ModelConfig config, const EngineOptions& options);

  Weights& weights() { return weights_; }
  // Absent where the config has no vision tower.
  VisionTower* vision() { return vision_.get(); }
  void load_vision_frame(const VisionFrameSources& sources);
  void load_vision_layer(const VisionLayerSources& sources);
  // Once all weights are loaded: sizes the KV pools from what memory is left beside the caller's
  // `reserved_bytes`. Throws kCapacity.
  void finish_loading(std::size_t reserved_bytes = 0);

  std::int64_t open_sequence(const SamplerParams& params);
  void close_sequence(std::int64_t sequence);
  // Runs one step. When it throws kInvalidRequest, or kCapacity for want of pages, nothing has
  // changed. After any other error the sequences of the request can only be closed: those that
  // cross a chunk may be past it when a device's memory turns out to be full.
  StepResult step(const StepRequest& request);
  // pixels: [n_tiles, channels, image_size, image_size]; returns [n_tiles, tokens_per_tile, dim].
  std::vector<float> encode_image(std::span<const float> pixels);

  // Measures the device's part of all steps until stop_timeline(). Throws kInvalidRequest unless
  // the options said `timed`.
  void start_timeline(Grain grain);
  std::vector<TimedCall> stop_timeline();

  std::size_t kv_bytes_for(std::int64_t n_tokens) const { return cache().bytes_for(n_tokens); }
  std::int64_t kv_tokens_in(std::size_t bytes) const { return cache().tokens_in(bytes); }
  MemoryReport memory() const;
  std::string describe() const { return backend_->describe(); }
  std::size_t available_bytes() const { return backend_->available_bytes(); }
  // Of steps of up to max_step_tokens; what the backend adds is known once loading is finished.
  std::size_t workspace_bytes() const;
  const ModelConfig& config() const { return config_; }
  void check_invariants() const;

 private:
  KvCache& cache() const;
  VisionTower& tower() const;
  TimedBackend& timed() const;
  std::size_t weight_bytes() const;

  ModelConfig config_;
  EngineOptions options_;
  std::unique_ptr<Backend> backend_;
  Weights weights_;
  std::unique_ptr<VisionTower> vision_;
  Llama4 model_;
  StepRunner runner_;
  std::size_t prepared_bytes_ = 0;  // by the backend, for steps
  std::unique_ptr<KvCache> cache_;
  std::map<std::int64_t, Sampler> samplers_;
  mutable FairMutex mutex_;
};

}  // namespace camelid
