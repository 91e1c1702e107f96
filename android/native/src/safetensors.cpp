#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

namespace pruneport {
namespace {

using Json = nlohmann::json;

const std::map<std::string, std::string> kNames = {{"F32", "float32"}, {"F16", "float16"}, {"I64", "int64"},
                                                   {"I32", "int32"},   {"I8", "int8"},     {"U8", "uint8"},
                                                   {"BOOL", "bool"}};

}  // namespace

size_t bytes_of(const std::string& dtype) {
  if (dtype == "int64") return 8;
  if (dtype == "float32" || dtype == "int32") return 4;
  if (dtype == "float16") return 2;
  if (dtype == "int8" || dtype == "uint8" || dtype == "bool") return 1;
  throw Trouble("no tensor of dtype " + dtype + " can be held");
}

TensorFile::TensorFile(const std::filesystem::path& path) {
  const std::string where = path.string();
  const int file = ::open(where.c_str(), O_RDONLY);
  struct stat status{};
  if (file < 0 || ::fstat(file, &status) != 0) {
    if (file >= 0) ::close(file);
    throw Trouble(where + " cannot be read: " + std::strerror(errno));
  }
  size_ = static_cast<size_t>(status.st_size);
  mapped_ = size_ < 8 ? MAP_FAILED : ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  ::close(file);
  if (mapped_ == MAP_FAILED) {
    mapped_ = nullptr;
    throw Trouble(where + " is no safetensors file");
  }
  const auto* data = static_cast<const uint8_t*>(mapped_);
  uint64_t length = 0;
  std::memcpy(&length, data, 8);
  if (length > size_ - 8) throw Trouble(where + " is truncated");
  const Json header = Json::parse(data + 8, data + 8 + length, nullptr, false);
  if (!header.is_object()) throw Trouble(where + " has no header");
  const uint8_t* begin = data + 8 + length;
  const size_t room = size_ - 8 - length;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    try {
      View view{kNames.at(entry.at("dtype").get<std::string>()), entry.at("shape").get<std::vector<int64_t>>(), nullptr};
      const auto from = entry.at("data_offsets").at(0).get<uint64_t>();
      const auto to = entry.at("data_offsets").at(1).get<uint64_t>();
      if (from > to || to > room || to - from != view.size_bytes()) throw Trouble(where + ": " + name + " lies outside");
      view.data = begin + from;
      tensors_.emplace(name, std::move(view));
    } catch (const Json::exception&) {
      throw Trouble(where + " describes " + name + " in no way that is known");
    } catch (const std::out_of_range&) {
      throw Trouble(where + ": " + name + " is of no dtype that is known");
    }
  }
}

TensorFile::~TensorFile() {
  if (mapped_ != nullptr) ::munmap(mapped_, size_);
}

void write_tensors(const std::filesystem::path& path, const Arrays& tensors) {
  Json header = Json::object();
  uint64_t at = 0;
  for (const auto& [name, array] : tensors) {
    std::string dtype;
    for (const auto& [stored, ours] : kNames) {
      if (ours == array.dtype) dtype = stored;
    }
    header[name] = {{"dtype", dtype}, {"shape", array.shape}, {"data_offsets", {at, at + array.bytes.size()}}};
    at += array.bytes.size();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(&length), 8);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  for (const auto& [name, array] : tensors) {
    file.write(reinterpret_cast<const char*>(array.bytes.data()), static_cast<std::streamsize>(array.bytes.size()));
  }
  file.close();
  if (!file) throw Trouble(path.string() + " cannot be written: is the device full?");
}

}  // namespace pruneport
