// pruneport_runner JOB OUT [--packed PREFIX] [--kind KIND]: runs the job in the folder JOB, leaves its findings in OUT.
#include <cstdio>
#include <exception>
#include <string>

#include "job.h"

namespace {

constexpr int kBadInput = 2;

int usage() {
  std::fputs(
      "usage: pruneport_runner JOB OUT [--packed PREFIX] [--kind phone|emulated|simulator|desktop]\n"
      "JOB holds job.json, inputs.safetensors and the folder bundle; findings go into OUT\n",
      stderr);
  return kBadInput;
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) return usage();
  pruneport::Place place{words[1], words[2], {}, {}};
  for (int i = 3; i < count; i += 2) {
    const std::string flag = words[i];
    if (i + 1 == count || (flag != "--packed" && flag != "--kind")) return usage();
    if (flag == "--packed") place.packed = words[i + 1];
    if (flag == "--kind") place.kind = words[i + 1];
  }
  try {
    pruneport::run_job(place);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pruneport_runner: %s\n", error.what());
    return kBadInput;
  }
  return 0;
}
