#include "model/vision.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <utility>

#include "base/error.h"

namespace camelid {
namespace {

constexpr std::int64_t kPageTokens = 64;
// Of every layer norm, whatever the config's norm_eps says.  Source: transformers
// modeling_llama4.py, which leaves nn.LayerNorm's own.
constexpr float kNormEps = 1e-5f;

// Rotation of each row, [n_rows, head_dim / 2, 2] cos and sin: the first half of the pairs turns by
// column + 1, the second by row + 1, each with the frequencies theta^(-2i / (head_dim / 2)); the
// class token, the last row, is not turned. Source: transformers modeling_llama4.py,
// Llama4VisionRotaryEmbedding.
std::vector<float> vision_rotation(const VisionConfig& c) {
  const std::int64_t half = c.head_dim() / 2;  // pairs, and the dimensions of one direction
  std::vector<float> rotation;
  for (std::int64_t row = 0; row < c.n_rows(); ++row) {
    for (std::int64_t pair = 0; pair < half; ++pair) {
      const bool across = pair < half / 2;
      const auto i = static_cast<double>(across ? pair : pair - half / 2);
      const double frequency = std::pow(c.rope_theta, -2.0 * i / static_cast<double>(half));
      const std::int64_t at = across ? row % c.side() : row / c.side();
      const bool is_class = row == c.n_patches();
      const double angle = is_class ? 0.0 : static_cast<double>(at + 1) * frequency;
      rotation.push_back(static_cast<float>(std::cos(angle)));
      rotation.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return rotation;
}

// The rows of patches each embedding is made of, side by side: a square of shuffle x shuffle.
// Source: transformers modeling_llama4.py, pixel_shuffle.
std::vector<std::int32_t> shuffled_rows(const VisionConfig& c) {
  std::vector<std::int32_t> rows;
  const std::int64_t side = c.side() / c.shuffle;
  for (std::int64_t token = 0; token < side * side; ++token) {
    for (std::int64_t part = 0; part < c.shuffle * c.shuffle; ++part) {
      const std::int64_t y = token / side * c.shuffle + part / c.shuffle;
      const std::int64_t x = token % side * c.shuffle + part % c.shuffle;
      rows.push_back(static_cast<std::int32_t>(y * c.side() + x));
    }
  }
  return rows;
}

// Patches of one tile as rows, channel by channel, as torch.nn.Unfold lays them.
void unfold(const VisionConfig& c, const float* pixels, float* rows) {
  const std::int64_t p = c.patch_size;
  for (std::int64_t patch = 0; patch < c.n_patches(); ++patch) {
    for (std::int64_t channel = 0; channel < c.n_channels; ++channel) {
      for (std::int64_t y = 0; y < p; ++y, rows += p) {
        const std::int64_t line = channel * c.image_size + patch / c.side() * p + y;
        const float* from = pixels + line * c.image_size + patch % c.side() * p;
        std::copy(from, from + p, rows);
      }
    }
  }
}

// The same memory with other rows, as the backend wants them.
Tensor reshape(const Backend& backend, Tensor x, std::int64_t n_rows, std::int64_t dim) {
  return {x.data, n_rows, dim, backend.row_stride(dim), x.role};
}

}  // namespace

VisionTower::VisionTower(Backend& backend, const VisionConfig& config, std::int64_t text_dim,
                         KvType kv_type)
    : backend_(backend), config_(config), text_dim_(text_dim), kv_type_(kv_type) {}

void VisionTower::check_values(std::span<const float> values, std::int64_t wanted,
                               const char* name) const {
  if (static_cast<std::int64_t>(values.size()) != wanted) {
    fail(ErrorCode::kCheckpoint, "[weights] ", name, " of the vision tower has ", values.size(),
         " values, expected ", wanted, ".");
  }
  for (const float value : values) {
    if (std::isfinite(value)) continue;
    fail(ErrorCode::kCheckpoint, "[weights] ", name, " of the vision tower, after ", layers_.size(),
         " layers, holds a value that is not finite. The file is damaged; ", "download it again.");
  }
}

Buffer VisionTower::upload(std::span<const float> values, std::int64_t wanted, const char* name) {
  check_values(values, wanted, name);
  bytes_ += values.size_bytes();
  return backend_.upload(values);
}

LayerNorm VisionTower::upload_norm(const LayerNormSource& source, const char* name) {
  return {upload(source.gain, config_.dim, name), upload(source.bias, config_.dim, name)};
}

std::unique_ptr<Matrix> VisionTower::pack(std::vector<LinearSource> stack, std::int64_t out_dim,
                                          std::int64_t in_dim, WeightChoice choice,
                                          const OnPacked& on_packed) {
  for (const LinearSource& source : stack) check_shape(source, out_dim, in_dim);
  std::unique_ptr<Matrix> matrix = pack_linears(backend_, stack, choice, false, on_packed);
  bytes_ += matrix->bytes;
  return matrix;
}

void VisionTower::load_frame(const VisionFrameSources& s, WeightChoice choice,
                             const OnPacked& on_packed) {
  const VisionConfig& c = config_;
  check_values(s.class_row, c.dim, "class_embedding");
  check_values(s.positions, c.n_rows() * c.dim, "positional_embedding_vlm");
  class_row_ = s.class_row;
  positions_ = s.positions;
  bytes_ += (class_row_.size() + positions_.size()) * sizeof(float);
  norm_pre_ = upload_norm(s.norm_pre, "layernorm_pre");
  norm_post_ = upload_norm(s.norm_post, "layernorm_post");
  patch_ = pack({s.patch}, c.dim, c.patch_dim(), choice, on_packed);
  adapter_fc1_ = pack({s.adapter_fc1}, c.adapter_dim, c.shuffled_dim(), choice, on_packed);
  adapter_fc2_ = pack({s.adapter_fc2}, c.adapter_dim, c.adapter_dim, choice, on_packed);
  projector_ = pack({s.projector}, text_dim_, c.adapter_dim, choice, on_packed);
}

void VisionTower::load_layer(const VisionLayerSources& s, WeightChoice choice,
                             const OnPacked& on_packed) {
  if (layers_.size() >= static_cast<std::size_t>(config_.n_layers)) {
    fail(ErrorCode::kInternal, "[weights] a vision layer too many was loaded");
  }
  const std::int64_t dim = config_.dim;
  Layer layer;
  layer.norm1 = upload_norm(s.norm1, "input_layernorm");
  layer.norm2 = upload_norm(s.norm2, "post_attention_layernorm");
  layer.qkv = {pack({s.q, s.k, s.v}, dim, dim, choice, on_packed),
               upload(s.qkv_bias, 3 * dim, "q, k, v bias")};
  layer.o = {pack({s.o}, dim, dim, choice, on_packed), upload(s.o_bias, dim, "o_proj.bias")};
  layer.fc1 = {pack({s.fc1}, config_.ffn_dim, dim, choice, on_packed),
               upload(s.fc1_bias, config_.ffn_dim, "fc1.bias")};
  layer.fc2 = {pack({s.fc2}, dim, config_.ffn_dim, choice, on_packed),
               upload(s.fc2_bias, dim, "fc2.bias")};
  layers_.push_back(std::move(layer));
}

void VisionTower::check_complete() const {
  if (projector_ && layers_.size() == static_cast<std::size_t>(config_.n_layers)) return;
  fail(ErrorCode::kInternal,
       "[weights] the vision tower is used before it is loaded: ", layers_.size(), " of ",
       config_.n_layers, " layers");
}

std::size_t VisionTower::workspace_bytes() const {
  const VisionConfig& c = config_;
  const std::int64_t on_host = c.n_patches() * c.patch_dim() + c.n_rows() * c.dim;
  return rows_bytes() + tile_pages().page_bytes * static_cast<std::size_t>(n_pages()) +
         static_cast<std::size_t>(on_host) * sizeof(float);
}

// Lays out all rows from `base` on and says how many bytes they take.
VisionTower::Rows VisionTower::place_rows_at(std::byte* base, std::size_t& bytes) const {
  bytes = 0;
  const auto take = [&](std::int64_t n_rows, std::int64_t dim, Role role) {
    const std::int64_t stride = backend_.row_stride(dim);
    const Tensor tensor{base == nullptr ? nullptr : base + bytes, n_rows, dim, stride, role};
    constexpr std::size_t kAlignment = 64;
    const std::size_t taken =
        static_cast<std::size_t>(n_rows * stride) * backend_.element_bytes(role);
    bytes += (taken + kAlignment - 1) / kAlignment * kAlignment;
    return tensor;
  };
  const VisionConfig& c = config_;
  Rows rows;
  rows.x = take(c.n_rows(), c.dim, Role::kSum);
  rows.h = take(c.n_rows(), c.dim, Role::kOperand);
  rows.qkv = take(c.n_rows(), 3 * c.dim, Role::kSum);
  rows.attended = take(c.n_rows(), c.dim, Role::kOperand);
  rows.wide = take(c.n_rows(), std::max(c.ffn_dim, c.patch_dim()), Role::kOperand);
  rows.shuffled = take(c.tokens_per_tile(), c.shuffled_dim(), Role::kOperand);
  rows.first = take(c.tokens_per_tile(), c.adapter_dim, Role::kOperand);
  rows.second = take(c.tokens_per_tile(), c.adapter_dim, Role::kOperand);
  rows.projected = take(c.tokens_per_tile(), text_dim_, Role::kSum);
  return rows;
}

std::size_t VisionTower::rows_bytes() const {
  std::size_t bytes = 0;
  place_rows_at(nullptr, bytes);
  return bytes;
}

// Keys and values of one tile and layer in pages of their own, used again by every layer.
KvPages VisionTower::tile_pages() const {
  KvPages pages{nullptr, 0, kPageTokens, 1, config_.n_heads, config_.head_dim(), kv_type_};
  pages.page_bytes = backend_.page_bytes(pages);
  return pages;
}

std::int64_t VisionTower::n_pages() const {
  return (config_.n_rows() + kPageTokens - 1) / kPageTokens;
}

void VisionTower::plan_tile() {
  KvPlan& plan = plan_.global;
  KvPages& pages = plan.pages;
  pages = tile_pages();
  plan.n_heads = config_.n_heads;
  plan.causal = false;
  pages_ = backend_.allocate(pages.page_bytes * static_cast<std::size_t>(n_pages()));
  pages.base = pages_.data.get();
  page_table_.resize(static_cast<std::size_t>(n_pages()));
  std::iota(page_table_.begin(), page_table_.end(), 0);
  plan.spans = {{0, config_.n_rows(), 0, page_table_.data()}};
  plan.rotation = vision_rotation(config_);
  shuffled_rows_ = shuffled_rows(config_);
  plan_.rows = shuffled_rows_;
}

VisionTower::Rows VisionTower::place_rows() {
  if (rows_.bytes == 0) rows_ = backend_.allocate(rows_bytes());
  std::size_t bytes = 0;
  return place_rows_at(static_cast<std::byte*>(rows_.data.get()), bytes);
}

// x = norm_pre([patches w; class] + positions).
void VisionTower::embed(const Rows& rows, const float* pixels) {
  const VisionConfig& c = config_;
  host_rows_.resize(static_cast<std::size_t>(c.n_patches() * c.patch_dim()));
  unfold(c, pixels, host_rows_.data());
  const Tensor patches = reshape(backend_, rows.wide, c.n_patches(), c.patch_dim());
  backend_.upload_rows(patches, host_rows_.data());
  // The class token and the positions first, then the patches are added to them.
  start_ = positions_;
  for (std::int64_t i = 0; i < c.dim; ++i) {
    start_[static_cast<std::size_t>(c.n_patches() * c.dim + i)] +=
        class_row_[static_cast<std::size_t>(i)];
  }
  backend_.upload_rows(rows.x, start_.data());
  const Tensor of_patches = reshape(backend_, rows.x, c.n_patches(), c.dim);
  backend_.matmul_add(of_patches, patches, *patch_, {});
  backend_.layer_norm(rows.x, rows.x, norm_pre_.gain, norm_pre_.bias, kNormEps);
}

void VisionTower::run_layer(const Rows& rows, const Layer& layer) {
  AttentionLayer attention;
  attention.rotate = true;
  attention.eps = kNormEps;
  backend_.layer_norm(rows.h, rows.x, layer.norm1.gain, layer.norm1.bias, kNormEps);
  backend_.matmul(rows.qkv, rows.h, *layer.qkv.w);
  backend_.add_bias(rows.qkv, layer.qkv.bias);
  backend_.store_kv(rows.qkv, attention);
  backend_.attend(rows.attended, rows.qkv, attention);
  backend_.matmul_add(rows.x, rows.attended, *layer.o.w, {});
  backend_.add_bias(rows.x, layer.o.bias);

  const Tensor wide = reshape(backend_, rows.wide, config_.n_rows(), config_.ffn_dim);
  backend_.layer_norm(rows.h, rows.x, layer.norm2.gain, layer.norm2.bias, kNormEps);
  backend_.matmul(wide, rows.h, *layer.fc1.w);
  backend_.add_bias(wide, layer.fc1.bias);
  backend_.gelu(wide);
  backend_.matmul_add(rows.x, wide, *layer.fc2.w, {});
  backend_.add_bias(rows.x, layer.fc2.bias);
}

// Squares of patches side by side, the adapter's MLP with GELU after both maps, the projector.
void VisionTower::adapt(const Rows& rows) {
  const VisionConfig& c = config_;
  backend_.layer_norm(rows.x, rows.x, norm_post_.gain, norm_post_.bias, kNormEps);
  // The parts of a square, one after the other: as many rows of the patches' width.
  backend_.select_rows({rows.shuffled.data, c.n_patches(), c.dim, c.dim, Role::kOperand}, rows.x);
  backend_.matmul(rows.first, rows.shuffled, *adapter_fc1_);
  backend_.gelu(rows.first);
  backend_.matmul(rows.second, rows.first, *adapter_fc2_);
  backend_.gelu(rows.second);
  backend_.matmul(rows.projected, rows.second, *projector_);
}

void VisionTower::encode(std::span<const float> pixels, float* out) {
  check_complete();
  if (pages_.bytes == 0) plan_tile();
  const Rows rows = place_rows();
  const auto of_tile = static_cast<std::size_t>(config_.pixels_per_tile());
  for (std::size_t at = 0; at + of_tile <= pixels.size(); at += of_tile) {
    run_step(backend_, plan_, [&] {
      embed(rows, pixels.data() + at);
      for (const Layer& layer : layers_) run_layer(rows, layer);
      adapt(rows);
    });
    backend_.download(out, rows.projected);
    out += config_.tokens_per_tile() * text_dim_;
  }
}

}  // namespace camelid
