// _core.testing: single operations of the CPU backend on NumPy arrays, each on a chosen instruction
// set, so that Python can hold them against a reference. Tests only; trusts the shapes it is given
// except where a mistake would write out of bounds.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/arena.h"
#include "base/error.h"
#include "bind.h"
#include "convert.h"
#include "cpu/backend.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"
#include "quant/quantize.h"

namespace py = pybind11;

namespace camelid {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;

// The first `dim` columns of a two-dimensional array, which may be wider: tests poison the rest.
Tensor rows_of(Floats& array, std::int64_t dim) {
  if (array.ndim() != 2 || array.shape(1) < dim) {
    fail(ErrorCode::kInternal, "[testing] expected a float32 array with ", dim, " columns or more");
  }
  return {array.mutable_data(), array.shape(0), dim, array.shape(1)};
}

std::vector<PackOptions> options_for(std::size_t n, const std::string& format,
                                     std::int64_t group_size, bool precise) {
  return std::vector<PackOptions>(n, {format_from_name(format), group_size, precise});
}

// The pages and spans of one kind of layer, from plain arrays.
struct KvState {
  KvPlan plan;
  std::vector<Ints> page_tables;  // what the spans point into
};

class Ops {
 public:
  Ops(const std::string& isa, int threads, bool fast)
      : backend_(make_cpu_backend({"cpu", threads, fast}, isa)) {}

  std::string describe() const { return backend_->describe(); }

  std::unique_ptr<Matrix> pack(const std::vector<py::object>& stack, const std::string& format,
                               std::int64_t group_size, bool precise) {
    BufferGuard guard;
    std::vector<LinearSource> sources;
    for (const py::object& source : stack) sources.push_back(to_linear(source, guard));
    return backend_->pack(sources, options_for(sources.size(), format, group_size, precise));
  }

  void matmul(Floats y, Floats x, const Matrix& w, bool accumulate) {
    const Tensor out = rows_of(y, w.out_dim);
    const Tensor in = rows_of(x, w.in_dim);
    if (out.n_rows != in.n_rows) fail(ErrorCode::kInternal, "[testing] x and y differ in rows");
    accumulate ? backend_->matmul_add(out, in, w, {}) : backend_->matmul(out, in, w);
  }

  Floats embed(const std::vector<std::int32_t>& rows, const Matrix& table) {
    Floats y({static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(table.in_dim)});
    StepPlan plan;
    plan.tokens = rows;
    backend_->begin(plan);
    backend_->embed(rows_of(y, table.in_dim), table);
    return y;
  }

  Floats norm(Floats x, Floats gain, float eps) {
    Floats y({x.shape(0), x.shape(1)});
    const Buffer gains = backend_->upload({gain.data(), static_cast<std::size_t>(gain.size())});
    backend_->norm(rows_of(x, x.shape(1)), {rows_of(y, x.shape(1)), &gains, eps});
    return y;
  }

  Floats layer_norm(Floats x, Floats gain, Floats bias, float eps) {
    Floats y({x.shape(0), x.shape(1)});
    const auto upload = [this](const Floats& values) {
      return backend_->upload({values.data(), static_cast<std::size_t>(values.size())});
    };
    backend_->layer_norm(rows_of(y, x.shape(1)), rows_of(x, x.shape(1)), upload(gain), upload(bias),
                         eps);
    return y;
  }

  // gelu(x + bias).
  Floats gelu(Floats x, Floats bias) {
    Floats y({x.shape(0), x.shape(1)});
    std::copy(x.data(), x.data() + x.size(), y.mutable_data());
    const Tensor rows = rows_of(y, x.shape(1));
    backend_->add_bias(rows,
                       backend_->upload({bias.data(), static_cast<std::size_t>(bias.size())}));
    backend_->gelu(rows);
    return y;
  }

  // Stacks gate over up, as the model does.
  Mlp make_mlp(const py::object& gate, const py::object& up, const py::object& down,
               const std::string& format, std::int64_t group_size) {
    return {pack({gate, up}, format, group_size, false), pack({down}, format, group_size, false)};
  }

  Experts make_experts(const py::object& router, const std::vector<py::tuple>& routed,
                       const py::tuple& shared, std::int64_t top_k, const std::string& format,
                       std::int64_t group_size) {
    Experts experts;
    experts.router = pack({router}, "f32", 0, false);
    for (const py::tuple& m : routed) {
      experts.routed.push_back(make_mlp(m[0], m[1], m[2], format, group_size));
    }
    experts.shared = make_mlp(shared[0], shared[1], shared[2], format, group_size);
    experts.top_k = top_k;
    return experts;
  }

