// Tensors by name: owned, or seen in somebody else's memory.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace pruneport {

// What went wrong, in words for the findings.
struct Trouble : std::runtime_error {
  explicit Trouble(const std::string& what, bool missing = false) : std::runtime_error(what), missing(missing) {}
  bool missing;  // the runner lacks what it needs, rather than an engine refused
};

size_t bytes_of(const std::string& dtype);

inline size_t count_of(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (int64_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

// A tensor in memory that lives elsewhere.
struct View {
  std::string dtype;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;

  size_t size_bytes() const { return count_of(shape) * bytes_of(dtype); }
};

// A tensor with its own memory, all zeros when made.
struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;

  Array() = default;
  Array(std::string dtype, std::vector<int64_t> shape)
      : dtype(std::move(dtype)), shape(std::move(shape)), bytes(count_of(this->shape) * bytes_of(this->dtype)) {}
  explicit Array(const View& view)
      : dtype(view.dtype), shape(view.shape), bytes(view.data, view.data + view.size_bytes()) {}

  View view() const { return {dtype, shape, bytes.data()}; }
};

using Views = std::map<std::string, View>;
using Arrays = std::map<std::string, Array>;

}  // namespace pruneport
