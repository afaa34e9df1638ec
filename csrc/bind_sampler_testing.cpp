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
      .def(
          "sample_top",
          [](Sampler& sampler, const Logits& best, const std::vector<std::int32_t>& tokens,
             double sum, double scaled_sum, std::int32_t not_finite, std::int32_t drawn,
             float drawn_logit) {
            const TopLogits top{{best.data(), static_cast<std::size_t>(best.size())},
                                tokens,
                                sum,
                                scaled_sum,
                                not_finite,
                                drawn,
                                drawn_logit};
            return sampler.sample(top);
          },
          py::arg("best"), py::arg("tokens"), py::arg("sum"), py::arg("scaled_sum"),
          py::arg("not_finite"), py::arg("drawn") = -1, py::arg("drawn_logit") = 0.0f)
      .def_property_readonly("uniform", &Sampler::uniform)
      .def_property_readonly("draws_plainly", &Sampler::draws_plainly);
}

}  // namespace camelid
