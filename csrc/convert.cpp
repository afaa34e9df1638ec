#include "convert.h"

#include <cstring>
#include <optional>
#include <string>

#include "base/error.h"

namespace py = pybind11;

namespace camelid {
namespace {

const char* class_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidRequest:
      return "InvalidRequest";
    case ErrorCode::kCheckpoint:
      return "CheckpointError";
    case ErrorCode::kCapacity:
      return "CapacityError";
    case ErrorCode::kUnsupported:
      return "Unsupported";
    case ErrorCode::kCancelled:
      return "Cancelled";
    case ErrorCode::kInternal:
      break;
  }
  return "InternalError";
}

DType to_dtype(const std::string& name, const std::string& tensor) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBf16, DType::kI32, DType::kI64}) {
    if (dtype_name(dtype) == name) return dtype;
  }
  fail(ErrorCode::kUnsupported, "[weights] ", tensor, " is ", name, ". Supported: F32, F16, BF16.");
}

std::vector<bool> to_bools(const py::object& values) {
  std::vector<bool> out;
  for (const py::handle& value : values) out.push_back(value.cast<bool>());
  return out;
}

// Bytes from the first to the last element of a strided matrix; refuses sizes that do not fit.
std::size_t plain_bytes(const LinearSource& s) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 40;
  const bool sane = s.out_dim > 0 && s.in_dim > 0 && s.row_stride > 0 && s.col_stride > 0 &&
                    s.out_dim <= kLargest / s.row_stride && s.in_dim <= kLargest / s.col_stride;
  if (!sane) fail(ErrorCode::kInvalidRequest, "[weights] ", s.name, " has impossible dimensions");
  const std::int64_t last = (s.out_dim - 1) * s.row_stride + (s.in_dim - 1) * s.col_stride;
  return static_cast<std::size_t>(last + 1) * dtype_bytes(s.dtype);
}

void hold_quantised(LinearSource& s, const py::object& source, BufferGuard& guard) {
  const bool sane =
      (s.bits == 4 || s.bits == 8) && s.out_dim > 0 && s.in_dim > 0 && s.group_size > 0;
  if (!sane) fail(ErrorCode::kInvalidRequest, "[weights] ", s.name, " has impossible dimensions");
  const std::int64_t per_word = 32 / s.bits;
  const auto n_words = static_cast<std::size_t>(s.out_dim * ((s.in_dim + per_word - 1) / per_word));
  const auto n_scales = static_cast<std::size_t>(s.out_dim * s.n_groups());
  s.words = guard.hold(source.attr("words"), n_words * 4, s.name);
  s.scale_dtype = to_dtype(source.attr("scale_dtype").cast<std::string>(), s.name);
  s.scales = guard.hold(source.attr("scales"), n_scales * dtype_bytes(s.scale_dtype), s.name);
  const py::object zeros = source.attr("zero_points");
  if (zeros.is_none()) return;
  const auto n_zeros =
      static_cast<std::size_t>((s.out_dim + per_word - 1) / per_word * s.n_groups());
  s.zero_points = guard.hold(zeros, n_zeros * 4, s.name);
}

MlpSources to_mlp(const py::object& parts, BufferGuard& guard) {
  const auto three = parts.cast<py::tuple>();
  if (three.size() != 3) fail(ErrorCode::kInternal, "[weights] expected (gate, up, down)");
  return {to_linear(three[0], guard), to_linear(three[1], guard), to_linear(three[2], guard)};
}

VisionConfig to_vision_config(const py::object& c) {
  VisionConfig out;
  out.dim = c.attr("dim").cast<std::int64_t>();
  out.n_layers = c.attr("n_layers").cast<std::int64_t>();
  out.n_heads = c.attr("n_heads").cast<std::int64_t>();
  out.ffn_dim = c.attr("ffn_dim").cast<std::int64_t>();
  out.image_size = c.attr("image_size").cast<std::int64_t>();
  out.patch_size = c.attr("patch_size").cast<std::int64_t>();
  out.n_channels = c.attr("n_channels").cast<std::int64_t>();
  out.shuffle = c.attr("shuffle").cast<std::int64_t>();
  out.adapter_dim = c.attr("output_dim").cast<std::int64_t>();
  out.rope_theta = c.attr("rope_theta").cast<double>();
  return out;
}

