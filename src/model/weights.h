// The packed weights of one model, filled layer by layer so that a checkpoint never has to be in
// memory twice. Decides which format each role is held in; knows nothing of files.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"
#include "quant/format.h"

namespace camelid {

struct LayerWeights {
  Buffer input_norm;               // [dim]
  Buffer post_norm;                // [dim]
  std::unique_ptr<Matrix> qkv;     // [(n_heads + 2 n_kv_heads) * head_dim, dim]: q over k over v
  std::unique_ptr<Matrix> o;       // [dim, n_heads * head_dim]
  std::optional<Experts> experts;  // a MoE layer has these,
  std::optional<Mlp> dense;        // a dense one this
};

// The parts of a feed-forward block as the checkpoint names them.
struct MlpSources {
  LinearSource gate, up, down;
};

struct LayerSources {
  std::vector<float> input_norm, post_norm;
  LinearSource q, k, v, o;
  std::optional<LinearSource> router;
  std::vector<MlpSources> experts;
  std::optional<MlpSources> shared;
  std::optional<MlpSources> dense;
};

// What `weights=` asks for.
enum class WeightChoice { kAsStored, kBf16, kInt8, kInt4 };
struct WeightOptions {
  WeightChoice body = WeightChoice::kAsStored;
  bool int8_head = false;  // a head that is stored plain is held as int8
};
WeightChoice weight_choice_from_name(const std::string& name);

// Called with a source's name once it is packed: its mapped pages may go.
using OnPacked = std::function<void(const std::string& name)>;

// Packs linears that share an input, each as `choice` or as it is stored.
std::unique_ptr<Matrix> pack_linears(Backend& backend, std::span<const LinearSource> stack,
                                     WeightChoice choice, bool precise, const OnPacked& on_packed,
                                     Stack kind = Stack::kPlain);
// Throws kCheckpoint unless a source has this shape.
void check_shape(const LinearSource& source, std::int64_t out_dim, std::int64_t in_dim);

class Weights {
 public:
  Weights(Backend& backend, const ModelConfig& config, WeightOptions options, OnPacked on_packed);

  void load_embedding(const LinearSource& source);
  void load_layer(const LayerSources& sources);  // the next one, in order
  // `head` is absent when the config ties it to the embedding.
  void load_head(std::span<const float> final_norm, const std::optional<LinearSource>& head);
  // Throws kCheckpoint unless every part is loaded.
  void check_complete() const;

  const Matrix& embedding() const { return *embedding_; }
  const Matrix& head() const { return head_ ? *head_ : *embedding_; }
  const Buffer& final_norm() const { return final_norm_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  // For what is never quantised here: the embedding, the routers, the vision tower.
  WeightChoice plain_choice() const;
  const OnPacked& on_packed() const { return on_packed_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<Matrix> pack(std::vector<LinearSource> stack, WeightChoice choice,
                               bool precise = false, Stack kind = Stack::kPlain);
  Mlp pack_mlp(const MlpSources& sources, std::int64_t ffn_dim);
  Buffer upload_norm(std::span<const float> values, const char* name);

  Backend& backend_;
  const ModelConfig& config_;
  WeightOptions options_;
  OnPacked on_packed_;
  std::unique_ptr<Matrix> embedding_;
  std::unique_ptr<Matrix> head_;
  Buffer final_norm_;
  std::vector<LayerWeights> layers_;
  std::size_t bytes_ = 0;
};

}  // namespace camelid