  void mlp(Floats y, Floats x, const Mlp& w) {
    backend_->mlp(rows_of(y, w.down->out_dim), rows_of(x, w.gate_up->in_dim), w, {});
  }

  void experts(Floats y, Floats x, const Experts& w) {
    backend_->experts(rows_of(y, w.router->in_dim), rows_of(x, w.router->in_dim), w, {});
  }

  std::size_t page_bytes(std::int64_t page_size, std::int64_t n_layers, std::int64_t n_kv_heads,
                         std::int64_t head_dim, const std::string& type) const {
    return backend_->page_bytes(describe_pages(page_size, n_layers, n_kv_heads, head_dim, type));
  }

  // One attention layer of one step: qkv [n_tokens, (n_heads + 2 n_kv_heads) head_dim] is finished
  // in place and stored to `pages` uint8 [n_pages, page_bytes]; returns [n_tokens, n_heads *
  // head_dim]. layer: kv_layer, n_heads, n_kv_heads, head_dim, page_size, n_layers, type, qk_norm,
  // eps. spans: (first_row, n_rows, first_index, page table). rotation, query_scale: None where
  // off.
  Floats attention(Floats qkv, py::array_t<std::uint8_t, py::array::c_style> pages,
                   const py::dict& layer, const std::vector<py::tuple>& spans,
                   const py::object& rotation, const py::object& query_scale) {
    KvState state;
    StepPlan step;
    state.plan.pages =
        describe_pages(get(layer, "page_size"), get(layer, "n_layers"), get(layer, "n_kv_heads"),
                       get(layer, "head_dim"), layer["type"].cast<std::string>());
    state.plan.pages.page_bytes = backend_->page_bytes(state.plan.pages);
    state.plan.pages.base = pages.mutable_data();
    state.plan.n_heads = get(layer, "n_heads");
    fill_spans(state, spans, pages);
    AttentionLayer attention;
    attention.kv_layer = get(layer, "kv_layer");
    attention.qk_norm = layer["qk_norm"].cast<bool>();
    attention.eps = layer["eps"].cast<float>();
    attention.rotate = !rotation.is_none();
    attention.scale_queries = !query_scale.is_none();
    if (attention.rotate) state.plan.rotation = to_floats(rotation);
    if (attention.scale_queries) step.query_scale = to_floats(query_scale);
    step.global = std::move(state.plan);
    const std::int64_t dim = step.global.n_heads * get(layer, "head_dim");
    Floats y({qkv.shape(0), static_cast<py::ssize_t>(dim)});
    backend_->begin(step);
    backend_->store_kv(rows_of(qkv, qkv.shape(1)), attention);
    backend_->attend(rows_of(y, dim), rows_of(qkv, qkv.shape(1)), attention);
    return y;
  }

 private:
  static std::int64_t get(const py::dict& layer, const char* key) {
    return layer[key].cast<std::int64_t>();
  }

  static KvPages describe_pages(std::int64_t page_size, std::int64_t n_layers,
                                std::int64_t n_kv_heads, std::int64_t head_dim,
                                const std::string& type) {
    KvPages pages;
    pages.page_size = page_size;
    pages.n_layers = n_layers;
    pages.n_kv_heads = n_kv_heads;
    pages.head_dim = head_dim;
    pages.type = type == "int8" ? KvType::kInt8 : type == "bf16" ? KvType::kBf16 : KvType::kF32;
    return pages;
  }

  static void fill_spans(KvState& state, const std::vector<py::tuple>& spans,
                         const py::array& pages) {
    const KvPages& geometry = state.plan.pages;
    const std::int64_t n_pages = pages.nbytes() / static_cast<std::int64_t>(geometry.page_bytes);
    for (const py::tuple& span : spans) {
      state.page_tables.push_back(span[3].cast<Ints>());
      const Ints& table = state.page_tables.back();
      const KvSpan s{span[0].cast<std::int64_t>(), span[1].cast<std::int64_t>(),
                     span[2].cast<std::int64_t>(), table.data()};
      bool fits =
          (s.first_index + s.n_rows + geometry.page_size - 1) / geometry.page_size <= table.size();
      for (py::ssize_t i = 0; i < table.size(); ++i) {
        fits = fits && table.data()[i] >= 0 && table.data()[i] < n_pages;
      }
      if (!fits) fail(ErrorCode::kInternal, "[testing] a span needs more pages than it was given");
      state.plan.spans.push_back(s);
    }
  }

