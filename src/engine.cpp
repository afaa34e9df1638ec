#include "engine.h"

#include <utility>

#include "base/error.h"

namespace camelid {

Engine::Engine(ModelConfig config, const EngineOptions& options)
    : config_((config.check(), std::move(config))),
      options_(options),
      backend_(make_backend(options.backend)),
      weights_(*backend_, config_, {options.weights, options.int8_head}, options.on_packed),
      model_(*backend_, config_, weights_),
      runner_(config_, model_) {
  if (options_.page_size < 16 || options_.page_size % 16 != 0) {
    fail(ErrorCode::kInvalidRequest, "[options] page_size is ", options_.page_size,
         ", expected a positive multiple of 16 tokens.");
  }
}

void Engine::finish_loading() {
  weights_.check_complete();
  const std::size_t workspace = model_.workspace_bytes(options_.max_step_tokens);
  // Without a limit the cache may take what is free now, less a tenth for everyone else.
  std::size_t left = backend_->available_bytes() / 10 * 9;
  if (options_.memory_bytes > 0) {
    const std::size_t taken = weights_.bytes() + workspace;
    left = options_.memory_bytes > taken ? options_.memory_bytes - taken : 0;
  }
  KvCacheOptions cache{options_.kv_cache, options_.page_size, left};
  auto made = std::make_unique<KvCache>(*backend_, config_, cache);
  const std::size_t least = made->bytes_for(1);
  if (left < least) {
    fail(ErrorCode::kCapacity, "[memory] weights take ", weights_.bytes(),
         " bytes and the workspace ", workspace, "; ", left,
         " bytes are left for the KV cache, which needs at least ", least, ". Raise memory= to ",
         weights_.bytes() + workspace + least, " bytes or more, or use smaller weights.");
  }
  cache_ = std::move(made);
}

KvCache& Engine::cache() const {
  if (!cache_) fail(ErrorCode::kInternal, "[engine] used before finish_loading()");
  return *cache_;
}

std::int64_t Engine::open_sequence(const SamplerParams& params) {
  const std::lock_guard lock(mutex_);
  Sampler sampler(params, config_.vocab_size);
  const std::int64_t sequence = cache().open();
  samplers_.emplace(sequence, std::move(sampler));
  return sequence;
}

void Engine::close_sequence(std::int64_t sequence) {
  const std::lock_guard lock(mutex_);
  cache().close(sequence);
  samplers_.erase(sequence);
}

MemoryReport Engine::memory() const {
  const std::lock_guard lock(mutex_);
  return {weights_.bytes(), model_.workspace_bytes(options_.max_step_tokens), cache().limit_bytes(),
          cache().used_bytes(), cache().page_size()};
}

void Engine::check_invariants() const {
  const std::lock_guard lock(mutex_);
  cache().check_invariants();
}

StepResult Engine::step(const StepRequest& request) {
  const std::lock_guard lock(mutex_);
  return runner_.run(check_request(request, config_.vocab_size), cache(), samplers_);
}

}  // namespace camelid
