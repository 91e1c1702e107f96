#include "graphs.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/platform/runtime.h>

#include <chrono>
#include <fstream>
#include <map>

#if __has_include(<executorch/extension/threadpool/threadpool.h>)
#include <executorch/extension/threadpool/threadpool.h>
#else
// The wheel has the library and lacks this header of it.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool
#endif

namespace pruneport {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::runtime::BackendOption;
using executorch::runtime::BackendOptions;
using executorch::runtime::Error;
using executorch::runtime::EValue;

const char kXnnpack[] = "XnnpackBackend";

ScalarType scalar_type(const std::string& dtype) {
  static const std::map<std::string, ScalarType> kTypes = {
      {"float32", ScalarType::Float}, {"float16", ScalarType::Half}, {"int64", ScalarType::Long},
      {"int32", ScalarType::Int},     {"int8", ScalarType::Char},    {"uint8", ScalarType::Byte},
      {"bool", ScalarType::Bool}};
  const auto found = kTypes.find(dtype);
  if (found == kTypes.end()) throw Trouble("no tensor of dtype " + dtype + " can be run");
  return found->second;
}

// Whether a tensor is what a graph says of it; a dynamic axis may be shorter.
bool fits(const TensorInfo& info, const std::vector<int64_t>& shape) {
  if (shape.size() != info.shape.size()) return false;
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    bool open = false;
    for (int64_t dynamic : info.dynamic) open |= static_cast<size_t>(dynamic) == axis;
    if (shape[axis] != info.shape[axis] && !(open && shape[axis] >= 1 && shape[axis] < info.shape[axis])) return false;
  }
  return true;
}

std::string words(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

std::string hex(Error error) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", static_cast<unsigned>(error));
  return text;
}

}  // namespace

struct Graphs::Opened {
  std::map<std::string, std::unique_ptr<Module>> modules;  // by file
  std::map<std::string, Graph> graphs;
  std::map<std::string, double> load_ms;
};

Graphs::Graphs(const std::filesystem::path& folder, const Manifest& manifest, const std::filesystem::path& packed)
    : opened_(std::make_unique<Opened>()) {
  executorch::runtime::runtime_init();
  for (const auto& info : manifest.graphs) {
    if (info.engine != "executorch") {
      throw Trouble(info.name + " is for " + info.engine + "; this runner has ExecuTorch alone; use the app", true);
    }
    const auto start = std::chrono::steady_clock::now();
    auto& module = opened_->modules[info.file];
    if (!module) {
      const std::string file = (folder / info.file).string();
      if (!std::ifstream(file)) throw Trouble(file + " cannot be read");
      std::vector<std::string> data;
      for (const auto& extra : info.extra_files) data.push_back((folder / extra).string());
      module = std::make_unique<Module>(file, data, Module::LoadMode::Mmap);
      BackendOptions<2> xnnpack;
      (void)xnnpack.set_option("weight_cache_enabled", true);
      const std::string cache = packed.empty() ? "" : packed.string() + "-" + info.file;
      if (cache.size() >= executorch::runtime::kMaxOptionValueLength) throw Trouble(cache + " is too long a path");
      if (!cache.empty()) (void)xnnpack.set_option("packed_cache_path", cache.c_str());
      executorch::runtime::LoadBackendOptionsMap options;
      (void)options.set_options(kXnnpack, xnnpack.view());
      const Error error = module->load(options);
      if (error != Error::Ok) throw Trouble("ExecuTorch cannot open " + file + ": " + hex(error));
    }
    const auto names = module->method_names();
    if (!names.ok()) throw Trouble("ExecuTorch cannot read " + info.file + ": " + hex(names.error()));
    const std::string method = names->count(info.stored) ? info.stored : "forward";
    const Error error = module->load_method(method);
    if (error == Error::NotFound) throw Trouble(info.name + " needs a delegate that this runner was built without", true);
    if (error != Error::Ok) throw Trouble("ExecuTorch cannot load " + info.name + ": " + hex(error));
    Graph graph;
    graph.info_ = &info;
    graph.module_ = module.get();
    graph.method_ = method;
    opened_->graphs[info.name] = graph;
    opened_->load_ms[info.name] =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
}

Graphs::~Graphs() = default;

Graph& Graphs::at(const std::string& name) {
  const auto found = opened_->graphs.find(name);
  if (found == opened_->graphs.end()) throw Trouble("the bundle has no graph " + name);
  return found->second;
}

bool Graphs::has(const std::string& name) const { return opened_->graphs.count(name) > 0; }

double Graphs::load_ms(const std::string& name) const { return opened_->load_ms.at(name); }

Views Graph::run(const Views& inputs) {
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> values;
  for (const auto* group : {&info_->inputs, &info_->states}) {
    for (const auto& info : *group) {
      const auto found = inputs.find(info.name);
      if (found == inputs.end()) throw Trouble(info_->name + " was not given " + info.name);
      const View& view = found->second;
      if (view.dtype != info.dtype || !fits(info, view.shape)) {
        throw Trouble(info_->name + " takes " + info.name + " " + info.dtype + words(info.shape) + ", got " + view.dtype +
                      words(view.shape));
      }
      std::vector<executorch::aten::SizesType> sizes(view.shape.begin(), view.shape.end());
      tensors.push_back(executorch::extension::from_blob(const_cast<uint8_t*>(view.data), std::move(sizes),
                                                         scalar_type(view.dtype)));
      if (group == &info_->inputs) values.emplace_back(tensors.back());
    }
  }
  const auto outputs = static_cast<Module*>(module_)->execute(method_, values);
  if (!outputs.ok()) throw Trouble("ExecuTorch failed in " + info_->name + ": " + hex(outputs.error()));
  if (outputs->size() != info_->outputs.size()) {
    throw Trouble(info_->name + " gave " + std::to_string(outputs->size()) + " outputs, not " +
                  std::to_string(info_->outputs.size()));
  }
  Views given;
  for (size_t i = 0; i < outputs->size(); ++i) {
    const auto& info = info_->outputs[i];
    const auto& tensor = outputs->at(i).toTensor();
    const std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
    if (tensor.scalar_type() != scalar_type(info.dtype) || !fits(info, shape)) {
      throw Trouble(info_->name + " gave " + info.name + " as " + words(shape) + ", not " + words(info.shape));
    }
    given[info.name] = {info.dtype, shape, static_cast<const uint8_t*>(tensor.const_data_ptr())};
  }
  return given;
}

int set_threads(int threads) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (threads > 0) pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads));
  return static_cast<int>(pool->get_thread_count());
}

std::string engine_version() { return PRUNEPORT_EXECUTORCH_VERSION; }

}  // namespace pruneport