  std::unique_ptr<Backend> backend_;
};

py::tuple quantize(Floats rows, int bits, std::int64_t group_size) {
  const std::int64_t in_dim = rows.shape(1);
  const std::int64_t per_word = 32 / bits;
  py::array_t<std::int32_t> words({rows.shape(0), (in_dim + per_word - 1) / per_word});
  py::array_t<std::uint16_t> scales({rows.shape(0), (in_dim + group_size - 1) / group_size});
  quantize_rows(rows.data(), rows.shape(0), in_dim, bits, group_size, words.mutable_data(),
                scales.mutable_data());
  return py::make_tuple(words, scales);
}

Floats read(const py::object& source, std::int64_t first_row, std::int64_t n_rows) {
  BufferGuard guard;
  const LinearSource linear = to_linear(source, guard);
  Floats out({static_cast<py::ssize_t>(n_rows), static_cast<py::ssize_t>(linear.in_dim)});
  read_rows(linear, first_row, n_rows, out.mutable_data());
  return out;
}

// Everything a packed matrix holds, as it lies in memory (packed.h).
py::array_t<std::uint8_t> packed_bytes(const Matrix& matrix) {
  const Buffer& storage = static_cast<const cpu::PackedMatrix&>(matrix).storage;
  return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(matrix.bytes),
                                   static_cast<const std::uint8_t*>(storage.data.get()));
}

std::vector<std::string> isas() {
  const auto names = cpu::supported_isas();
  return {names.begin(), names.end()};
}

}  // namespace

void bind_testing(py::module_& m) {
  py::class_<Matrix>(m, "Matrix")
      .def_readonly("out_dim", &Matrix::out_dim)
      .def_readonly("in_dim", &Matrix::in_dim)
      .def_readonly("bytes", &Matrix::bytes);
  py::class_<Mlp>(m, "Mlp");
  py::class_<Experts>(m, "Experts");
  py::class_<Ops>(m, "Ops")
      .def(py::init<const std::string&, int, bool>(), py::arg("isa") = "", py::arg("threads") = 1,
           py::arg("fast") = false)
      .def("describe", &Ops::describe)
      .def("pack", &Ops::pack, py::arg("stack"), py::arg("format"), py::arg("group_size") = 0,
           py::arg("precise") = false)
      .def("matmul", &Ops::matmul, py::arg("y").noconvert(), py::arg("x").noconvert(), py::arg("w"),
           py::arg("accumulate") = false)
      .def("embed", &Ops::embed)
      .def("layer_norm", &Ops::layer_norm, py::arg("x").noconvert(), py::arg("gain").noconvert(),
           py::arg("bias").noconvert(), py::arg("eps"))
      .def("gelu", &Ops::gelu, py::arg("x").noconvert(), py::arg("bias").noconvert())
      .def("norm", &Ops::norm, py::arg("x").noconvert(), py::arg("gain").noconvert(),
           py::arg("eps"))
      .def("make_mlp", &Ops::make_mlp, py::arg("gate"), py::arg("up"), py::arg("down"),
           py::arg("format") = "f32", py::arg("group_size") = 0)
      .def("make_experts", &Ops::make_experts, py::arg("router"), py::arg("routed"),
           py::arg("shared"), py::arg("top_k"), py::arg("format") = "f32",
           py::arg("group_size") = 0)
      .def("mlp", &Ops::mlp, py::arg("y").noconvert(), py::arg("x").noconvert(), py::arg("w"))
      .def("experts", &Ops::experts, py::arg("y").noconvert(), py::arg("x").noconvert(),
           py::arg("w"))
      .def("page_bytes", &Ops::page_bytes)
      .def("attention", &Ops::attention, py::arg("qkv").noconvert(), py::arg("pages").noconvert(),
           py::arg("layer"), py::arg("spans"), py::arg("rotation") = py::none(),
           py::arg("query_scale") = py::none());
  m.def("quantize_rows", &quantize, py::arg("rows").noconvert(), py::arg("bits"),
        py::arg("group_size"));
  m.def("read_rows", &read);
  m.def("packed_bytes", &packed_bytes);
  m.def("isas", &isas);
}

}  // namespace camelid
