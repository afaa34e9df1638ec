// The parts of the extension module, each in its own bind_*.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace camelid {

void bind_engine(pybind11::module_& m);
void bind_images(pybind11::module_& m);
void bind_testing(pybind11::module_& m);  // submodule `testing`: single operations
void bind_sampler_testing(pybind11::module_& testing);
void bind_model_testing(pybind11::module_& testing);
void bind_threads_testing(pybind11::module_& testing);

}  // namespace camelid
