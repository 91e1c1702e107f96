#include "job.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "answers.h"
#include "device.h"
#include "graphs.h"
#include "manifest.h"
#include "photo.h"
#include "safetensors.h"

namespace pruneport {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using Json = nlohmann::json;
using Record = nlohmann::ordered_json;
constexpr int kJobVersion = 1, kFindingsVersion = 1;
const char kVision[] = "vision_encoder";

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

Record trouble(const Trouble& error) { return {{"message", error.what()}, {"missing", error.missing}}; }

// One line a stage, for whoever watches the runner's output.
void say(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::fflush(stdout);
}

Record run_of(const AnswerTimes& times, double preprocess, bool twin, bool warmup) {
  return {{"twin", twin},
          {"warmup", warmup},
          {"preprocess_ms", preprocess},
          {"vision_ms", times.vision},
          {"image_prefill_ms", times.image_prefill},
          {"image_ready_ms", times.image_ready},
          {"question_prefill_ms", times.question_prefill},
          {"ttft_question_ms", times.ttft_question},
          {"ttft_photo_ms", preprocess + times.image_ready + times.ttft_question},
          {"token_ms", times.tokens}};
}

// A bundle, its graphs open, ready to answer.
struct Side {
  Manifest manifest;
  std::unique_ptr<Graphs> graphs;
  std::unique_ptr<Answers> answers;
};

// One walk over a job.
class Run {
 public:
  explicit Run(const Place& place) : place_(place), start_(Clock::now()) {}

  void all() {
    read_job();
    findings_["started_utc"] = now_utc();
    findings_["device"] = device_info(place_.kind);
    findings_["runner"] = {{"name", "pruneport native runner"},
                           {"version", PRUNEPORT_VERSION},
                           {"engine", "executorch"},
                           {"engine_version", engine_version()}};
    findings_["threads"] = set_threads(job_.value("threads", 0));
    look();
    try {
      inputs_ = std::make_unique<TensorFile>(place_.job / "inputs.safetensors");
      open();
      probe();
      prepare_photo();
      for (const auto& step : job_.at("steps")) run_step(step);
      if (const auto wanted = job_.find("answer"); wanted != job_.end() && !wanted->is_null()) answer(*wanted);
    } catch (const Trouble& error) {
      findings_["trouble"] = trouble(error);
    } catch (const Json::exception& error) {
      findings_["trouble"] = trouble(Trouble(std::string("job.json does not follow its schema: ") + error.what()));
    }
    look();
    bundle_ = {};
    twin_ = {};
    findings_["memory"] = {{"peak_rss_bytes", peak_rss_bytes()}, {"after_close_bytes", rss_bytes()}};
    write();
  }

 private:
  void read_job() {
    const fs::path path = place_.job / "job.json";
    std::ifstream file(path);
    if (!file) throw Trouble(path.string() + " cannot be read");
    job_ = Json::parse(file, nullptr, false);
    if (!job_.is_object() || job_.value("job_version", 0) != kJobVersion) {
      throw Trouble(path.string() + " is no job of version " + std::to_string(kJobVersion));
    }
    try {
      findings_["job"] = job_.at("id");
      findings_["bundle"] = job_.at("bundle");
      if (const auto twin = job_.find("twin"); twin != job_.end() && !twin->is_null()) {
        findings_["twin"] = twin->at("bundle");
      }
    } catch (const Json::exception& error) {
      throw Trouble(path.string() + " does not follow its schema: " + error.what());
    }
  }

  void look() { conditions_.push_back(condition(start_)); }

  // Opens the graphs: twice where this is the first start, since the first packs weights for the later ones.
  void open() {
    const fs::path folder = place_.job / job_.at("folder").get<std::string>();
    bundle_.manifest = read_manifest(folder, job_.at("vision"));
    bool first = !place_.packed.empty();
    for (const auto& graph : bundle_.manifest.graphs) {
      first &= !fs::exists(place_.packed.string() + "-" + graph.file);
    }
    say("opening the graphs");
    std::vector<double> first_ms, later_ms;
    for (int turn = 0; turn < (first ? 2 : 1); ++turn) {
      bundle_.graphs.reset();
      const auto start = Clock::now();
      bundle_.graphs = std::make_unique<Graphs>(folder, bundle_.manifest, place_.packed);
      (first && turn == 0 ? first_ms : later_ms).push_back(ms_since(start));
    }
    if (place_.packed.empty()) first_ms.swap(later_ms);
    findings_["load"] = {{"first_ms", first_ms}, {"later_ms", later_ms}};
  }

