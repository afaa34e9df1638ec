// Which launches make up the feed-forward half of a layer, and what goes between them.
#include "host/feed_forward.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "ops/matmul_plain.h"

namespace camelid::cuda {
namespace {

const Segment& only_segment(const Matrix& matrix) {
  return static_cast<const DeviceMatrix&>(matrix).segments.front();
}

bool is_alike(const TileShape& a, const TileShape& b) {
  return a.rows == b.rows && a.inputs == b.inputs && a.entries == b.entries && a.bits == b.bits &&
         a.scales == b.scales && a.order == b.order;
}

// Whether one launch may take both matrices as groups.
bool is_alike(const Matrix& a, const Matrix& b) {
  const Segment &x = only_segment(a), &y = only_segment(b);
  if (x.is_tiled != y.is_tiled) return false;
  return x.is_tiled ? is_alike(x.tiled.shape, y.tiled.shape)
                    : x.plain.rows == y.plain.rows && x.plain.inputs == y.plain.inputs;
}
bool is_alike(const Mlp& a, const Mlp& b) {
  return is_alike(*a.gate_up, *b.gate_up) && is_alike(*a.down, *b.down);
}

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

// Group 0 is the shared expert where has_shared, expert e the group after it or group e.
struct FeedForward::Prepared {
  // The matrices of all groups, which are alike.
  struct Side {
    Segment like;
    DeviceMemory groups;  // TilePointers, or pointers to plain rows
  };
  bool has_shared = false;  // among the groups; else it is a matrix of another kind, by itself
  bool one_launch = false;  // experts_few takes them
  std::int32_t n_experts = 0;
  std::int32_t top_k = 1;
  std::int64_t dim = 0, ffn_dim = 0;
  Side gate_up, down;
  ExpertWeights few;