LayerNormSource to_layer_norm(const py::object& pair) {
  const auto two = pair.cast<py::tuple>();
  if (two.size() != 2) fail(ErrorCode::kInternal, "[weights] expected (gain, bias)");
  return {to_floats(two[0]), to_floats(two[1])};
}

}  // namespace

void register_errors() {
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const Error& error) {
      const py::object type = py::module_::import("camelid.errors").attr(class_name(error.code()));
      PyErr_SetString(type.ptr(), error.what());
    }
  });
}

const void* BufferGuard::hold(const py::object& buffer, std::size_t least_bytes,
                              const std::string& name) {
  buffers_.push_back(py::buffer(buffer).request());
  const py::buffer_info& info = buffers_.back();
  py::ssize_t dense = info.itemsize;
  for (py::ssize_t axis = info.ndim; axis-- > 0;) {
    if (info.shape[static_cast<std::size_t>(axis)] > 1 &&
        info.strides[static_cast<std::size_t>(axis)] != dense) {
      fail(ErrorCode::kInvalidRequest, "[weights] the buffer of ", name, " is not contiguous");
    }
    dense *= info.shape[static_cast<std::size_t>(axis)];
  }
  const auto got = static_cast<std::size_t>(info.size * info.itemsize);
  if (got < least_bytes) {
    fail(ErrorCode::kInvalidRequest, "[weights] the buffer of ", name, " has ", got,
         " bytes, expected ", least_bytes);
  }
  return info.ptr;
}

ModelConfig to_config(const py::object& c) {
  ModelConfig out;
  out.dim = c.attr("dim").cast<std::int64_t>();
  out.n_layers = c.attr("n_layers").cast<std::int64_t>();
  out.n_heads = c.attr("n_heads").cast<std::int64_t>();
  out.n_kv_heads = c.attr("n_kv_heads").cast<std::int64_t>();
  out.head_dim = c.attr("head_dim").cast<std::int64_t>();
  out.expert_dim = c.attr("expert_dim").cast<std::int64_t>();
  out.dense_dim = c.attr("dense_dim").cast<std::int64_t>();
  out.n_experts = c.attr("n_experts").cast<std::int64_t>();
  out.top_k = c.attr("top_k").cast<std::int64_t>();
  out.vocab_size = c.attr("vocab_size").cast<std::int64_t>();
  out.rms_norm_eps = c.attr("rms_norm_eps").cast<float>();
  out.rope_theta = c.attr("rope_theta").cast<double>();
  const py::object scaling = c.attr("rope_scaling");
  if (!scaling.is_none()) {
    out.has_rope_scaling = true;
    out.rope_scaling.factor = scaling.attr("factor").cast<double>();
    out.rope_scaling.low_freq_factor = scaling.attr("low_freq_factor").cast<double>();
    out.rope_scaling.high_freq_factor = scaling.attr("high_freq_factor").cast<double>();
    out.rope_scaling.original_max_position = scaling.attr("original_max_position").cast<double>();
  }
  const py::object chunk = c.attr("attention_chunk_size");
  out.chunk = chunk.is_none() ? 0 : chunk.cast<std::int64_t>();
  out.is_rope_layer = to_bools(c.attr("is_rope_layer"));
  out.is_chunked_layer = to_bools(c.attr("is_chunked_layer"));
  out.is_moe_layer = to_bools(c.attr("is_moe_layer"));
  out.use_qk_norm = c.attr("use_qk_norm").cast<bool>();
  out.temperature_tuning = c.attr("attn_temperature_tuning").cast<bool>();
  out.floor_scale = c.attr("floor_scale").cast<double>();
  out.attn_scale = c.attr("attn_scale").cast<double>();
  out.tied_embeddings = c.attr("tie_word_embeddings").cast<bool>();
  const py::object vision = c.attr("vision");
  if (!vision.is_none()) out.vision = to_vision_config(vision);
  return out;
}