  // In how many bits float16 products are added up here: ones are lost beside 2048 where sums are float16.
  void probe() {
    const fs::path path = place_.job / "accumulator.pte";
    if (!fs::exists(path)) return;
    constexpr int64_t kRows = 8, kDepth = 256, kColumns = 16;
    GraphInfo info;
    info.name = info.stored = "forward";
    info.file = path.filename().string();
    info.engine = "executorch";
    info.inputs = {{"row", "float16", {1, kRows, kDepth}, {}}};
    info.outputs = {{"sums", "float16", {1, kRows, kColumns}, {}}};
    Manifest manifest;
    manifest.graphs = {info};
    constexpr uint16_t kOne = 0x3c00, k2048 = 0x6800;
    Array row("float16", {1, kRows, kDepth});
    auto* values = reinterpret_cast<uint16_t*>(row.bytes.data());
    for (int64_t i = 0; i < kRows * kDepth; ++i) values[i] = i % kDepth == 0 ? k2048 : kOne;
    Graphs graphs(place_.job, manifest, {});
    const View sums = graphs.at("forward").run({{"row", row.view()}}).at("sums");
    // 2048 + 255 rounds to 2304 in float16; positive float16 numbers are in the order of their bits.
    constexpr uint16_t k2302 = 0x687f;
    uint16_t least = UINT16_MAX;
    for (size_t i = 0; i < count_of(sums.shape); ++i) {
      least = std::min(least, reinterpret_cast<const uint16_t*>(sums.data)[i]);
    }
    findings_["accumulator_bits"] = least >= k2302 ? 32 : 16;
  }

  void run_step(const Json& step) {
    const std::string name = step.at("graph"), at = step.at("step"), key = name + "/" + at + "/";
    Record found = {{"graph", name}, {"step", at}};
    try {
      say("running " + (name == at ? name : name + " at " + at));
      Graph& graph = bundle_.graphs->at(name);
      Views inputs;
      for (const auto& info : graph.info().inputs) inputs[info.name] = input("in/" + key + info.name);
      if (!graph.info().states.empty()) throw Trouble("this runner has no engine that keeps states", true);
      for (const auto& [output, view] : graph.run(inputs)) outputs_["out/" + key + output] = Array(view);
      found["load_ms"] = {bundle_.graphs->load_ms(name)};
      if (const auto timing = job_.find("timing"); timing != job_.end() && !timing->is_null()) {
        cool();
        std::vector<double> warmup, times;
        for (int i = 0; i < timing->at("warmup"); ++i) warmup.push_back(timed(graph, inputs));
        for (int i = 0; i < timing->at("runs"); ++i) times.push_back(timed(graph, inputs));
        found["warmup_ms"] = warmup;
        found["run_ms"] = times;
        look();
      }
    } catch (const Trouble& error) {
      found["trouble"] = trouble(error);
    }
    steps_.push_back(found);
  }

  static double timed(Graph& graph, const Views& inputs) {
    const auto start = Clock::now();
    graph.run(inputs);
    return ms_since(start);
  }

  View input(const std::string& name) const {
    const auto found = inputs_->tensors().find(name);
    if (found == inputs_->tensors().end()) throw Trouble("inputs.safetensors has no " + name);
    return found->second;
  }

