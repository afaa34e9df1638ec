#include "model/llama4.h"

#include <algorithm>
#include <cstddef>

namespace camelid {

namespace {

constexpr std::int64_t kSampledRows = 64;

Tensor slice(Tensor x, std::int64_t first_row, std::int64_t n_rows, std::size_t element_bytes) {
  const auto offset = static_cast<std::size_t>(first_row * x.row_stride) * element_bytes;
  return {static_cast<std::byte*>(x.data) + offset, n_rows, x.dim, x.row_stride, x.role};
}

}  // namespace

Llama4::Llama4(Backend& backend, const ModelConfig& config, const Weights& weights)
    : backend_(backend), config_(config), weights_(weights) {
  std::int64_t n_local = 0;
  std::int64_t n_global = 0;
  for (std::int64_t i = 0; i < config.n_layers; ++i) {
    AttentionLayer layer;
    layer.local = config.is_local_layer(i);
    layer.rotate = config.is_rope_layer[static_cast<std::size_t>(i)];
    layer.qk_norm = config.use_qk_norm && layer.rotate;
    layer.scale_queries = config.temperature_tuning && !layer.rotate;
    layer.kv_layer = layer.local ? n_local++ : n_global++;
    layer.eps = config.rms_norm_eps;
    attention_.push_back(layer);
  }
}

void Llama4::start(const StepPlan& plan, std::span<const EmbeddingRun> features) {
  const auto n_tokens = static_cast<std::int64_t>(plan.tokens.size());
  const auto n_rows = static_cast<std::int64_t>(plan.rows.size());
  Rows& rows = rows_;
  rows.x = rows_of(hidden_, n_tokens, config_.dim, Role::kSum);
  rows.h = rows_of(normed_, n_tokens, config_.dim, Role::kOperand);
  rows.qkv = rows_of(qkv_, n_tokens, config_.qkv_dim(), Role::kSum);
  rows.a = rows_of(attended_, n_tokens, config_.n_heads * config_.head_dim, Role::kOperand);
  rows.logits = rows_of(logits_, n_rows, config_.vocab_size, Role::kSum);
  run_step(backend_, plan, [&] { run(rows, features); });
}

void Llama4::download_logits(std::int64_t first_row, std::int64_t n_rows, float* out) {
  if (n_rows == 0) return;
  backend_.download(
      out, slice(rows_.logits, first_row, n_rows, backend_.element_bytes(rows_.logits.role)));
}

void Llama4::run(const Rows& rows, std::span<const EmbeddingRun> features) {
  const Tensor x = rows.x, h = rows.h;
  const std::vector<LayerWeights>& layers = weights_.layers();
  const auto norm_by = [&](const Buffer& gain) { return Norm{h, &gain, config_.rms_norm_eps}; };
  backend_.embed(x, weights_.embedding());
  for (const EmbeddingRun& run : features) {
    backend_.upload_rows(slice(x, run.first_row, run.n_rows, backend_.element_bytes(x.role)),
                         run.values);
  }
  backend_.norm(x, norm_by(layers.front().input_norm));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LayerWeights& layer = layers[i];
    backend_.project_kv(rows.qkv, h, *layer.qkv, attention_[i]);
    backend_.attend(rows.a, rows.qkv, attention_[i]);
    backend_.matmul_add(x, rows.a, *layer.o, norm_by(layer.post_norm));

    const Norm next = i + 1 < layers.size() ? norm_by(layers[i + 1].input_norm) : Norm{};
    if (layer.experts) {
      backend_.experts(x, h, *layer.experts, next);
    } else {
      backend_.mlp(x, h, *layer.dense, next);
    }
  }
  if (rows.logits.n_rows == 0) return;

  // The head is the largest matrix: only rows somebody asked for go through it.
  const Tensor last = slice(h, 0, rows.logits.n_rows, 0);
  backend_.norm_rows(x, {last, &weights_.final_norm(), config_.rms_norm_eps});
  backend_.matmul(rows.logits, last, weights_.head());
  backend_.find_top(rows.logits);
}

std::size_t Llama4::workspace_bytes(std::int64_t n_tokens) const {
  const auto bytes = [&](std::int64_t dim, Role role) {
    return static_cast<std::size_t>(n_tokens * backend_.row_stride(dim)) *
           backend_.element_bytes(role);
  };
  // As many sequences as run at once sample a row each.
  const std::int64_t n_rows = std::min<std::int64_t>(n_tokens, kSampledRows);
  return static_cast<std::size_t>(n_rows * config_.vocab_size) * sizeof(float) +
         bytes(config_.dim, Role::kSum) + bytes(config_.dim, Role::kOperand) +
         bytes(config_.qkv_dim(), Role::kSum) +
         bytes(config_.n_heads * config_.head_dim, Role::kOperand);
}

Tensor Llama4::rows_of(Buffer& buffer, std::int64_t n_rows, std::int64_t dim, Role role) {
  const std::int64_t stride = backend_.row_stride(dim);
  const std::size_t bytes =
      static_cast<std::size_t>(n_rows * stride) * backend_.element_bytes(role);
  if (buffer.bytes < bytes) {
    buffer = Buffer{};  // first free, then take: the two never coexist
    buffer = backend_.allocate(bytes);
  }
  return {buffer.data.get(), n_rows, dim, stride, role};
}

}  // namespace camelid
