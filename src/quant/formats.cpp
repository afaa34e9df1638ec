// The table of weight formats. A new one is a new line here.
#include <string>

#include "base/error.h"
#include "quant/format.h"

namespace camelid {
namespace {

constexpr FormatInfo kFormats[] = {
    {WeightFormat::kF32, "f32", 32, false},   {WeightFormat::kF16, "f16", 16, false},
    {WeightFormat::kBf16, "bf16", 16, false}, {WeightFormat::kInt8, "int8", 8, true},
    {WeightFormat::kInt4, "int4", 4, true},
};

}  // namespace

const FormatInfo& format_info(WeightFormat format) {
  for (const FormatInfo& info : kFormats) {
    if (info.format == format) return info;
  }
  fail(ErrorCode::kInternal, "[weights] format ", static_cast<int>(format), " is not in the table");
}

WeightFormat format_from_name(std::string_view name) {
  std::string known;
  for (const FormatInfo& info : kFormats) {
    if (info.name == name) return info.format;
    known += known.empty() ? "" : ", ";
    known += info.name;
  }
  fail(ErrorCode::kUnsupported, "[weights] no weight format is called '", name, "'; choose one of ",
       known, ".");
}

}  // namespace camelid