LinearSource to_linear(const py::object& source, BufferGuard& guard) {
  LinearSource s;
  s.name = source.attr("name").cast<std::string>();
  s.file = source.attr("file").cast<std::string>();
  s.out_dim = source.attr("out_dim").cast<std::int64_t>();
  s.in_dim = source.attr("in_dim").cast<std::int64_t>();
  s.bits = source.attr("bits").cast<int>();
  if (s.bits != 0) {
    s.group_size = source.attr("group_size").cast<std::int64_t>();
    hold_quantised(s, source, guard);
  } else {
    s.dtype = to_dtype(source.attr("dtype").cast<std::string>(), s.name);
    s.row_stride = source.attr("row_stride").cast<std::int64_t>();
    s.col_stride = source.attr("col_stride").cast<std::int64_t>();
    s.data = guard.hold(source.attr("data"), plain_bytes(s), s.name);
  }
  return s;
}

LayerSources to_layer(const py::object& sources, BufferGuard& guard) {
  LayerSources out;
  out.input_norm = to_floats(sources.attr("input_norm"));
  out.post_norm = to_floats(sources.attr("post_norm"));
  out.q = to_linear(sources.attr("q"), guard);
  out.k = to_linear(sources.attr("k"), guard);
  out.v = to_linear(sources.attr("v"), guard);
  out.o = to_linear(sources.attr("o"), guard);
  const py::object router = sources.attr("router");
  if (!router.is_none()) out.router = to_linear(router, guard);
  for (const py::handle& expert : sources.attr("experts")) {
    out.experts.push_back(to_mlp(py::reinterpret_borrow<py::object>(expert), guard));
  }
  const py::object shared = sources.attr("shared");
  if (!shared.is_none()) out.shared = to_mlp(shared, guard);
  const py::object dense = sources.attr("dense");
  if (!dense.is_none()) out.dense = to_mlp(dense, guard);
  return out;
}

VisionFrameSources to_vision_frame(const py::object& sources, BufferGuard& guard) {
  VisionFrameSources out;
  out.patch = to_linear(sources.attr("patch"), guard);
  out.class_row = to_floats(sources.attr("class_row"));
  out.positions = to_floats(sources.attr("positions"));
  out.norm_pre = to_layer_norm(sources.attr("norm_pre"));
  out.norm_post = to_layer_norm(sources.attr("norm_post"));
  out.adapter_fc1 = to_linear(sources.attr("adapter_fc1"), guard);
  out.adapter_fc2 = to_linear(sources.attr("adapter_fc2"), guard);
  out.projector = to_linear(sources.attr("projector"), guard);
  return out;
}

VisionLayerSources to_vision_layer(const py::object& sources, BufferGuard& guard) {
  VisionLayerSources out;
  out.norm1 = to_layer_norm(sources.attr("norm1"));
  out.norm2 = to_layer_norm(sources.attr("norm2"));
  out.q = to_linear(sources.attr("q"), guard);
  out.k = to_linear(sources.attr("k"), guard);
  out.v = to_linear(sources.attr("v"), guard);
  out.o = to_linear(sources.attr("o"), guard);
  out.fc1 = to_linear(sources.attr("fc1"), guard);
  out.fc2 = to_linear(sources.attr("fc2"), guard);
  out.qkv_bias = to_floats(sources.attr("qkv_bias"));
  out.o_bias = to_floats(sources.attr("o_bias"));
  out.fc1_bias = to_floats(sources.attr("fc1_bias"));
  out.fc2_bias = to_floats(sources.attr("fc2_bias"));
  return out;
}

std::vector<float> to_floats(const py::object& array) {
  const auto values = array.cast<py::array_t<float, py::array::c_style | py::array::forcecast>>();
  return {values.data(), values.data() + values.size()};
}

}  // namespace camelid
