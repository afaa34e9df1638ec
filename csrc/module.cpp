// The extension module camelid._core: what python/camelid/_core.pyi describes.
#include "bind.h"
#include "convert.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled engine. Private: use camelid.LLM.";
  m.attr("__version__") = CAMELID_VERSION;
  camelid::register_errors();
  camelid::bind_engine(m);
  camelid::bind_images(m);
  py::module_ testing = m.def_submodule("testing", "Single operations, for tests only.");
  camelid::bind_testing(testing);
  camelid::bind_sampler_testing(testing);
  camelid::bind_model_testing(testing);
  camelid::bind_threads_testing(testing);
}
