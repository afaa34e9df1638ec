// The shape of a Llama 4 text model, as plain numbers. python/camelid/config.py reads every dialect
// of config.json into these; check() refuses what no Llama 4 can be.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace camelid {

// llama3 frequency scaling. Source: config.json, rope_scaling or rope_parameters.
struct RopeScaling {
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 1.0;
  double original_max_position = 8192.0;
};

// The vision tower: an encoder over the patches of square tiles, and what takes them to `dim`.
struct VisionConfig {
  std::int64_t dim = 0;
  std::int64_t n_layers = 0;
  std::int64_t n_heads = 0;
  std::int64_t ffn_dim = 0;
  std::int64_t image_size = 0;  // pixels, the side of a tile
  std::int64_t patch_size = 0;  // pixels
  std::int64_t n_channels = 3;
  std::int64_t shuffle = 2;  // patches of a side that become one token: 1 / pixel_shuffle_ratio
  std::int64_t adapter_dim = 0;
  double rope_theta = 10000.0;

  std::int64_t side() const { return image_size / patch_size; }
  std::int64_t n_patches() const { return side() * side(); }
  std::int64_t n_rows() const { return n_patches() + 1; }  // the class token is the last
  std::int64_t tokens_per_tile() const { return n_patches() / (shuffle * shuffle); }
  std::int64_t shuffled_dim() const { return dim * shuffle * shuffle; }
  std::int64_t patch_dim() const { return n_channels * patch_size * patch_size; }
  std::int64_t head_dim() const { return dim / n_heads; }
  std::int64_t pixels_per_tile() const { return n_channels * image_size * image_size; }
  void check() const;
};

struct ModelConfig {
  std::int64_t dim = 0;
  std::int64_t n_layers = 0;
  std::int64_t n_heads = 0;
  std::int64_t n_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t expert_dim = 0;  // width of routed and shared experts
  std::int64_t dense_dim = 0;   // width of dense layers
  std::int64_t n_experts = 0;
  std::int64_t top_k = 1;
  std::int64_t vocab_size = 0;
  float rms_norm_eps = 1e-5f;
  double rope_theta = 500000.0;
  bool has_rope_scaling = false;
  RopeScaling rope_scaling;
  std::int64_t chunk = 0;           // tokens; 0: no chunking anywhere
  std::vector<bool> is_rope_layer;  // [n_layers]
  std::vector<bool> is_chunked_layer;
  std::vector<bool> is_moe_layer;
  bool use_qk_norm = false;
  bool temperature_tuning = true;  // on layers without RoPE
  double floor_scale = 8192.0;
  double attn_scale = 0.1;
  bool tied_embeddings = false;
  std::optional<VisionConfig> vision;

  std::int64_t qkv_dim() const { return (n_heads + 2 * n_kv_heads) * head_dim; }
  // Local layers see one chunk only; their keys and values are freed at its end.
  bool is_local_layer(std::int64_t layer) const {
    return chunk > 0 && is_chunked_layer[static_cast<std::size_t>(layer)];
  }
  std::int64_t n_local_layers() const {
    std::int64_t count = 0;
    for (std::int64_t layer = 0; layer < n_layers; ++layer) count += is_local_layer(layer) ? 1 : 0;
    return count;
  }

  // Throws Error(kCheckpoint) naming the field, got and wanted.
  void check() const;
};

}  // namespace camelid
