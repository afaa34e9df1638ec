// The resize of images, on NumPy arrays. Checks their layout against what src/image/ will touch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "base/error.h"
#include "bind.h"
#include "image/resize.h"

namespace py = pybind11;

namespace camelid {
namespace {

using Bytes = py::array_t<std::uint8_t>;

// Rows may be apart, as in a part of a larger image; pixels and channels may not.
void check_layout(const Bytes& image, const char* name) {
  const bool shaped = image.ndim() == 3 && image.shape(2) == kImageChannels;
  if (!shaped || image.strides(2) != 1 || image.strides(1) != kImageChannels ||
      image.strides(0) < image.shape(1) * kImageChannels) {
    fail(ErrorCode::kInvalidRequest, "[image] ", name,
         " is not a uint8 array [height, width, 3] with whole rows.");
  }
}

void resize(const Bytes& pixels, Bytes out) {
  check_layout(pixels, "pixels");
  check_layout(out, "out");
  const ImageView from{pixels.data(), pixels.shape(0), pixels.shape(1), pixels.strides(0)};
  const ImageSpan to{out.mutable_data(), out.shape(0), out.shape(1), out.strides(0)};
  const py::gil_scoped_release release;
  resize_image(from, to);
}

}  // namespace

void bind_images(py::module_& m) {
  m.def("resize_image", &resize, py::arg("pixels").noconvert(), py::arg("out").noconvert());
}

}  // namespace camelid
