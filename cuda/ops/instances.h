// Which instance of a kernel takes a matrix or a cache: what their formats are at run time, as
// template arguments.
#pragma once

#include "layout/kv_page.h"
#include "layout/tiles.h"

namespace camelid::cuda {

// f.operator()<Bits, Scales>().
template <class F>
auto with_tile_format(const TileShape& shape, const F& f) {
  const bool k4 = shape.bits == Bits::k4;
  if (shape.scales == Scales::kBf16) {
    return k4 ? f.template operator()<Bits::k4, Scales::kBf16>()
              : f.template operator()<Bits::k8, Scales::kBf16>();
  }
  return k4 ? f.template operator()<Bits::k4, Scales::kPairs>()
            : f.template operator()<Bits::k8, Scales::kPairs>();
}

// f.operator()<KvFormat>().
template <class F>
auto with_kv_format(KvFormat format, const F& f) {
  if (format == KvFormat::kE4m3) return f.template operator()<KvFormat::kE4m3>();
  if (format == KvFormat::kInt8) return f.template operator()<KvFormat::kInt8>();
  return f.template operator()<KvFormat::kBf16>();
}

}  // namespace camelid::cuda
