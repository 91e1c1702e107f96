#include "manifest.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "array.h"

namespace pruneport {
namespace {

using Json = nlohmann::json;
constexpr int kSchemaVersion = 2;
const char kVision[] = "vision_encoder";

std::vector<TensorInfo> tensors(const Json& listed) {
  std::vector<TensorInfo> infos;
  for (const auto& entry : listed) {
    infos.push_back({entry.at("name"), entry.at("dtype"), entry.at("shape").get<std::vector<int64_t>>(),
                     entry.value("dynamic", std::vector<int64_t>{})});
  }
  return infos;
}

}  // namespace

std::vector<TensorInfo> GraphInfo::cache() const {
  std::vector<TensorInfo> found;
  for (const auto* group : {&inputs, &states}) {
    for (const auto& info : *group) {
      if (info.name.rfind("past_", 0) == 0) found.push_back(info);
    }
  }
  return found;
}

const GraphInfo* Manifest::graph(const std::string& name) const {
  for (const auto& graph : graphs) {
    if (graph.name == name) return &graph;
  }
  return nullptr;
}

Manifest read_manifest(const std::filesystem::path& folder, const std::string& vision) {
  const auto path = folder / "manifest.json";
  std::ifstream file(path);
  if (!file) throw Trouble(path.string() + " cannot be read");
  try {
    const Json json = Json::parse(file);
    if (json.at("schema_version") != kSchemaVersion) {
      throw Trouble(path.string() + " is of another version of the bundle's schema; use runner and bundle of one release");
    }
    if (!json.at("image").value("tiles", Json()).is_null()) {
      throw Trouble(path.string() + " sees a photo in tiles, which this runner cannot cut; export it without --image-size");
    }
    Json prune = json.at("prune");
    std::set<std::string> others;
    for (const auto& keep : json.value("keeps", Json::array())) {
      if (keep.at("graph") == vision) {
        prune = keep.at("prune");
      } else {
        others.insert(keep.at("graph").get<std::string>());
      }
    }
    Manifest manifest;
    manifest.name = json.at("name");
    manifest.layout = json.at("layout");
    manifest.image_tokens = prune.at("image_tokens");
    manifest.keep = prune.at("keep");
    manifest.before = json.at("frame").at("before");
    manifest.first_text = json.at("frame").at("first_text");
    if (const auto text = json.find("text"); text != json.end() && !text->is_null()) {
      manifest.has_text = true;
      manifest.end_ids = text->value("end_ids", std::vector<int64_t>{});
    }
    const auto& image = json.at("image");
    manifest.image.height = image.at("size").at(0);
    manifest.image.width = image.at("size").at(1);
    manifest.image.resize_shortest = image.at("resize_shortest");
    manifest.image.rescale = image.at("rescale");
    manifest.image.mean = image.at("mean");
    manifest.image.std = image.at("std");
    manifest.image.resample = image.value("resample", "bicubic");
    manifest.image.centre_crop = image.value("do_center_crop", true);
    for (const auto& entry : json.at("graphs")) {
      GraphInfo graph;
      graph.stored = entry.at("name");
      if (others.count(graph.stored)) continue;
      graph.name = graph.stored == vision ? kVision : graph.stored;
      graph.file = entry.at("file");
      graph.engine = entry.at("engine");
      graph.inputs = tensors(entry.at("inputs"));
      graph.outputs = tensors(entry.at("outputs"));
      graph.states = tensors(entry.value("states", Json::array()));
      graph.extra_files = entry.value("extra_files", std::vector<std::string>{});
      manifest.graphs.push_back(std::move(graph));
    }
    return manifest;
  } catch (const Json::exception& error) {
    throw Trouble(path.string() + " does not follow the bundle's schema: " + error.what());
  }
}

}  // namespace pruneport
