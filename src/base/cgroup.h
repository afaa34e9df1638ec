// What the control groups of this process allow, as text. Linux only: elsewhere there is nothing to
// read. Knows no unit and no policy; threads.cpp and arena.cpp give the numbers their meaning.
#pragma once

#include <string>
#include <vector>

namespace camelid {

// The whole file, or "" when it cannot be read.
std::string read_small_file(const std::string& path);

// Folders of this process's control group from its own up to the root: every one of them limits it.
// `controller` names the version 1 hierarchy ("cpu", "memory"); version 2 has a single one.
std::vector<std::string> cgroup_folders(const std::string& controller);

}  // namespace camelid
