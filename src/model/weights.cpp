#include "model/weights.h"

#include <cmath>
#include <utility>

#include "base/error.h"

namespace camelid {
namespace {

WeightFormat stored_format(const LinearSource& source) {
  if (source.bits == 4) return WeightFormat::kInt4;
  if (source.bits == 8) return WeightFormat::kInt8;
  switch (source.dtype) {
    case DType::kF16:
      return WeightFormat::kF16;
    case DType::kBf16:
      return WeightFormat::kBf16;
    default:
      return WeightFormat::kF32;
  }
}

// The largest usual group size that divides the inputs; one group per row when none does.
std::int64_t group_size_for(std::int64_t in_dim) {
  for (std::int64_t size : {128, 64, 32}) {
    if (in_dim % size == 0) return size;
  }
  return 0;
}

PackOptions options_for(const LinearSource& source, WeightChoice choice) {
  PackOptions options{stored_format(source), group_size_for(source.in_dim)};
  if (choice == WeightChoice::kBf16) options.format = WeightFormat::kBf16;
  if (choice == WeightChoice::kInt8) options.format = WeightFormat::kInt8;
  if (choice == WeightChoice::kInt4) options.format = WeightFormat::kInt4;
  return options;
}

}  // namespace

void check_shape(const LinearSource& source, std::int64_t out_dim, std::int64_t in_dim) {
  if (source.out_dim == out_dim && source.in_dim == in_dim) return;
  fail(ErrorCode::kCheckpoint, "[weights] ", source.name, " in ", source.file, " is [",
       source.out_dim, ", ", source.in_dim, "], expected [", out_dim, ", ", in_dim,
       "]. The config and the weights disagree; download both again.");
}

std::unique_ptr<Matrix> pack_linears(Backend& backend, std::span<const LinearSource> stack,
                                     WeightChoice choice, bool precise, const OnPacked& on_packed,
                                     Stack kind) {
  std::vector<PackOptions> options;
  for (const LinearSource& source : stack) {
    options.push_back(options_for(source, choice));
    options.back().precise = precise;
  }
  std::unique_ptr<Matrix> matrix = backend.pack(stack, options, kind);
  if (on_packed) {
    for (const LinearSource& source : stack) on_packed(source.name);
  }
  return matrix;
}

WeightChoice weight_choice_from_name(const std::string& name) {
  if (name == "auto") return WeightChoice::kAsStored;
  if (name == "bf16") return WeightChoice::kBf16;
  if (name == "int8") return WeightChoice::kInt8;
  if (name == "int4") return WeightChoice::kInt4;
  fail(name == "fp8" ? ErrorCode::kUnsupported : ErrorCode::kInvalidRequest, "[options] weights=\"",
       name, "\" is not supported by this build, expected auto, bf16, int8 or int4.");
}

Weights::Weights(Backend& backend, const ModelConfig& config, WeightOptions options,
                 OnPacked on_packed)
    : backend_(backend), config_(config), options_(options), on_packed_(std::move(on_packed)) {}

std::unique_ptr<Matrix> Weights::pack(std::vector<LinearSource> stack, WeightChoice choice,
                                      bool precise, Stack kind) {
  std::unique_ptr<Matrix> matrix = pack_linears(backend_, stack, choice, precise, on_packed_, kind);
  bytes_ += matrix->bytes;
  return matrix;
}

WeightChoice Weights::plain_choice() const {
  return options_.body == WeightChoice::kBf16 ? WeightChoice::kBf16 : WeightChoice::kAsStored;
}

Buffer Weights::upload_norm(std::span<const float> values, const char* name) {
  if (static_cast<std::int64_t>(values.size()) != config_.dim) {
    fail(ErrorCode::kCheckpoint, "[weights] ", name, " has ", values.size(), " values, expected ",
         config_.dim, ".");
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i])) continue;
    fail(ErrorCode::kCheckpoint, "[weights] ", name, " after ", layers_.size(), " layers",
         " holds a value that is not finite at ", i, ". The file is damaged; download it again.");
  }
  bytes_ += values.size_bytes();
  return backend_.upload(values);
}

