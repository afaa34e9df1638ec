// C functions over grouped products and the routing of many tokens, for tests.
#include <algorithm>
#include <iterator>

#include "case.h"
#include "case_shapes.h"
#include "ops/grouped.h"
#include "ops/route_many.h"
#include "sm90/grouped.h"

using namespace camelid::cuda;

extern "C" {

struct CaseProduct {
  CaseShape shape;
  std::int32_t output, n_visits, hopper, multiprocessors;
  std::int64_t x_stride, y_stride;
};

int case_grouped(const CaseProduct* c, const TilePointers* groups, const std::uint16_t* x, void* y,
                 const std::int32_t* x_rows, const std::int32_t* y_rows, const float* factors,
                 const TokenTile* tiles, const std::int32_t* first_tile,
                 const std::int32_t* last_tile) {
  return caught([&] {
    GroupedProduct p;
    p.shape = shape_of(c->shape);
    p.groups = groups;
    p.x = x;
    p.x_stride = c->x_stride;
    p.x_rows = x_rows;
    p.y = y;
    p.y_stride = c->y_stride;
    p.y_rows = y_rows;
    p.factors = factors;
    p.output = static_cast<Output>(c->output);
    p.tiles = tiles;
    p.first_tile = first_tile;
    p.last_tile = last_tile;
    p.n_visits = c->n_visits;
    (c->hopper != 0 ? sm90::grouped_many : grouped_many)(p, c->multiprocessors, stream);
  });
}

// Which tile and row block job `number` is; false behind the last one.
int case_job(const TokenTile* tiles, std::int32_t n_tiles, std::int32_t number,
             std::int32_t n_row_blocks, std::int32_t* found) {
  GroupedProduct p;
  const std::int32_t first = 0;
  p.tiles = tiles;
  p.first_tile = &first;
  p.last_tile = &n_tiles;
  TokenTile tile{};
  if (!find_job(p, number, n_row_blocks, tile, found[1])) return 0;
  found[0] = tile.first;
  return 1;
}

struct CaseRoute {
  std::int32_t n_tokens, n_experts, top_k, shared;
};

static RouteShape route_of(const CaseRoute& c) {
  return {c.n_tokens, c.n_experts, c.top_k, c.shared != 0};
}

std::int64_t case_route_bytes(const CaseRoute* c) {
  return static_cast<std::int64_t>(routes_bytes(route_of(*c)));
}

// Where in the memory token, factor, visits, tiles and tile_ends lie, and how many tiles there may
// be.
void case_route_places(const CaseRoute* c, std::byte* memory, std::int64_t* places) {
  const Routes routes = routes_in(route_of(*c), memory);
  const auto at = [&](const void* pointer) {
    return static_cast<const std::byte*>(pointer) - memory;
  };
  const std::int64_t all[] = {at(routes.token), at(routes.factor), at(routes.visits),
                              at(routes.tiles), at(routes.tile_ends)};
  std::copy(std::begin(all), std::end(all), places);
}

int case_route(const CaseRoute* c, const float* logits, std::byte* memory) {
  return caught([&] { route_many(route_of(*c), logits, routes_in(route_of(*c), memory), stream); });
}

int case_combine(const CaseRoute* c, std::byte* memory, const float* rows, std::int64_t rows_stride,
                 float* y, std::int64_t y_stride, std::int32_t dim) {
  return caught([&] {
    combine_rows(route_of(*c), routes_in(route_of(*c), memory),
                 {rows, rows_stride, y, y_stride, dim}, stream);
  });
}

}  // extern "C"
