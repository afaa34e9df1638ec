#include "model/config.h"

#include <cmath>
#include <string_view>

#include "base/error.h"

namespace camelid {
namespace {

// No real model comes near; larger numbers are damage, and products of four must fit 64 bits.
constexpr std::int64_t kLargest = std::int64_t{1} << 24;

void check_size(std::string_view field, std::int64_t value) {
  if (value >= 1 && value <= kLargest) return;
  fail(ErrorCode::kCheckpoint, "[config] ", field, " is ", value, ", expected 1 to ", kLargest,
       ". The config is damaged or not a Llama 4.");
}

void check_positive(std::string_view field, double value) {
  if (std::isfinite(value) && value > 0.0) return;
  fail(ErrorCode::kCheckpoint, "[config] ", field, " is ", value,
       ", expected a finite positive number. The config is damaged.");
}

void check_per_layer(std::string_view field, std::size_t got, std::int64_t n_layers) {
  if (got == static_cast<std::size_t>(n_layers)) return;
  fail(ErrorCode::kCheckpoint, "[config] ", field, " has ", got,
       " entries, expected one for each of ", n_layers, " layers.");
}

}  // namespace

void VisionConfig::check() const {
  check_size("vision hidden_size", dim);
  check_size("vision num_attention_heads", n_heads);
  check_size("vision intermediate_size", ffn_dim);
  check_size("vision patch_size", patch_size);
  check_size("vision image_size", image_size);
  check_size("vision projector_input_dim", adapter_dim);
  check_positive("vision rope_theta", rope_theta);
  const auto require = [](bool holds, const auto&... wanted) {
    if (!holds) fail(ErrorCode::kUnsupported, "[config] vision_config: ", wanted...);
  };
  require(dim % n_heads == 0 && head_dim() % 4 == 0, "heads of ", head_dim(),
          " dimensions. Supported: a multiple of 4, so that pairs turn in two directions.");
  require(shuffle >= 1 && side() >= 1 && side() % shuffle == 0, "tiles of ", side(), " x ", side(),
          " patches. Supported: a multiple of 1 / pixel_shuffle_ratio = ", shuffle, ".");
  require(shuffled_dim() == ffn_dim, "intermediate_size is ", ffn_dim,
          ". Supported: hidden_size / ", "pixel_shuffle_ratio^2 = ", shuffled_dim(),
          ", which the adapter reads.");
}

void ModelConfig::check() const {
  check_size("hidden_size", dim);
  check_size("num_hidden_layers", n_layers);
  check_size("num_attention_heads", n_heads);
  check_size("num_key_value_heads", n_kv_heads);
  check_size("head_dim", head_dim);
  check_size("vocab_size", vocab_size);
  check_per_layer("no_rope_layers", is_rope_layer.size(), n_layers);
  check_per_layer("layer_types", is_chunked_layer.size(), n_layers);
  check_per_layer("moe_layers", is_moe_layer.size(), n_layers);
  bool any_moe = false;
  bool any_dense = false;
  for (bool moe : is_moe_layer) (moe ? any_moe : any_dense) = true;
  if (any_dense) check_size("intermediate_size_mlp", dense_dim);
  if (any_moe) {
    check_size("intermediate_size", expert_dim);
    check_size("num_local_experts", n_experts);
    check_size("num_experts_per_tok", top_k);
    if (top_k > n_experts) {
      fail(ErrorCode::kCheckpoint, "[config] num_experts_per_tok is ", top_k,
           ", expected at most num_local_experts = ", n_experts, ".");
    }
  }
  if (n_heads % n_kv_heads != 0) {
    fail(ErrorCode::kCheckpoint, "[config] num_attention_heads = ", n_heads,
         " is not a multiple of num_key_value_heads = ", n_kv_heads, ".");
  }
  if (head_dim % 2 != 0) {
    fail(ErrorCode::kCheckpoint, "[config] head_dim is ", head_dim,
         ", expected an even number: RoPE rotates pairs.");
  }
  if (chunk < 0) {
    fail(ErrorCode::kCheckpoint, "[config] attention_chunk_size is ", chunk,
         ", expected null or a positive number.");
  }
  if (vision) vision->check();
  check_positive("rms_norm_eps", rms_norm_eps);
  check_positive("rope_theta", rope_theta);
  check_positive("floor_scale", floor_scale);
  if (!std::isfinite(attn_scale))
    fail(ErrorCode::kCheckpoint, "[config] attn_scale is not finite.");
  if (has_rope_scaling) {
    check_positive("rope_scaling.factor", rope_scaling.factor);
    check_positive("rope_scaling.low_freq_factor", rope_scaling.low_freq_factor);
    check_positive("rope_scaling.high_freq_factor", rope_scaling.high_freq_factor);
    check_positive("rope_scaling.original_max_position_embeddings",
                   rope_scaling.original_max_position);
  }
}

}  // namespace camelid
