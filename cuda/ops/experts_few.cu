// One launch, whose blocks all run at once and meet twice. The lists of work between the meetings:
//
//   router logits, shared gate and up | shared down, routed gate and up | routed down
//
// While a block waits, the weights of its next units are on their way: those of the shared expert
// depend on nothing, those of the routed ones on the router alone.
#include "ops/experts_few.h"

#include <algorithm>

#include "device/routing.cuh"
#include "device/stream.cuh"
#include "ops/stream_launch.cuh"

namespace camelid::cuda {
namespace {

enum : int { kSharedUp, kSharedDown, kRoutedUp, kRoutedDown, kLists };

// What the blocks exchange through device memory.
struct Scratch {
  float* logits;              // [n_tokens][n_experts]
  std::uint16_t* shared_act;  // bf16 [n_tokens][shared_stride]
  std::uint16_t* routed_act;  // bf16 [n_visits][routed_stride]
  float* out;                 // [n_visits][dim], where top_k is above 1
  std::int32_t shared_stride, routed_stride;
};

constexpr int kRouterTokens = 4;  // that share a read of a router row

struct Header : StreamHeader {
  List lists[kLists];
  Routing routing;
  int all_tokens[2];
  float router_sums[kStreamWarps][kRouterTokens];
};

// Products of 8 inputs from `input` on, fewer at the end of a row, in their order.
__device__ float dot8(const std::uint16_t* a, const std::uint16_t* b, int input, int dim) {
  const auto x = *reinterpret_cast<const uint4*>(a + input);
  const auto w = *reinterpret_cast<const uint4*>(b + input);
  const std::uint32_t x_pairs[4] = {x.x, x.y, x.z, x.w}, w_pairs[4] = {w.x, w.y, w.z, w.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (input + 2 * i < dim) sum += low_bf16(x_pairs[i]) * low_bf16(w_pairs[i]);
    if (input + 2 * i + 1 < dim) sum += high_bf16(x_pairs[i]) * high_bf16(w_pairs[i]);
  }
  return sum;
}

// Logits of the router: a block takes an expert and four tokens, its warps every eighth piece of
// the inputs. Each logit is summed in the same order whatever the other tokens are.
__device__ void run_router(const ExpertsFew& call, float* logits, Header& header) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int dim = call.w.gate_up_shape.inputs;
  const int n_pieces = divide_up(call.n_tokens, kRouterTokens);
  for (int job = block_index(); job < call.w.n_experts * n_pieces; job += grid_size()) {
    const int expert = job / n_pieces, first = job % n_pieces * kRouterTokens;
    const std::uint16_t* row = call.w.router + std::int64_t{expert} * call.w.router_stride;
    float sums[kRouterTokens] = {};
    for (int input = thread_index() * 8; input < dim; input += kStreamThreads * 8) {
#pragma unroll
      for (int i = 0; i < kRouterTokens; ++i) {
        if (first + i >= call.n_tokens) break;
        sums[i] += dot8(call.x + std::int64_t{first + i} * call.x_stride, row, input, dim);
      }
    }
#pragma unroll
    for (int i = 0; i < kRouterTokens; ++i) {
      for (int mask = kWarp / 2; mask > 0; mask /= 2) sums[i] += shuffle_xor(sums[i], mask);
      if (lane == 0) header.router_sums[warp][i] = sums[i];
    }
    sync_block();
    if (thread_index() < kRouterTokens && first + thread_index() < call.n_tokens) {
      float sum = 0.0f;
      for (int w = 0; w < kStreamWarps; ++w) sum += header.router_sums[w][thread_index()];
      const int token = first + thread_index();
      logits[std::int64_t{token} * call.w.n_experts + expert] = sum * header.factors[token];
    }
    sync_block();
  }
}

__device__ List list_of(const ExpertsFew& call, const TileShape& shape, Output output) {
  List list = {};
  list.shape = shape;
  list.output = output;
  list.x = call.x;
  list.x_stride = call.x_stride;
  list.y = call.y;
  list.y_stride = call.y_stride;
  return list;
}

__device__ void set_shared_lists(Header& header, const ExpertsFew& call, const Scratch& scratch) {
  header.all_tokens[0] = 0;
  header.all_tokens[1] = call.n_tokens;
  const bool is_there = call.w.shared_gate_up.shape.rows > 0;
  List& up = header.lists[kSharedUp];
  up = list_of(call, call.w.shared_gate_up.shape, Output::kSwiGlu);
  up.table = &call.w.shared_gate_up.at;
  up.starts = header.all_tokens;
  up.factors = header.factors;
  up.y = scratch.shared_act;
  up.y_stride = scratch.shared_stride;
  up.n_tasks = is_there ? 1 : 0;
  deal_list(up);
  List& down = header.lists[kSharedDown];
  down = list_of(call, call.w.shared_down.shape, Output::kAdd);
  down.table = &call.w.shared_down.at;
  down.starts = header.all_tokens;
  down.x = scratch.shared_act;
  down.x_stride = scratch.shared_stride;
  down.n_tasks = up.n_tasks;
  down.first_result = up.n_row_blocks;
  deal_list(down);
}

__device__ void set_routed_lists(Header& header, const ExpertsFew& call, const Scratch& scratch) {
  Routing& routing = header.routing;
  const List& shared = header.lists[kSharedDown];
  List& up = header.lists[kRoutedUp];
  up = list_of(call, call.w.gate_up_shape, Output::kSwiGlu);
  up.table = call.w.gate_up;
  up.matrices = routing.hit;
  up.starts = routing.starts;
  up.gather = routing.token;
  up.factors = routing.factor;
  up.y = scratch.routed_act;
  up.y_stride = scratch.routed_stride;
  up.n_tasks = routing.n_hit;
  up.first_result = shared.first_result + shared.n_row_blocks;
  deal_list(up);
  List& down = header.lists[kRoutedDown];
  const bool one_visit = call.w.top_k == 1;
  down = list_of(call, call.w.down_shape, one_visit ? Output::kAdd : Output::kStore);
  down.table = call.w.down;
  down.matrices = routing.hit;
  down.starts = routing.starts;
  down.x = scratch.routed_act;
  down.x_stride = scratch.routed_stride;
  if (one_visit) {
    down.scatter = routing.token;
    down.norm = call.norm_of_y;  // all else that y is has been added
  } else {
    down.y = scratch.out;
    down.y_stride = call.w.down_shape.rows;
  }
  down.n_tasks = routing.n_hit;
  down.first_result = up.first_result + routing.n_hit * up.n_row_blocks;
  deal_list(down);
}

// y of each token plus what its visits gave, in the order of experts.
__device__ void add_visits(const ExpertsFew& call, const Routing& routing, const Scratch& scratch) {
  const int dim = call.w.down_shape.rows, top_k = call.w.top_k;
  const std::int64_t n = std::int64_t{call.n_tokens} * dim;
  for (std::int64_t i = std::int64_t{block_index()} * block_size() + thread_index(); i < n;
       i += std::int64_t{grid_size()} * block_size()) {
    const int token = static_cast<int>(i / dim), column = static_cast<int>(i % dim);
    float sum = 0.0f;
    for (int j = 0, last = -1; j < top_k; ++j) {
      int next = kMaxRoutedVisits;
      for (int k = 0; k < top_k; ++k) {
        const int visit = routing.place[token * top_k + k];
        if (visit > last && visit < next) next = visit;
      }
      sum += load_shared_by_blocks(scratch.out + std::int64_t{next} * dim + column);
      last = next;
    }
    float* y = call.y + std::int64_t{token} * call.y_stride + column;
    *y = load_shared_by_blocks(y) + sum;
  }
}

template <class Shape>
__global__ void __launch_bounds__(kStreamThreads, Shape::kBlocks)
    run_experts_few(const __grid_constant__ ExpertsFew call, const Scratch scratch,
                    const Parts parts, unsigned* barrier) {
  auto& header = *reinterpret_cast<Header*>(shared_memory());
  if (thread_index() == 0) set_shared_lists(header, call, scratch);
  sync_block();
  Stream<Shape, Header> stream(parts);
  stream.prefetch(kRoutedUp);
  wait_for_previous_kernel();
  let_next_kernel_start();
  find_norm_factors(call.norm_of_x, call.n_tokens, header.factors);
  run_router(call, scratch.logits, header);
  // A loop, so that the stream is compiled once: three copies of it would spill registers.
#pragma unroll 1
  for (int phase = 0; phase < 3; ++phase) {
    if (phase > 0) sync_grid(barrier);
    if (phase == 1) {
      route(header.routing, scratch.logits, call.n_tokens, call.w.n_experts, call.w.top_k);
      for (int i = thread_index(); i < call.n_tokens * call.w.top_k; i += kStreamThreads) {
        header.routing.factor[i] *= header.factors[header.routing.token[i]];
      }
      if (thread_index() == 0) set_routed_lists(header, call, scratch);
      sync_block();
    }
    const int end = phase == 0 ? kSharedDown : phase == 1 ? kRoutedDown : kLists;
    stream.run(end, phase == 0 ? kRoutedUp : kLists);
  }
  if (call.w.top_k > 1) {
    sync_grid(barrier);
    add_visits(call, header.routing, scratch);
  }
}

// ---- the host's side ----

std::size_t round_up(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// Rows of activations are aligned to 16 bytes; what is past their end is never read.
std::int32_t act_stride(const TileShape& down) { return divide_up(down.inputs, 8) * 8; }

// Lays the scratch out at `base`; returns where it ends.
std::size_t lay_out(const ExpertWeights& w, int n_tokens, std::byte* base, Scratch& scratch) {
  const auto tokens = static_cast<std::size_t>(n_tokens);
  const std::size_t visits = tokens * static_cast<std::size_t>(w.top_k);
  scratch.shared_stride = act_stride(w.shared_down.shape);
  scratch.routed_stride = act_stride(w.down_shape);
  std::size_t at = 0;
  const auto take = [&](std::size_t bytes) {
    std::byte* place = base + at;
    at += round_up(bytes);
    return place;
  };
  scratch.logits =
      reinterpret_cast<float*>(take(tokens * static_cast<std::size_t>(w.n_experts) * 4));
  scratch.shared_act = reinterpret_cast<std::uint16_t*>(
      take(tokens * static_cast<std::size_t>(scratch.shared_stride) * 2));
  scratch.routed_act = reinterpret_cast<std::uint16_t*>(
      take(visits * static_cast<std::size_t>(scratch.routed_stride) * 2));
  scratch.out = w.top_k == 1 ? nullptr
                             : reinterpret_cast<float*>(
                                   take(visits * static_cast<std::size_t>(w.down_shape.rows) * 4));
  return at;
}

int row_blocks(const TileShape& shape) { return divide_up(shape.n_row_tiles(), kStreamWarps); }

constexpr const char* kName = "experts of few tokens";

bool same_tiles(const TileShape& a, const TileShape& b) {
  return a.bits == b.bits && a.scales == b.scales;
}

// An expert of gate, up and down.
void check_pair(const TileShape& gate_up, const TileShape& down) {
  check_shape(kName, gate_up);
  check_shape(kName, down);
  if (gate_up.order == RowOrder::kGateUp && down.order == RowOrder::kPlain &&
      down.inputs == gate_up.rows / 2 && down.rows == gate_up.inputs && same_tiles(gate_up, down)) {
    return;
  }
  fail(ErrorCode::kInternal, "[cuda] ", kName, ": gate and up are ", gate_up.rows, " x ",
       gate_up.inputs, ", down is ", down.rows, " x ", down.inputs,
       "; wanted are 2 ffn_dim x dim, a gate beside its up, and dim x ffn_dim, of one kind.");
}

void check_call(const ExpertsFew& call) {
  const ExpertWeights& w = call.w;
  const int dim = w.gate_up_shape.inputs;
  check_pair(w.gate_up_shape, w.down_shape);
  check_rows(kName, "x", call.x, dim, call.x_stride);
  check_rows(kName, "the router", w.router, dim, w.router_stride);
  check_output(kName, Output::kAdd, w.down_shape.rows, RowOrder::kPlain, call.y, call.y_stride);
  check_norm(kName, call.norm_of_y, Output::kAdd, w.down_shape.rows);
  require(call.norm_of_y.gain == nullptr || w.top_k == 1, kName,
          "of tokens with several visits none is the last");
  require(w.gate_up != nullptr && w.down != nullptr && call.scratch != nullptr &&
              is_aligned(call.scratch, 16),
          kName, "tables of experts and scratch, aligned to 16 bytes, must be there");
  const TileShape& shared = w.shared_gate_up.shape;
  if (shared.rows != 0) {
    check_pair(shared, w.shared_down.shape);
    check_tiles(kName, w.shared_gate_up.at);
    check_tiles(kName, w.shared_down.at);
    require(shared.inputs == dim && same_tiles(shared, w.gate_up_shape), kName,
            "the shared expert has the dim and the kind of the routed ones");
  }
  if (w.n_experts < 1 || w.n_experts > kMaxExperts || w.top_k < 1 || w.top_k > w.n_experts ||
      w.top_k > kMaxTopK || call.n_tokens < 0 || call.n_tokens > experts_few_limit(w)) {
    fail(ErrorCode::kInternal, "[cuda] ", kName, ": ", w.n_experts, " experts, top ", w.top_k, ", ",
         call.n_tokens, " tokens; wanted are at most ", kMaxExperts, " experts, top ", kMaxTopK,
         ", at most ", experts_few_limit(w), " tokens.");
  }
}

}  // namespace

int experts_few_limit(const ExpertWeights& w) {
  return std::min(most_tokens_at_once<Header>(w.gate_up_shape), kMaxRoutedTokens);
}

WorkspaceNeed experts_few_needs(const ExpertWeights& w, int n_tokens) {
  const int hit = n_tokens * w.top_k < w.n_experts ? n_tokens * w.top_k : w.n_experts;
  const int results = row_blocks(w.shared_gate_up.shape) + row_blocks(w.shared_down.shape) +
                      hit * (row_blocks(w.gate_up_shape) + row_blocks(w.down_shape));
  return {stream_sum_bytes<Header>(kName, w.gate_up_shape, n_tokens,
                                   []<class Shape>(Shape) { return run_experts_few<Shape>; }),
          static_cast<std::size_t>(results) + 1};
}

std::size_t experts_few_scratch_bytes(const ExpertWeights& w, int n_tokens) {
  Scratch scratch;
  return lay_out(w, n_tokens, nullptr, scratch);
}

void experts_few(const ExpertsFew& call, const Workspace& workspace, cudaStream_t stream) {
  if (call.n_tokens == 0) return;
  check_call(call);
  check_workspace(kName, workspace, experts_few_needs(call.w, call.n_tokens));
  Scratch scratch;
  lay_out(call.w, call.n_tokens, call.scratch, scratch);
  const Parts parts = {reinterpret_cast<float4*>(workspace.sums), workspace.counters + 1};
  const int at_once = tokens_at_once<Header>(call.w.gate_up_shape, call.n_tokens);
  with_stream_shape(call.w.gate_up_shape, at_once, [&]<class Shape>(Shape) {
    launch_stream<Shape, Header>(kName, run_experts_few<Shape>, true, call.most_blocks, stream,
                                 call, scratch, parts, workspace.counters);
  });
}

}  // namespace camelid::cuda
