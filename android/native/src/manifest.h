// What the runner reads of manifest.json.
#pragma once

#include <array>
#include <filesystem>
#include <string>
#include <vector>

namespace pruneport {

struct TensorInfo {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;  // of a dynamic axis the most
  std::vector<int64_t> dynamic;
};

struct GraphInfo {
  std::string name;  // what the keep at hand calls it
  std::string stored;  // what its file calls it
  std::string file;
  std::string engine;
  std::vector<TensorInfo> inputs, outputs, states;
  std::vector<std::string> extra_files;

  std::vector<TensorInfo> cache() const;  // inputs or states
};

struct ImageInfo {
  int height = 0, width = 0, resize_shortest = 0;
  float rescale = 0;
  std::array<float, 3> mean{}, std{};
  std::string resample;
  bool centre_crop = true;
};

struct Manifest {
  std::string name, layout;
  std::vector<GraphInfo> graphs;
  ImageInfo image;
  int64_t image_tokens = 0, keep = 0, before = 0, first_text = 0;
  std::vector<int64_t> end_ids;
  bool has_text = false;

  const GraphInfo* graph(const std::string& name) const;
};

// Reads a bundle's manifest at the keep whose vision graph has that name. Throws Trouble.
Manifest read_manifest(const std::filesystem::path& folder, const std::string& vision);

}  // namespace pruneport