  void answer(const Json& wanted) {
    Record found = {{"image_tokens_before", bundle_.manifest.image_tokens},
                    {"image_tokens_after", bundle_.manifest.keep},
                    {"question_tokens", wanted.at("question").size()}};
    try {
      const auto question = wanted.at("question").get<std::vector<int64_t>>();
      const int64_t count = wanted.at("new_tokens");
      say("answering");
      // Of the job, so that answers can be compared, or of its photo.
      const bool own = !inputs_->tensors().count("pixel_values") && has_photo_;
      pixels_ = own ? outputs_.at("pixel_values") : Array(input("pixel_values"));
      bundle_.answers = Answers::over(*bundle_.graphs, bundle_.manifest);
      found["cache_bytes"] = bundle_.answers->cache_bytes();
      AnswerTimes times;
      found["ids"] = bundle_.answers->answer(pixels_.view(), question, count, times);
      Record runs = Record::array();
      if (const auto timing = job_.find("timing"); timing != job_.end() && !timing->is_null()) {
        open_twin();
        const int turns = timing->at("answers");
        for (int turn = 0; turn <= turns; ++turn) {
          say("timing answers, " + std::to_string(turn) + " of " + std::to_string(turns));
          cool();
          // The first turn warms up; the order is swapped each time, so that drift hits both alike.
          for (const bool twin : {turn % 2 == 1, turn % 2 == 0}) {
            Side& side = twin ? twin_ : bundle_;
            if (side.answers) runs.push_back(one_answer(side, question, count, twin, turn == 0));
          }
          look();
        }
      } else {
        runs.push_back(run_of(times, photo_ms_, false, true));
      }
      found["runs"] = runs;
    } catch (const Trouble& error) {
      found["trouble"] = trouble(error);
    }
    findings_["answer"] = found;
  }

  Record one_answer(Side& side, const std::vector<int64_t>& question, int64_t count, bool twin, bool warmup) {
    double preprocess = 0;
    Array pixels = pixels_;
    if (has_photo_) {
      const auto start = Clock::now();
      pixels = pixel_values(input("photo"), side.manifest.image);
      preprocess = ms_since(start);
    }
    AnswerTimes times;
    side.answers->answer(pixels.view(), question, count, times);
    return run_of(times, preprocess, twin, warmup);
  }

  void prepare_photo() {
    if (!inputs_->tensors().count("photo")) return;
    try {
      const auto start = Clock::now();
      outputs_["pixel_values"] = pixel_values(input("photo"), bundle_.manifest.image);
      photo_ms_ = ms_since(start);
      has_photo_ = true;
    } catch (const Trouble& error) {
      findings_["photo_refused"] = error.what();
    }
  }

  void open_twin() {
    const auto twin = job_.find("twin");
    if (twin == job_.end() || twin->is_null()) return;
    const fs::path folder = place_.job / twin->at("folder").get<std::string>();
    twin_.manifest = read_manifest(folder, twin->at("vision"));
    const fs::path packed = place_.packed.empty() ? "" : fs::path(place_.packed.string() + "-twin");
    twin_.graphs = std::make_unique<Graphs>(folder, twin_.manifest, packed);
    twin_.answers = Answers::over(*twin_.graphs, twin_.manifest);
  }

  // Waits until the device is as cool as the job wants it.
  void cool() {
    const auto gate = job_.find("gate");
    if (gate == job_.end() || gate->is_null()) return;
    const double most = gate->at("most_celsius"), wait_s = gate->at("wait_s");
    const auto start = Clock::now();
    double now = celsius();
    while (now > most && waited_s_ + ms_since(start) / 1e3 < wait_s) {
      std::this_thread::sleep_for(std::chrono::seconds(1));
      now = celsius();
    }
    waited_s_ += ms_since(start) / 1e3;
    Record found = {{"waited_s", waited_s_}, {"passed", nullptr}};
    if (!std::isnan(now)) found["passed"] = now <= most && findings_.value("gate", found).value("passed", true);
    findings_["gate"] = found;
  }

  // The tensors first: where findings.json is there, all is.
  void write() {
    findings_["steps"] = steps_;
    findings_["conditions"] = conditions_;
    findings_["ended_utc"] = now_utc();
    findings_["findings_version"] = kFindingsVersion;
    std::error_code error;
    fs::create_directories(place_.out, error);
    write_tensors(place_.out / "outputs.safetensors", outputs_);
    const fs::path beside = place_.out / ".findings.json";
    std::ofstream file(beside, std::ios::trunc);
    file << findings_.dump(1, ' ', false, Record::error_handler_t::replace) << "\n";
    file.close();
    if (!file) throw Trouble(beside.string() + " cannot be written: is the device full?");
    fs::rename(beside, place_.out / "findings.json");
  }

  Place place_;
  Clock::time_point start_;
  Json job_;
  Record findings_, steps_ = Record::array(), conditions_ = Record::array();
  std::unique_ptr<TensorFile> inputs_;
  Side bundle_, twin_;
  Array pixels_;
  Arrays outputs_;
  bool has_photo_ = false;
  double waited_s_ = 0, photo_ms_ = 0;
};

}  // namespace

void run_job(const Place& place) { Run(place).all(); }

}  // namespace pruneport