Mlp Weights::pack_mlp(const MlpSources& sources, std::int64_t ffn_dim) {
  check_shape(sources.gate, ffn_dim, config_.dim);
  check_shape(sources.up, ffn_dim, config_.dim);
  check_shape(sources.down, config_.dim, ffn_dim);
  Mlp mlp;
  mlp.gate_up = pack({sources.gate, sources.up}, options_.body, false, Stack::kGateUp);
  mlp.down = pack({sources.down}, options_.body);
  return mlp;
}

void Weights::load_embedding(const LinearSource& source) {
  check_shape(source, config_.vocab_size, config_.dim);
  embedding_ = pack({source}, plain_choice());
}

void Weights::load_layer(const LayerSources& sources) {
  const auto index = layers_.size();
  if (index >= static_cast<std::size_t>(config_.n_layers)) {
    fail(ErrorCode::kInternal, "[weights] layer ", index, " of ", config_.n_layers, " was loaded");
  }
  const std::int64_t q_dim = config_.n_heads * config_.head_dim;
  const std::int64_t kv_dim = config_.n_kv_heads * config_.head_dim;
  check_shape(sources.q, q_dim, config_.dim);
  check_shape(sources.k, kv_dim, config_.dim);
  check_shape(sources.v, kv_dim, config_.dim);
  check_shape(sources.o, config_.dim, q_dim);

  LayerWeights layer;
  layer.input_norm = upload_norm(sources.input_norm, "input_layernorm");
  layer.post_norm = upload_norm(sources.post_norm, "post_attention_layernorm");
  // All that follows builds on what the first layer attends to: on the demo model, int8
  // activations there caused more than half of all divergence (benchmarks/results/), for a part of
  // the work that vanishes among many layers.
  const bool precise = index == 0;
  layer.qkv = pack({sources.q, sources.k, sources.v}, options_.body, precise);
  layer.o = pack({sources.o}, options_.body, precise);
  if (config_.is_moe_layer[index]) {
    const bool complete = sources.router && sources.shared &&
                          sources.experts.size() == static_cast<std::size_t>(config_.n_experts);
    if (!complete)
      fail(ErrorCode::kInternal, "[weights] layer ", index, " lacks parts of its experts");
    check_shape(*sources.router, config_.n_experts, config_.dim);
    Experts experts;
    experts.top_k = config_.top_k;
    experts.router = pack({*sources.router}, plain_choice());
    for (const MlpSources& expert : sources.experts) {
      experts.routed.push_back(pack_mlp(expert, config_.expert_dim));
    }
    experts.shared = pack_mlp(*sources.shared, config_.expert_dim);
    backend_.prepare(experts);
    layer.experts = std::move(experts);
  } else {
    if (!sources.dense)
      fail(ErrorCode::kInternal, "[weights] layer ", index, " lacks its dense block");
    layer.dense = pack_mlp(*sources.dense, config_.dense_dim);
  }
  layers_.push_back(std::move(layer));
}

void Weights::load_head(std::span<const float> final_norm,
                        const std::optional<LinearSource>& head) {
  final_norm_ = upload_norm(final_norm, "final norm");
  if (!head) return;
  check_shape(*head, config_.vocab_size, config_.dim);
  const bool quantise = options_.int8_head && head->bits == 0;
  head_ = pack({*head}, quantise ? WeightChoice::kInt8 : plain_choice());
}

void Weights::check_complete() const {
  const bool complete = embedding_ && final_norm_.data && (head_ || config_.tied_embeddings) &&
                        layers_.size() == static_cast<std::size_t>(config_.n_layers);
  if (!complete) {
    fail(ErrorCode::kInternal,
         "[weights] the model is used before its weights are loaded: ", layers_.size(), " of ",
         config_.n_layers, " layers");
  }
}

}  // namespace camelid
