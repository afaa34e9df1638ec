#include "engine.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "base/error.h"

namespace camelid {
namespace {

std::unique_ptr<Backend> choose_backend(const EngineOptions& options) {
  std::unique_ptr<Backend> backend = make_backend(options.backend);
  if (options.timed) backend = std::make_unique<TimedBackend>(std::move(backend));
  return backend;
}

}  // namespace

Engine::Engine(ModelConfig config, const EngineOptions& options)
    : config_((config.check(), std::move(config))),
      options_(options),
      backend_(choose_backend(options)),
      weights_(*backend_, config_, {options.weights, options.int8_head}, options.on_packed),
      model_(*backend_, config_, weights_),
      runner_(config_, model_, *backend_) {
  if (config_.vision) {
    const KvType kv_type = options_.backend.fast ? KvType::kBf16 : backend_->widest_kv();
    vision_ = std::make_unique<VisionTower>(*backend_, *config_.vision, config_.dim, kv_type);
  }
  if (options_.page_size < 16 || options_.page_size % 16 != 0) {
    fail(ErrorCode::kInvalidRequest, "[options] page_size is ", options_.page_size,
         ", expected a positive multiple of 16 tokens.");
  }
}

VisionTower& Engine::tower() const {
  if (!vision_) {
    fail(ErrorCode::kUnsupported,
         "[vision] this model has no vision tower: its config names none. ",
         "Load the checkpoint of a Llama4ForConditionalGeneration.");
  }
  return *vision_;
}

void Engine::load_vision_frame(const VisionFrameSources& sources) {
  tower().load_frame(sources, weights_.plain_choice(), weights_.on_packed());
}

void Engine::load_vision_layer(const VisionLayerSources& sources) {
  tower().load_layer(sources, weights_.plain_choice(), weights_.on_packed());
}

std::vector<float> Engine::encode_image(std::span<const float> pixels) {
  const std::lock_guard lock(mutex_);
  const VisionConfig& c = tower().config();
  const auto of_tile = static_cast<std::size_t>(c.pixels_per_tile());
  if (pixels.empty() || pixels.size() % of_tile != 0) {
    fail(ErrorCode::kInvalidRequest, "[vision] got ", pixels.size(),
         " pixel values, expected a positive multiple of ", of_tile, ": tiles of [", c.n_channels,
         ", ", c.image_size, ", ", c.image_size, "].");
  }
  const std::size_t n_tiles = pixels.size() / of_tile;
  std::vector<float> out(n_tiles * static_cast<std::size_t>(c.tokens_per_tile() * config_.dim));
  tower().encode(pixels, out.data());
  return out;
}

std::size_t Engine::weight_bytes() const {
  return weights_.bytes() + (vision_ ? vision_->bytes() : 0);
}

std::size_t Engine::workspace_bytes() const {
  return model_.workspace_bytes(options_.max_step_tokens) + prepared_bytes_ +
         (vision_ ? vision_->workspace_bytes() : 0);
}

void Engine::finish_loading(std::size_t reserved_bytes) {
  weights_.check_complete();
  if (vision_) vision_->check_complete();
  prepared_bytes_ =
      backend_->prepare_steps(options_.max_step_tokens, config_.n_heads * config_.head_dim);
  const std::size_t workspace = workspace_bytes();
  const auto minus = [](std::size_t a, std::size_t b) { return a > b ? a - b : 0; };
  // The cache may take what is free now and not planned for: without a limit less a tenth for
  // everyone else, with one no more than that leaves.
  const std::size_t planned = reserved_bytes + workspace - prepared_bytes_;
  const std::size_t available = backend_->available_bytes();
  std::size_t left = minus(available / 10 * 9, planned);
  if (options_.memory_bytes > 0) {
    const std::size_t taken = weight_bytes() + workspace + reserved_bytes;
    left = std::min(minus(options_.memory_bytes, taken), minus(available, planned));
  }
  KvCacheOptions cache{options_.kv_cache, options_.page_size, left};
  auto made = std::make_unique<KvCache>(*backend_, config_, cache);
  const std::size_t least = made->bytes_for(1);
  if (left < least) {
    fail(ErrorCode::kCapacity, "[memory] weights take ", weight_bytes(), " bytes, the workspace ",
         workspace, " and encoded images ", reserved_bytes, "; ", left,
         " bytes are left for the KV cache, which needs at least ", least, ". Raise memory= to ",
         weight_bytes() + workspace + reserved_bytes + least, " bytes or more, ",
         reserved_bytes > 0 ? "lower image_cache=, " : "", "or use smaller weights.");
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
  return {weight_bytes(), workspace_bytes(), cache().limit_bytes(), cache().used_bytes(),
          cache().page_size()};
}

TimedBackend& Engine::timed() const {
  auto* timed = dynamic_cast<TimedBackend*>(backend_.get());
  if (timed == nullptr) {
    fail(ErrorCode::kInvalidRequest,
         "[timeline] this engine has no clock; make it with timed=True.");
  }
  return *timed;
}

void Engine::start_timeline(Grain grain) {
  const std::lock_guard lock(mutex_);
  timed().start(grain);
}

std::vector<TimedCall> Engine::stop_timeline() {
  const std::lock_guard lock(mutex_);
  return timed().stop();
}

void Engine::check_invariants() const {
  const std::lock_guard lock(mutex_);
  cache().check_invariants();
}

StepResult Engine::step(const StepRequest& request) {
  const std::lock_guard lock(mutex_);
  return runner_.run(check_request(request, config_.vocab_size, config_.dim), request.features,
                     cache(), samplers_);
}

}  // namespace camelid
