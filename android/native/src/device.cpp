#include "device.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <thread>
#if defined(__ANDROID__)
#include <sys/system_properties.h>
#endif

namespace pruneport {
namespace {

namespace fs = std::filesystem;

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// A property of Android; empty anywhere else.
std::string property(const char* name) {
#if defined(__ANDROID__)
  char value[PROP_VALUE_MAX] = "";
  __system_property_get(name, value);
  return value;
#else
  (void)name;
  return "";
#endif
}

// The number behind `key` in a file of lines such as `VmHWM:   1234 kB`, in bytes; 0 where it is not there.
int64_t kilobytes(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key, 0) == 0) return std::atoll(line.c_str() + key.size()) * 1024;
  }
  return 0;
}

// What follows the colon behind `key` in /proc/cpuinfo.
std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0 || line.rfind("Hardware", 0) == 0) {
      const auto colon = line.find(':');
      if (colon != std::string::npos && colon + 2 <= line.size()) return line.substr(colon + 2);
    }
  }
  return "";
}

fs::path battery() {
  for (const char* name : {"battery", "BAT0", "BAT1"}) {
    const fs::path path = fs::path("/sys/class/power_supply") / name;
    std::error_code error;
    if (fs::exists(path, error)) return path;
  }
  return {};
}

}  // namespace

nlohmann::ordered_json device_info(const std::string& kind) {
  utsname system{};
  uname(&system);
  const std::string model = property("ro.product.model"), hardware = property("ro.hardware");
  const bool imitated = hardware == "ranchu" || hardware == "goldfish" || property("ro.kernel.qemu") == "1";
  std::string found = kind;
  if (found.empty()) found = model.empty() ? "desktop" : imitated ? "emulated" : "phone";
  std::string name = model.empty() ? processor() : property("ro.product.manufacturer") + " " + model;
  // An imitated processor passes on the name of the one that imitates it.
  if (name.empty() || (found == "emulated" && model.empty())) name = std::string(system.machine) + " processor";
  std::string soc = property("ro.soc.model");
  if (!soc.empty()) soc = property("ro.soc.manufacturer") + " " + soc;
  const std::string release = property("ro.build.version.release");
  return {{"name", name},
          {"kind", found},
          {"os", release.empty() ? std::string(system.sysname) + " " + system.release : "Android " + release},
          {"abi", system.machine},
          {"soc", soc},
          {"cores", std::max(1u, std::thread::hardware_concurrency())},
          {"ram_bytes", kilobytes("/proc/meminfo", "MemTotal:")}};
}

double celsius() {
  const fs::path path = battery();
  const std::string tenths = path.empty() ? "" : first_line(path / "temp");
  if (!tenths.empty()) return std::atof(tenths.c_str()) / 10;
  double hottest = std::nan("");
  std::error_code error;
  for (const auto& zone : fs::directory_iterator("/sys/class/thermal", error)) {
    const std::string line = first_line(zone.path() / "temp");
    if (line.empty()) continue;
    const double degrees = std::atof(line.c_str()) / 1000;
    if (degrees > 0 && degrees < 150 && !(degrees <= hottest)) hottest = degrees;
  }
  return hottest;
}

nlohmann::ordered_json condition(std::chrono::steady_clock::time_point start) {
  nlohmann::ordered_json state = {
      {"at_ms", std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count()}};
  if (const double degrees = celsius(); !std::isnan(degrees)) state["celsius"] = degrees;
  if (const fs::path path = battery(); !path.empty()) {
    const std::string capacity = first_line(path / "capacity"), status = first_line(path / "status");
    if (!capacity.empty()) state["battery"] = std::clamp(std::atof(capacity.c_str()) / 100, 0.0, 1.0);
    if (!status.empty()) state["charging"] = status == "Charging" || status == "Full";
  }
  return state;
}

int64_t peak_rss_bytes() { return kilobytes("/proc/self/status", "VmHWM:"); }
int64_t rss_bytes() { return kilobytes("/proc/self/status", "VmRSS:"); }

std::string now_utc() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

}  // namespace pruneport
