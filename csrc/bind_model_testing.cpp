// Single pieces of src/model for tests/parity/test_rotation.py: what a layer turns its keys by.
#include <cstdint>
#include <vector>

#include "bind.h"
#include "convert.h"
#include "model/rope.h"

namespace py = pybind11;

namespace camelid {
namespace {

py::array_t<double> frequencies(const py::object& config) {
  const std::vector<double> values = rope_frequencies(to_config(config));
  return py::array_t<double>(static_cast<py::ssize_t>(values.size()), values.data());
}

// float32 [head_dim / 2, 2]: cos, sin of each pair on a chunked layer, as a step's plan holds them.
py::array_t<float> rotation(const py::object& config, std::int64_t position) {
  const ModelConfig model = to_config(config);
  std::vector<float> values;
  append_rotation(values, rope_frequencies(model), index_in_chunk(position, model.chunk));
  return py::array_t<float>({static_cast<py::ssize_t>(values.size()) / 2, py::ssize_t{2}},
                            values.data());
}

}  // namespace

void bind_model_testing(py::module_& testing) {
  testing.def("rope_frequencies", &frequencies, py::arg("config"));
  testing.def("rotation", &rotation, py::arg("config"), py::arg("position"));
  testing.def(
      "query_temperature",
      [](const py::object& config, std::int64_t position) {
        return query_temperature(to_config(config), position);
      },
      py::arg("config"), py::arg("position"));
}

}  // namespace camelid
