// The graphs of a bundle, open in ExecuTorch.
#pragma once

#include <filesystem>
#include <memory>

#include "array.h"
#include "manifest.h"

namespace pruneport {

class Graphs;

// One open graph. What `run` gives lies in the engine's memory until the graph runs again.
class Graph {
 public:
  const GraphInfo& info() const { return *info_; }
  // Takes inputs and states by name; states are written into. Throws Trouble.
  Views run(const Views& inputs);

 private:
  friend class Graphs;
  const GraphInfo* info_ = nullptr;
  void* module_ = nullptr;
  std::string method_;
};

// All graphs of a bundle, each file opened once; `packed` is the file that holds the weights as the processor wants
// them: made by the first start, mapped by the later ones. Empty: weights are packed at each start.
class Graphs {
 public:
  Graphs(const std::filesystem::path& folder, const Manifest& manifest, const std::filesystem::path& packed);
  ~Graphs();
  Graphs(const Graphs&) = delete;

  // Throws Trouble for a graph that is missing, or that could not be opened.
  Graph& at(const std::string& name);
  bool has(const std::string& name) const;
  double load_ms(const std::string& name) const;

 private:
  struct Opened;
  std::unique_ptr<Opened> opened_;
};

// How many threads engines use; 0 keeps what they choose. Returns what is in force.
int set_threads(int threads);

std::string engine_version();

}  // namespace pruneport
