// Binds camelid::Engine. Every call that computes releases the GIL.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda.h"
#include "base/arena.h"
#include "base/error.h"
#include "base/threads.h"
#include "bind.h"
#include "convert.h"
#include "engine.h"
#include "quant/quantize.h"

namespace py = pybind11;

namespace camelid {
namespace {

using IntArray = py::array_t<std::int32_t, py::array::c_style>;

KvType to_kv_type(const std::string& name) {
  if (name == "f32") return KvType::kF32;
  if (name == "bf16") return KvType::kBf16;
  if (name == "fp8") return KvType::kFp8;
  if (name == "int8") return KvType::kInt8;
  fail(ErrorCode::kUnsupported, "[options] kv_cache=\"", name,
       "\" is not supported by this build, expected auto, f32, bf16, fp8 or int8.");
}

std::unique_ptr<Engine> make_engine(const py::object& config, const std::string& device,
                                    int threads, const std::string& weights,
                                    const std::string& kv_cache, bool fast, bool int8_head,
                                    std::size_t memory_bytes, std::int64_t page_size,
                                    std::int64_t max_step_tokens, const OnPacked& on_packed,
                                    bool timed) {
  EngineOptions options;
  options.backend = {device, threads, fast};
  options.int8_head = int8_head;
  options.weights = weight_choice_from_name(weights);
  options.kv_cache = to_kv_type(kv_cache);
  options.memory_bytes = memory_bytes;
  options.page_size = page_size;
  options.max_step_tokens = max_step_tokens;
  options.on_packed = on_packed;
  options.timed = timed;
  ModelConfig model = to_config(config);
  const py::gil_scoped_release release;  // a GPU's first call takes a second
  return std::make_unique<Engine>(std::move(model), options);
}

void load_embedding(Engine& engine, const py::object& source) {
  BufferGuard guard;
  const LinearSource linear = to_linear(source, guard);
  const py::gil_scoped_release release;
  engine.weights().load_embedding(linear);
}

void load_layer(Engine& engine, const py::object& sources) {
  BufferGuard guard;
  const LayerSources layer = to_layer(sources, guard);
  const py::gil_scoped_release release;
  engine.weights().load_layer(layer);
}

void load_head(Engine& engine, const py::object& final_norm, const py::object& head) {
  BufferGuard guard;
  const std::vector<float> norm = to_floats(final_norm);
  std::optional<LinearSource> linear;
  if (!head.is_none()) linear = to_linear(head, guard);
  const py::gil_scoped_release release;
  engine.weights().load_head(norm, linear);
}

void load_vision_frame(Engine& engine, const py::object& sources) {
  BufferGuard guard;
  const VisionFrameSources frame = to_vision_frame(sources, guard);
  const py::gil_scoped_release release;
  engine.load_vision_frame(frame);
}

void load_vision_layer(Engine& engine, const py::object& sources) {
  BufferGuard guard;
  const VisionLayerSources layer = to_vision_layer(sources, guard);
  const py::gil_scoped_release release;
  engine.load_vision_layer(layer);
}

py::array_t<float> encode_image(Engine& engine,
                                const py::array_t<float, py::array::c_style>& pixels) {
  std::vector<float> features;
  {
    const std::span<const float> values(pixels.data(), static_cast<std::size_t>(pixels.size()));
    const py::gil_scoped_release release;
    features = engine.encode_image(values);
  }
  const auto dim = static_cast<py::ssize_t>(engine.config().dim);
  const auto n_tokens = static_cast<py::ssize_t>(engine.config().vision->tokens_per_tile());
  const auto n_tiles = static_cast<py::ssize_t>(features.size()) / (n_tokens * dim);
  return py::array_t<float>({n_tiles, n_tokens, dim}, features.data());
}

using FloatArray = py::array_t<float, py::array::c_style>;

// None where no token stands for a feature.
struct Features {
  std::optional<FloatArray> values;  // [n_features, dim]
  std::optional<IntArray> rows;      // [n_tokens]
};

StepResult run_step(Engine& engine, const py::array_t<std::int64_t, py::array::c_style>& sequences,
                    const IntArray& counts, const IntArray& tokens,
                    const py::array_t<std::uint8_t, py::array::c_style>& outputs,
                    const Features& features) {
  std::vector<Output> wanted;
  for (py::ssize_t i = 0; i < outputs.size(); ++i) {
    if (outputs.data()[i] > 2)
      fail(ErrorCode::kInvalidRequest, "[step] an output is not 0, 1 or 2");
    wanted.push_back(static_cast<Output>(outputs.data()[i]));
  }
  StepRequest request{{sequences.data(), static_cast<std::size_t>(sequences.size())},
                      {counts.data(), static_cast<std::size_t>(counts.size())},
                      {tokens.data(), static_cast<std::size_t>(tokens.size())},
                      wanted,
                      {},
                      {}};
  if (features.values && features.rows) {
    request.features = {features.values->data(), static_cast<std::size_t>(features.values->size())};
    request.feature_rows = {features.rows->data(), static_cast<std::size_t>(features.rows->size())};
  }
  const py::gil_scoped_release release;
  return engine.step(request);
}

// Moves the logits into an array that owns them: no copy.
py::array_t<float> take_logits(StepResult& result, std::int64_t vocab_size) {
  auto owned = std::make_unique<std::vector<float>>(std::move(result.logits));
  const auto n_rows = static_cast<py::ssize_t>(owned->size()) / vocab_size;
  float* data = owned->data();
  const py::capsule owner(owned.release(),
                          [](void* p) { delete static_cast<std::vector<float>*>(p); });
  return py::array_t<float>({n_rows, static_cast<py::ssize_t>(vocab_size)}, data, owner);
}

struct PyStepResult {
  std::vector<Sampled> sampled;
  py::array_t<float> logits;
};

PyStepResult step(Engine& engine, const py::array_t<std::int64_t, py::array::c_style>& sequences,
                  const IntArray& counts, const IntArray& tokens,
                  const py::array_t<std::uint8_t, py::array::c_style>& outputs,
                  const std::optional<FloatArray>& features,
                  const std::optional<IntArray>& feature_rows) {
  StepResult result =
      run_step(engine, sequences, counts, tokens, outputs, {features, feature_rows});
  py::array_t<float> logits = take_logits(result, engine.config().vocab_size);
  return {std::move(result.sampled), std::move(logits)};
}

void start_timeline(Engine& engine, const std::string& grain) {
  if (grain != "calls" && grain != "steps")
    fail(ErrorCode::kInvalidRequest, "[timeline] grain=\"", grain, "\", expected calls or steps.");
  const py::gil_scoped_release release;
  engine.start_timeline(grain == "calls" ? Grain::kCalls : Grain::kSteps);
}

std::vector<std::pair<std::string, double>> stop_timeline(Engine& engine) {
  const py::gil_scoped_release release;
  std::vector<std::pair<std::string, double>> calls;
  for (TimedCall& call : engine.stop_timeline()) calls.emplace_back(std::move(call.name), call.us);
  return calls;
}

py::dict memory(const Engine& engine) {
  const MemoryReport report = engine.memory();
  py::dict out;
  out["weight_bytes"] = report.weight_bytes;
  out["workspace_bytes"] = report.workspace_bytes;
  out["kv_limit_bytes"] = report.kv_limit_bytes;
  out["kv_used_bytes"] = report.kv_used_bytes;
  out["page_size"] = report.page_size;
  return out;
}

SamplerParams make_sampler_params(float temperature, int top_k, float top_p, float min_p,
                                  float repetition_penalty, float presence_penalty,
                                  float frequency_penalty, std::uint64_t seed, int n_logprobs,
                                  const std::map<std::int32_t, float>& logit_bias,
                                  std::vector<std::int32_t> banned) {
  SamplerParams params;
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.min_p = min_p;
  params.repetition_penalty = repetition_penalty;
  params.presence_penalty = presence_penalty;
  params.frequency_penalty = frequency_penalty;
  params.seed = seed;
  params.n_logprobs = n_logprobs;
  params.logit_bias.assign(logit_bias.begin(), logit_bias.end());
  params.banned = std::move(banned);
  return params;
}

// Quantises in blocks of rows, so that beside the result only a block is held as float32.
py::tuple quantize(const py::object& source, int bits, std::int64_t group_size, int threads) {
  BufferGuard guard;
  const LinearSource linear = to_linear(source, guard);
  if (bits != 4 && bits != 8)
    fail(ErrorCode::kInvalidRequest, "[quantize] bits is ", bits, ", expected 4 or 8");
  const std::int64_t group = group_size > 0 ? group_size : linear.in_dim;
  const std::int64_t per_word = 32 / bits;
  const std::int64_t n_words = (linear.in_dim + per_word - 1) / per_word;
  const std::int64_t n_groups = (linear.in_dim + group - 1) / group;
  py::array_t<std::int32_t> words({linear.out_dim, n_words});
  py::array_t<std::uint16_t> scales({linear.out_dim, n_groups});
  std::int32_t* words_out = words.mutable_data();
  std::uint16_t* scales_out = scales.mutable_data();
  {
    const py::gil_scoped_release release;
    constexpr std::int64_t kRows = 64;
    ThreadPool pool(threads > 0 ? threads : default_threads());
    pool.parallel_for((linear.out_dim + kRows - 1) / kRows, [&](std::int64_t block, int) {
      const std::int64_t first = block * kRows;
      const std::int64_t n = std::min(kRows, linear.out_dim - first);
      std::vector<float> rows(static_cast<std::size_t>(n * linear.in_dim));
      read_rows(linear, first, n, rows.data());
      quantize_rows(rows.data(), n, linear.in_dim, bits, group, words_out + first * n_words,
                    scales_out + first * n_groups);
    });
  }
  return py::make_tuple(words, scales);
}

void bind_results(py::module_& m) {
  py::class_<Sampled>(m, "Sampled")
      .def_readonly("token", &Sampled::token)
      .def_readonly("logprob", &Sampled::logprob)
      .def_readonly("not_finite", &Sampled::not_finite)
      .def_property_readonly("top", [](const Sampled& s) {
        std::vector<std::pair<std::int32_t, float>> top;
        for (const TokenLogprob& entry : s.top) top.emplace_back(entry.token, entry.logprob);
        return top;
      });
  py::class_<PyStepResult>(m, "StepResult")
      .def_readonly("sampled", &PyStepResult::sampled)
      .def_readonly("logits", &PyStepResult::logits);
  py::class_<SamplerParams>(m, "SamplerParams")
      .def(py::init(&make_sampler_params), py::kw_only(), py::arg("temperature") = 1.0f,
           py::arg("top_k") = 0, py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f,
           py::arg("repetition_penalty") = 1.0f, py::arg("presence_penalty") = 0.0f,
           py::arg("frequency_penalty") = 0.0f, py::arg("seed") = 0, py::arg("n_logprobs") = -1,
           py::arg("logit_bias") = std::map<std::int32_t, float>{},
           py::arg("banned") = std::vector<std::int32_t>{});
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_results(m);
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Engine>(m, "Engine")
      .def(py::init(&make_engine), py::arg("config"), py::kw_only(), py::arg("device") = "auto",
           py::arg("threads") = 0, py::arg("weights") = "auto", py::arg("kv_cache") = "f32",
           py::arg("fast") = false, py::arg("int8_head") = false, py::arg("memory_bytes") = 0,
           py::arg("page_size") = 64, py::arg("max_step_tokens") = 512,
           py::arg("on_packed") = OnPacked{}, py::arg("timed") = false)
      .def("load_embedding", &load_embedding, py::arg("source"))
      .def("load_layer", &load_layer, py::arg("sources"))
      .def("load_head", &load_head, py::arg("final_norm"), py::arg("head"))
      .def("load_vision_frame", &load_vision_frame, py::arg("sources"))
      .def("load_vision_layer", &load_vision_layer, py::arg("sources"))
      .def("encode_image", &encode_image, py::arg("pixels"))
      .def("finish_loading", &Engine::finish_loading, py::arg("reserved_bytes") = 0, Release())
      .def("open_sequence", &Engine::open_sequence, py::arg("params"), Release())
      .def("close_sequence", &Engine::close_sequence, py::arg("sequence"), Release())
      .def("step", &step, py::arg("sequences"), py::arg("counts"), py::arg("tokens"),
           py::arg("outputs"), py::arg("features") = py::none(),
           py::arg("feature_rows") = py::none())
      .def("kv_bytes_for", &Engine::kv_bytes_for, py::arg("n_tokens"))
      .def("kv_tokens_in", &Engine::kv_tokens_in, py::arg("n_bytes"))
      .def("memory", &memory)
      .def("describe", &Engine::describe)
      .def("available_bytes", &Engine::available_bytes)
      .def("workspace_bytes", &Engine::workspace_bytes)
      .def("start_timeline", &start_timeline, py::arg("grain"))
      .def("stop_timeline", &stop_timeline)
      .def("check_invariants", &Engine::check_invariants, Release());
  m.def("quantize", &quantize, py::arg("source"), py::arg("bits"), py::arg("group_size"),
        py::arg("threads") = 0);
  m.def("available_memory", &available_memory);
  m.def("cuda_available", &cuda_available);
  m.def("default_threads", &default_threads);
}

}  // namespace camelid
