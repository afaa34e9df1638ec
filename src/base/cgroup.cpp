// Control groups, versions 1 and 2, from /proc/self/cgroup and /sys/fs/cgroup.
#include "base/cgroup.h"

#include <fstream>
#include <sstream>

namespace camelid {
namespace {

// Appends root + path, then each parent, then root itself.
void append_upwards(std::vector<std::string>& folders, const std::string& root, std::string path) {
  while (!path.empty() && path != "/") {
    folders.push_back(root + path);
    path.erase(path.find_last_of('/'));
  }
  folders.push_back(root);
}

bool lists(const std::string& controllers, const std::string& wanted) {
  std::istringstream parts(controllers);
  for (std::string part; std::getline(parts, part, ',');) {
    if (part == wanted) return true;
  }
  return false;
}

}  // namespace

std::string read_small_file(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (file) text << file.rdbuf();
  return text.str();
}

std::vector<std::string> cgroup_folders(const std::string& controller) {
  std::vector<std::string> folders;
  std::istringstream lines(read_small_file("/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {  // hierarchy:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      append_upwards(folders, "/sys/fs/cgroup", path);
    } else if (lists(controllers, controller)) {
      append_upwards(folders, "/sys/fs/cgroup/" + controller, path);
    }
  }
  return folders;
}

}  // namespace camelid
