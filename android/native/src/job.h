// Runs a job: job.json and inputs.safetensors in, findings.json and outputs.safetensors out.
#pragma once

#include <filesystem>
#include <string>

namespace pruneport {

struct Place {
  std::filesystem::path job;  // job.json, inputs.safetensors, bundle/ and perhaps twin/
  std::filesystem::path out;  // where the findings go
  std::filesystem::path packed;  // prefix of files of packed weights; empty for none
  std::string kind;  // `kind` of DeviceInfo; empty to go by the system
};

// Throws Trouble where not even findings can be written.
void run_job(const Place& place);

}  // namespace pruneport