  RouteShape route_shape(std::int64_t n_tokens) const {
    return {static_cast<std::int32_t>(n_tokens), n_experts, top_k, has_shared};
  }
};

namespace {

// A table of what get(mlp) says of each group.
template <class T, class Get>
DeviceMemory upload_table(const std::vector<const Mlp*>& groups, Uploader& uploader,
                          const Get& get) {
  std::vector<T> table;
  for (const Mlp* mlp : groups) table.push_back(get(*mlp));
  const std::size_t bytes = table.size() * sizeof(T);
  DeviceMemory memory = allocate_device(bytes);
  uploader.copy(memory.get(), table.data(), bytes);
  return memory;
}

DeviceMemory upload_pointers(const std::vector<const Mlp*>& groups, bool is_down,
                             Uploader& uploader) {
  const auto segment = [=](const Mlp& mlp) -> const Segment& {
    return only_segment(is_down ? *mlp.down : *mlp.gate_up);
  };
  if (segment(*groups.front()).is_tiled) {
    return upload_table<TilePointers>(groups, uploader,
                                      [&](const Mlp& mlp) { return segment(mlp).tiled.at; });
  }
  return upload_table<const std::uint16_t*>(groups, uploader,
                                            [&](const Mlp& mlp) { return segment(mlp).plain.at; });
}

void check_experts(const Experts& w) {
  const auto n_experts = static_cast<std::int64_t>(w.routed.size());
  if (n_experts > kMaxExperts || w.top_k > kMaxTopK) {
    fail(ErrorCode::kUnsupported, "[cuda] ", n_experts, " experts, of which ", w.top_k,
         " for each token; a GPU takes up to ", kMaxExperts, " and ", kMaxTopK,
         ". Use device=\"cpu\".");
  }
  for (const Mlp& mlp : w.routed) {
    if (is_alike(mlp, w.routed.front())) continue;
    fail(ErrorCode::kUnsupported, "[cuda] the experts of a layer are held in different formats or ",
         "group sizes; a GPU takes one for all of them. Use device=\"cpu\".");
  }
}

}  // namespace

void FeedForward::prepare(Experts& w, Uploader& uploader) {
  check_experts(w);
  auto prepared = std::make_shared<Prepared>();
  Prepared& p = *prepared;
  const Mlp& first = w.routed.front();
  p.has_shared = is_alike(w.shared, first);
  p.n_experts = static_cast<std::int32_t>(w.routed.size());
  p.top_k = static_cast<std::int32_t>(w.top_k);
  p.dim = first.down->out_dim;
  p.ffn_dim = first.down->in_dim;
  std::vector<const Mlp*> groups;
  if (p.has_shared) groups.push_back(&w.shared);
  for (const Mlp& mlp : w.routed) groups.push_back(&mlp);
  p.gate_up = {only_segment(*first.gate_up), upload_pointers(groups, false, uploader)};
  p.down = {only_segment(*first.down), upload_pointers(groups, true, uploader)};

  const Segment& router = only_segment(*w.router);
  const Segment &up = p.gate_up.like, &down = p.down.like;
  p.one_launch = up.is_tiled && down.is_tiled && !router.is_tiled &&
                 up.tiled.shape.bits == down.tiled.shape.bits &&
                 up.tiled.shape.scales == down.tiled.shape.scales;
  if (p.one_launch) {
    ExpertWeights& few = p.few;
    const int shared = p.has_shared ? 1 : 0;
    few.router = router.plain.at;
    few.router_stride = router.plain.stride;
    few.gate_up = reinterpret_cast<const TilePointers*>(p.gate_up.groups.get()) + shared;
    few.down = reinterpret_cast<const TilePointers*>(p.down.groups.get()) + shared;
    few.gate_up_shape = up.tiled.shape;
    few.down_shape = down.tiled.shape;
    if (p.has_shared) {
      few.shared_gate_up = only_segment(*w.shared.gate_up).tiled;
      few.shared_down = only_segment(*w.shared.down).tiled;
    }
    few.n_experts = p.n_experts;
    few.top_k = p.top_k;
    const int most = experts_few_limit(few);
    products_.workspace(experts_few_needs(few, most));
    scratch_.at_least(experts_few_scratch_bytes(few, most));
  }
  w.prepared = prepared;
  layers_.push_back(prepared);
}

void FeedForward::expect(const DeviceMatrix& gate_up) {
  widest_mlp_ = std::max(widest_mlp_, gate_up.out_dim / 2);
  norms_.prepare(kMostFewTokens, gate_up.in_dim);
}

void FeedForward::prepare_steps(std::int64_t n_tokens) {
  if (widest_mlp_ > 0) activations(n_tokens, widest_mlp_);
  for (const auto& layer : layers_) {
    const Visits visits = place_visits(n_tokens, *layer);
    activations(visits.shape.n_visits(), layer->ffn_dim);
    if (layer->top_k > 1) visit_rows(visits, round_up(layer->dim, 8));
  }
}

std::size_t FeedForward::bytes() const {
  std::size_t bytes = 0;
  for (const GrowingMemory* each : {&act_, &logits_, &routes_, &rows_, &scratch_}) {
    bytes += each->bytes();
  }
  return bytes;
}

Tensor FeedForward::activations(std::int64_t n_rows, std::int64_t dim) {
  const std::int64_t stride = round_up(dim, 8);
  const auto bytes = static_cast<std::size_t>(n_rows * stride) * sizeof(std::uint16_t);
  return {act_.at_least(bytes), n_rows, dim, stride, Role::kOperand};
}

void FeedForward::mlp(const Tensor& y, const Tensor& x, const Mlp& w, const Norm& then) {
  const Tensor act = activations(x.n_rows, w.down->in_dim);
  products_.multiply_gated(act, x, static_cast<const DeviceMatrix&>(*w.gate_up));
  products_.multiply_add(y, act, static_cast<const DeviceMatrix&>(*w.down), then);
}

void FeedForward::run_few(const Tensor& y, const Tensor& x, const Prepared& prepared,
                          const Norm& then) {
  ExpertsFew call;
  call.w = prepared.few;
  call.x = static_cast<const std::uint16_t*>(x.data);
  call.n_tokens = static_cast<std::int32_t>(x.n_rows);
  call.x_stride = static_cast<std::int32_t>(x.row_stride);
  call.y = static_cast<float*>(y.data);
  call.y_stride = static_cast<std::int32_t>(y.row_stride);
  call.scratch = scratch_.at_least(experts_few_scratch_bytes(call.w, call.n_tokens));
  call.norm_of_x = norms_.end(x);
  const bool begins = then.gain != nullptr && prepared.top_k == 1;
  if (begins) call.norm_of_y = norms_.begin(then, y);
  experts_few(call, products_.workspace(experts_few_needs(call.w, call.n_tokens)), gpu_.stream);
  if (!begins) norms_.run(then, y);
}

FeedForward::Visits FeedForward::place_visits(std::int64_t n_tokens, const Prepared& prepared) {
  Visits visits;
  visits.shape = prepared.route_shape(n_tokens);
  visits.routes = routes_in(visits.shape, routes_.at_least(routes_bytes(visits.shape)));
  const std::int64_t n_experts = prepared.n_experts;
  const auto n_logits = static_cast<std::size_t>(n_tokens * n_experts);
  std::byte* at = logits_.at_least(n_logits * sizeof(float));
  visits.logits = {at, n_tokens, n_experts, n_experts, Role::kSum};
  return visits;
}

float* FeedForward::visit_rows(const Visits& visits, std::int64_t stride) {
  const auto n_values = static_cast<std::size_t>(visits.shape.n_visits() * stride);
  return reinterpret_cast<float*>(rows_.at_least(n_values * sizeof(float)));
}

FeedForward::Visits FeedForward::route(const Tensor& x, const Experts& w,
                                       const Prepared& prepared) {
  const Visits visits = place_visits(x.n_rows, prepared);
  products_.multiply(visits.logits, x, static_cast<const DeviceMatrix&>(*w.router));
  route_many(visits.shape, static_cast<const float*>(visits.logits.data), visits.routes,
             gpu_.stream);
  return visits;
}

void FeedForward::multiply(const Segment& like, const DeviceMemory& groups,
                           GroupedProduct product) {
  if (like.is_tiled) {
    product.shape = like.tiled.shape;
    product.groups = reinterpret_cast<const TilePointers*>(groups.get());
    grouped_many(gpu_, product);
    return;
  }
  MatmulPlain plain;
  plain.rows = like.plain.rows;
  plain.inputs = like.plain.inputs;
  plain.w_stride = like.plain.stride;
  plain.groups = reinterpret_cast<const std::uint16_t* const*>(groups.get());
  plain.n_tokens = product.n_visits;
  plain.x = product.x;
  plain.x_stride = static_cast<std::int32_t>(product.x_stride);
  plain.x_rows = product.x_rows;
  plain.y = product.y;
  plain.y_stride = static_cast<std::int32_t>(product.y_stride);
  plain.y_rows = product.y_rows;
  plain.factors = product.factors;
  plain.output = product.output;
  plain.tiles = product.tiles;
  plain.first_tile = product.first_tile;
  plain.last_tile = product.last_tile;
  matmul_plain(plain, gpu_.stream);
}

void FeedForward::run_visits(const Tensor& y, const Tensor& x, const Prepared& p,
                             const Visits& visits) {
  const Routes& routes = visits.routes;
  const Tensor act = activations(visits.shape.n_visits(), p.ffn_dim);
  GroupedProduct up;
  up.n_visits = static_cast<std::int32_t>(visits.shape.n_visits());
  up.tiles = routes.tiles;
  up.first_tile = routes.tile_ends;
  up.last_tile = routes.tile_ends + 2;
  GroupedProduct down = up;
  up.x = static_cast<const std::uint16_t*>(x.data);
  up.x_stride = x.row_stride;
  up.x_rows = routes.token;
  up.y = act.data;
  up.y_stride = act.row_stride;
  up.factors = routes.factor;
  up.output = Output::kSwiGlu;
  multiply(p.gate_up.like, p.gate_up.groups, up);

  const auto multiply_down = [&] { multiply(p.down.like, p.down.groups, down); };
  down.x = static_cast<const std::uint16_t*>(act.data);
  down.x_stride = act.row_stride;
  down.y_stride = y.row_stride;
  if (p.top_k > 1) {
    down.y = visit_rows(visits, y.row_stride);
    down.output = Output::kStore;
    multiply_down();
    combine(y, visits);
    return;
  }
  // A token's row has one visit of the shared expert, and one of another.
  down.y = y.data;
  down.y_rows = routes.token;
  down.output = Output::kAdd;
  down.last_tile = routes.tile_ends + 1;
  if (p.has_shared) multiply_down();
  down.first_tile = routes.tile_ends + 1;
  down.last_tile = routes.tile_ends + 2;
  multiply_down();
}

void FeedForward::combine(const Tensor& y, const Visits& visits) {
  CombineRows call;
  call.rows = reinterpret_cast<const float*>(rows_.get());
  call.rows_stride = y.row_stride;
  call.y = static_cast<float*>(y.data);
  call.y_stride = y.row_stride;
  call.dim = static_cast<std::int32_t>(round_up(y.dim, 4));  // the rest is padding of both
  combine_rows(visits.shape, visits.routes, call, gpu_.stream);
}

void FeedForward::experts(const Tensor& y, const Tensor& x, const Experts& w, const Norm& then) {
  const auto& prepared = *static_cast<const Prepared*>(w.prepared.get());
  // Of int8 or weights with zero points that is up to 32 tokens; from 33 on, grouped products.
  const bool are_few = prepared.one_launch && x.n_rows <= experts_few_limit(prepared.few);
  if (!are_few) norms_.finish(x);  // before y, of which it is the norm, changes
  if (!prepared.has_shared) mlp(y, x, w.shared, {});
  if (are_few) {
    run_few(y, x, prepared, then);
    return;
  }
  run_visits(y, x, prepared, route(x, w, prepared));
  norms_.run(then, y);
}

}  // namespace camelid::cuda
