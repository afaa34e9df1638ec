// The vision tower: pixels of square tiles to embeddings that stand where patch tokens do. Weights,
// loaded part by part like the text model's, and the forward pass on the same backend. Knows
// nothing of files, images or prompts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "model/weights.h"

namespace camelid {

// A layer norm as the checkpoint holds it, and on the backend.
struct LayerNormSource {
  std::vector<float> gain, bias;
};
struct LayerNorm {
  Buffer gain, bias;  // [dim]
};

// Linears that share an input, and the biases under each other; empty where there are none.
struct BiasedLinear {
  std::unique_ptr<Matrix> w;
  Buffer bias;  // [out_dim]
};

struct VisionLayerSources {
  LayerNormSource norm1, norm2;
  LinearSource q, k, v, o, fc1, fc2;
  std::vector<float> qkv_bias, o_bias, fc1_bias, fc2_bias;  // q over k over v
};

// What lies before and after the encoder layers.
struct VisionFrameSources {
  LinearSource patch;            // [dim, channels * patch_size^2]
  std::vector<float> class_row;  // [dim]
  std::vector<float> positions;  // [n_rows, dim]
  LayerNormSource norm_pre, norm_post;
  LinearSource adapter_fc1, adapter_fc2, projector;  // without biases
};

class VisionTower {
 public:
  // `text_dim`: of the embeddings that come out. `kv_type`: keys and values of a tile.
  VisionTower(Backend& backend, const VisionConfig& config, std::int64_t text_dim, KvType kv_type);

  void load_frame(const VisionFrameSources& sources, WeightChoice choice,
                  const OnPacked& on_packed);
  void load_layer(const VisionLayerSources& sources, WeightChoice choice,
                  const OnPacked& on_packed);  // the next one, in order
  void check_complete() const;                 // throws kInternal
  std::size_t bytes() const { return bytes_; }
  // What encoding a tile takes beside the weights: its rows, keys and values, on the backend and on
  // the host.
  std::size_t workspace_bytes() const;
  const VisionConfig& config() const { return config_; }

  // pixels: [n_tiles, channels, image_size, image_size], -1 to 1; out: [n_tiles * tokens_per_tile,
  // text_dim] float32. A tile's result does not depend on the others.
  void encode(std::span<const float> pixels, float* out);

 private:
  struct Layer {
    LayerNorm norm1, norm2;
    BiasedLinear qkv, o, fc1, fc2;
  };
  struct Rows {
    Tensor x, h, qkv, attended, wide, shuffled, first, second, projected;
  };
  LayerNorm upload_norm(const LayerNormSource& source, const char* name);
  void check_values(std::span<const float> values, std::int64_t wanted, const char* name) const;
  Buffer upload(std::span<const float> values, std::int64_t wanted, const char* name);
  std::unique_ptr<Matrix> pack(std::vector<LinearSource> stack, std::int64_t out_dim,
                               std::int64_t in_dim, WeightChoice choice, const OnPacked& on_packed);
  KvPages tile_pages() const;
  std::int64_t n_pages() const;
  std::size_t rows_bytes() const;
  Rows place_rows_at(std::byte* base, std::size_t& bytes) const;
  void plan_tile();
  Rows place_rows();
  void embed(const Rows& rows, const float* pixels);
  void run_layer(const Rows& rows, const Layer& layer);
  void adapt(const Rows& rows);

  Backend& backend_;
  VisionConfig config_;
  std::int64_t text_dim_;
  std::unique_ptr<Matrix> patch_, adapter_fc1_, adapter_fc2_, projector_;
  std::vector<float> class_row_, positions_;  // on the host: added before rows go to the backend
  LayerNorm norm_pre_, norm_post_;
  std::vector<Layer> layers_;
  std::size_t bytes_ = 0;
  // One tile at a time is enough rows for every product, and bounds the memory of large images.
  StepPlan plan_;
  KvType kv_type_;
  std::vector<std::int32_t> page_table_;
  std::vector<std::int32_t> shuffled_rows_;  // the plan's rows
  Buffer pages_, rows_;
  std::vector<float> host_rows_, start_;  // [n_patches, patch_dim] and [n_rows, dim]
};

}  // namespace camelid
