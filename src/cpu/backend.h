// The CPU backend's factory.
#pragma once

#include <memory>
#include <string_view>

#include "backend/backend.h"

namespace camelid {

// `isa` forces an instruction set by name; by default CAMELID_CPU_ISA or the machine decides.
std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options, std::string_view isa = {});

}  // namespace camelid
