// C functions over packing on the device, for tests on a GPU and on the emulated device.
#include <map>
#include <vector>

#include "case.h"
#include "ops/pack.h"

using namespace camelid;
using namespace camelid::cuda;

// As an engine keeps one: pinned memory takes longer to get than a matrix to pack. By the bytes of
// a piece; never freed, since the driver may be gone before.
static auto& uploaders = *new std::map<std::size_t, Uploader>;

extern "C" {

struct CSource {
  const void *words, *scales, *zero_points;  // of the host
  int bits, group, scale_dtype, rows, inputs;
};

// Packs a stack into tiles and scales, by pieces of so many bytes; both null asks for the shape
// alone: rows, inputs, entries, bits, scales, order.
int run_pack(const CSource* sources, int n_sources, int order, std::int64_t piece_bytes,
             std::byte* tiles, std::byte* scales, int* shape) {
  return caught([&] {
    std::vector<LinearSource> stack;
    for (int i = 0; i < n_sources; ++i) {
      LinearSource source;
      source.name = "layers.0.part" + std::to_string(i);
      source.file = "model.safetensors";
      source.bits = sources[i].bits;
      source.out_dim = sources[i].rows;
      source.in_dim = sources[i].inputs;
      source.group_size = sources[i].group;
      source.words = sources[i].words;
      source.scales = sources[i].scales;
      source.scale_dtype = static_cast<DType>(sources[i].scale_dtype);
      source.zero_points = sources[i].zero_points;
      stack.push_back(source);
    }
    const TileShape packed = packed_shape(stack, static_cast<RowOrder>(order));
    const int found[] = {packed.rows,
                         packed.inputs,
                         packed.entries,
                         static_cast<int>(packed.bits),
                         static_cast<int>(packed.scales),
                         static_cast<int>(packed.order)};
    std::copy(std::begin(found), std::end(found), shape);
    if (tiles == nullptr) return;
    const auto piece = static_cast<std::size_t>(piece_bytes);
    pack(stack, packed, tiles, scales, uploaders.try_emplace(piece, stream, piece).first->second);
  });
}
}
