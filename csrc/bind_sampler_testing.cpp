// The sampler alone, for tests/src/test_sampler.py.
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bind.h"
#include "convert.h"
#include "step/sampler.h"

namespace py = pybind11;

namespace camelid {

void bind_sampler_testing(py::module_& testing) {
  using Logits = py::array_t<float, py::array::c_style>;
  py::class_<Sampler>(testing, "Sampler")
      .def(py::init<SamplerParams, std::int64_t>(), py::arg("params"), py::arg("vocab_size"))
      .def("observe_prompt",
           [](Sampler& sampler, const std::vector<std::int32_t>& tokens) {
             sampler.observe_prompt(tokens);
           })
      .def("sample",
           [](Sampler& sampler, const Logits& logits) {
             return sampler.sample({logits.data(), static_cast<std::size_t>(logits.size())});
           })
      // From the best logits alone; None where they do not decide.
      .def("sample_top",
           [](Sampler& sampler, const Logits& best, const std::vector<std::int32_t>& tokens,
              double sum, double scaled_sum, std::int32_t not_finite) {
             const TopLogits top{{best.data(), static_cast<std::size_t>(best.size())},
                                 tokens,
                                 sum,
                                 scaled_sum,
                                 not_finite};
             return sampler.sample(top);
           });
}

}  // namespace camelid
