// Between Python objects and the engine's plain structs: errors, model shapes, weight sources.
// Checks every buffer's size against what the engine will read. Does no arithmetic on values.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "model/config.h"
#include "model/vision.h"
#include "model/weights.h"
#include "quant/format.h"

namespace camelid {

// Makes camelid::Error arrive as the class of camelid/errors.py with its code's name.
void register_errors();

// From camelid.config.ModelConfig.
ModelConfig to_config(const pybind11::object& config);

// Holds the Python buffers behind a source alive and locked while the engine reads them.
class BufferGuard {
 public:
  // The object's contiguous bytes; throws kInvalidRequest when they are fewer than `least_bytes`.
  const void* hold(const pybind11::object& buffer, std::size_t least_bytes,
                   const std::string& name);

 private:
  std::vector<pybind11::buffer_info> buffers_;
};

// From camelid.checkpoint.LinearSource and LayerSources.
LinearSource to_linear(const pybind11::object& source, BufferGuard& guard);
LayerSources to_layer(const pybind11::object& sources, BufferGuard& guard);
VisionFrameSources to_vision_frame(const pybind11::object& sources, BufferGuard& guard);
VisionLayerSources to_vision_layer(const pybind11::object& sources, BufferGuard& guard);
std::vector<float> to_floats(const pybind11::object& array);

}  // namespace camelid
