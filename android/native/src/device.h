// The device that the runner is on, as its system tells.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>

namespace pruneport {

// `DeviceInfo` of findings.json; `kind` overrides what the system looks like.
nlohmann::ordered_json device_info(const std::string& kind);

// `Condition` of findings.json.
nlohmann::ordered_json condition(std::chrono::steady_clock::time_point start);

// Degrees Celsius; NaN without a thermometer that may be read.
double celsius();

// Bytes of this process: the highest, and now.
int64_t peak_rss_bytes();
int64_t rss_bytes();

// 2026-01-31T12:00:00Z
std::string now_utc();

}  // namespace pruneport
