// Files of named tensors: eight bytes of length, a header in JSON, the tensors one behind the other.
#pragma once

#include <filesystem>

#include "array.h"

namespace pruneport {

// A mapped file; its views live as long as it does.
class TensorFile {
 public:
  explicit TensorFile(const std::filesystem::path& path);
  ~TensorFile();
  TensorFile(const TensorFile&) = delete;

  const Views& tensors() const { return tensors_; }

 private:
  void* mapped_ = nullptr;
  size_t size_ = 0;
  Views tensors_;
};

void write_tensors(const std::filesystem::path& path, const Arrays& tensors);

}  // namespace pruneport
