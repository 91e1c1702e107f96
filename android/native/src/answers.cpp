#include "answers.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <set>

namespace pruneport {
namespace {

using Clock = std::chrono::steady_clock;
// An open cache grows by so many entries: engines plan their memory anew for every new length.
constexpr int64_t kBlock = 64;
const char kVision[] = "vision_encoder", kEmbedding[] = "token_embedding", kPrefill[] = "image_prefill",
           kTextPrefill[] = "text_prefill", kDecoder[] = "text_decoder", kFront[] = "decoder_front",
           kBack[] = "decoder_back", kHead[] = "lm_head";

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

bool is_part(const std::string& name) { return name.rfind("key_", 0) == 0 || name.rfind("value_", 0) == 0; }

std::string part_of(const TensorInfo& info) { return info.name.substr(5); }  // past_key_3 -> key_3

Array whole_numbers(const std::string& dtype, const std::vector<int64_t>& numbers, std::vector<int64_t> shape) {
  Array array(dtype, std::move(shape));
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (dtype == "int64") {
      reinterpret_cast<int64_t*>(array.bytes.data())[i] = numbers[i];
    } else {
      reinterpret_cast<int32_t*>(array.bytes.data())[i] = static_cast<int32_t>(numbers[i]);
    }
  }
  return array;
}

// Entries `from`... of `source` (1, H, n, d) go into `target` (1, H, m, d) from `at` on.
void write_entries(Array& target, int64_t at, const View& source, int64_t from, int64_t count) {
  const size_t width = static_cast<size_t>(target.shape[3]) * bytes_of(target.dtype);
  for (int64_t head = 0; head < target.shape[1]; ++head) {
    std::memcpy(target.bytes.data() + (head * target.shape[2] + at) * width,
                source.data + (head * source.shape[2] + from) * width, static_cast<size_t>(count) * width);
  }
}

// The likeliest of logits (..., V), float32; the first one on ties.
int64_t likeliest(const View& logits, int64_t row) {
  const int64_t vocabulary = logits.shape.back();
  if (logits.dtype != "float32") throw Trouble("the graph gave logits as " + logits.dtype + ", not float32");
  const auto* values = reinterpret_cast<const float*>(logits.data) + row * vocabulary;
  int64_t best = 0;
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (std::isnan(values[i])) throw Trouble("the graph gave not a number instead of logits");
    if (values[i] > values[best]) best = i;
  }
  return best;
}

const TensorInfo& named(const std::vector<TensorInfo>& infos, const std::string& name) {
  for (const auto& info : infos) {
    if (info.name == name) return info;
  }
  throw Trouble("the bundle's graphs do not belong together: none has " + name);
}

// Graphs of any number of tokens; the cache holds what is filled, and grows in blocks.
class OpenAnswers : public Answers {
 public:
  OpenAnswers(Graphs& graphs, const Manifest& manifest) : Answers(graphs, manifest) {
    const auto& vision = graphs.at(kVision).info();
    const int64_t kept = named(vision.outputs, "hidden").shape[1];
    std::map<std::string, int64_t> seen;
    for (const auto& info : vision.outputs) {
      if (is_part(info.name)) seen[info.name] = info.shape[2];
    }
    for (const char* name : {kFront, kBack}) {
      if (!graphs.has(name)) continue;
      for (const auto& info : graphs.at(name).info().cache()) {
        const auto found = seen.find(part_of(info));
        const int64_t entries = found == seen.end() ? kept : found->second;
        parts_[name].push_back(part_of(info));
        infos_[part_of(info)] = info;
        entries_[part_of(info)] = entries;
      }
    }
    chunk_ = graphs.at(kEmbedding).info().inputs[0].shape[1];
    // Those in front of the cut hold every image token, so that their room is the text's.
    const auto& first = parts_.count(kFront) ? parts_[kFront][0] : parts_[kBack].at(0);
    room_ = infos_[first].shape[2] - entries_[first];
  }

  size_t cache_bytes() const override {
    size_t bytes = 0;
    for (const auto& [name, info] : infos_) {
      bytes += static_cast<size_t>(info.shape[1] * (entries_.at(name) + room_) * info.shape[3]) * bytes_of(info.dtype);
    }
    return bytes;
  }

 protected:
  void see(const Views& seen) override {
    const int64_t start = manifest_.before, end = seen.at("hidden").shape[1];
    if (prefix_.empty()) {
      for (const auto& name : parts_[kBack]) {
        auto shape = infos_[name].shape;
        shape[2] = 1;
        prefix_[name] = Array(infos_[name].dtype, shape);
      }
      if (start > 0) {
        Arrays made;
        for (const auto& [name, view] : image(seen, 0, start)) {
          if (is_part(name)) made[name] = Array(view);
        }
        prefix_ = std::move(made);
      }
    }
    const Views made = image(seen, start, end);
    for (const auto& [name, entries] : entries_) {
      Array cache = empty(name, entries);
      const auto found = made.find(name);
      if (found == made.end()) {
        write_entries(cache, 0, seen.at(name), 0, entries);
      } else {
        if (start > 0) write_entries(cache, 0, prefix_.at(name).view(), 0, start);
        write_entries(cache, start, found->second, 0, entries - start);
      }
      past_[name] = std::move(cache);
    }
  }

  int64_t read(const std::vector<int64_t>& ids, int64_t done) override {
    if (done + static_cast<int64_t>(ids.size()) > room_) throw Trouble("question and answer do not fit into the cache");
    int64_t token = 0;
    for (size_t at = 0; at < ids.size(); at += chunk_) {
      const size_t end = std::min(ids.size(), at + chunk_);
      token = decode({ids.begin() + at, ids.begin() + end}, done + at, end == ids.size());
    }
    return token;
  }

 private:
  // Runs the layers behind the cut over the image's tokens `start` to `end` behind those before them.
  Views image(const Views& seen, int64_t start, int64_t end) {
    auto& graph = graphs_.at(kBack);
    const auto rows = [&](const View& view, size_t tail) {
      View part = view;
      const size_t width = tail * bytes_of(view.dtype);
      part.shape[1] = end - start;
      part.data += static_cast<size_t>(start) * width;
      return part;
    };
    const View& hidden = seen.at("hidden");
    const Array filled = whole_numbers("int64", {start}, {1});
    Views inputs{{"hidden", rows(hidden, static_cast<size_t>(hidden.shape[2]))},
                 {"positions", rows(seen.at("positions"), 1)},
                 {"filled", filled.view()}};
    for (const auto& [name, array] : prefix_) inputs["past_" + name] = array.view();
    return graph.run(inputs);
  }

  Array empty(const std::string& name, int64_t entries) const {
    auto shape = infos_.at(name).shape;
    shape[2] = std::min((entries + 1 + kBlock - 1) / kBlock * kBlock, entries_.at(name) + room_);
    return Array(infos_.at(name).dtype, shape);
  }

  int64_t decode(const std::vector<int64_t>& ids, int64_t done, bool last) {
    const auto count = static_cast<int64_t>(ids.size());
    const Array numbers = whole_numbers(graphs_.at(kEmbedding).info().inputs[0].dtype, ids, {1, count});
    View hidden = graphs_.at(kEmbedding).run({{"ids", numbers.view()}}).at("inputs_embeds");
    std::vector<int64_t> at(ids.size());
    for (int64_t i = 0; i < count; ++i) at[i] = manifest_.first_text + done + i;
    for (const char* name : {kFront, kBack}) {
      if (!parts_.count(name)) continue;
      auto& graph = graphs_.at(name);
      const Array positions = whole_numbers(graph.info().inputs[1].dtype, at, {1, count});
      const int64_t filled = entries_.at(parts_[name][0]) + done;
      const Array behind = whole_numbers("int64", {filled}, {1});
      Views inputs{{graph.info().inputs[0].name, hidden}, {"positions", positions.view()}, {"filled", behind.view()}};
      for (const auto& part : parts_[name]) inputs["past_" + part] = past_.at(part).view();
      const Views given = graph.run(inputs);
      hidden = given.at(graph.info().outputs[0].name);
      for (const auto& part : parts_[name]) {
        Array& cache = past_.at(part);
        if (filled + count > cache.shape[2]) {
          Array grown = empty(part, filled + count);
          write_entries(grown, 0, cache.view(), 0, filled);
          cache = std::move(grown);
        }
        write_entries(cache, filled, given.at(part), 0, count);
      }
    }
    if (!last) return 0;
    View end = hidden;
    end.shape[1] = 1;
    end.data += static_cast<size_t>(count - 1) * hidden.shape[2] * bytes_of(hidden.dtype);
    return likeliest(graphs_.at(kHead).run({{"last_hidden", end}}).at("logits"), 0);
  }

  std::map<std::string, std::vector<std::string>> parts_;  // keys and values, by the graph that attends to them
  std::map<std::string, TensorInfo> infos_;
  std::map<std::string, int64_t> entries_;  // of the image
  int64_t chunk_ = 1, room_ = 0;
  Arrays past_, prefix_;
};

// Graphs of fixed numbers of tokens; the cache is as large as it can become.
class StaticAnswers : public Answers {
 public:
  StaticAnswers(Graphs& graphs, const Manifest& manifest) : Answers(graphs, manifest) {
    const auto& prefill = graphs.at(kTextPrefill).info();
    if (!prefill.states.empty()) throw Trouble("this runner keeps the cache itself; the bundle's engine would", true);
    for (const char* name : {kVision, kPrefill}) {
      for (const auto& info : graphs.at(name).info().outputs) {
        if (is_part(info.name)) entries_[info.name] = info.shape[2];
      }
    }
    for (const auto& info : prefill.cache()) past_[part_of(info)] = Array(info.dtype, info.shape);
    for (const auto& [name, entries] : entries_) room_ = past_.at(name).shape[2] - entries;
    chunk_ = named(prefill.inputs, "inputs_embeds").shape[1];
  }

  size_t cache_bytes() const override {
    size_t bytes = 0;
    for (const auto& [name, array] : past_) bytes += array.bytes.size();
    return bytes;
  }

 protected:
  void see(const Views& seen) override {
    auto& prefill = graphs_.at(kPrefill);
    Views taken;
    for (const auto& info : prefill.info().inputs) taken[info.name] = seen.at(info.name);
    const Views made = prefill.run(taken);
    for (const auto& [name, entries] : entries_) {
      write_entries(past_.at(name), 0, made.count(name) ? made.at(name) : seen.at(name), 0, entries);
    }
  }

  int64_t read(const std::vector<int64_t>& ids, int64_t done) override {
    if (done + static_cast<int64_t>(ids.size()) > room_) throw Trouble("question and answer do not fit into the cache");
    int64_t token = 0;
    for (size_t at = 0; at < ids.size(); at += chunk_) {
      token = decode({ids.begin() + at, ids.begin() + std::min(ids.size(), at + chunk_)}, done + at);
    }
    return token;
  }

 private:
  int64_t decode(const std::vector<int64_t>& ids, int64_t done) {
    auto& graph = graphs_.at(ids.size() == 1 ? kDecoder : kTextPrefill);
    const int64_t size = ids.size() == 1 ? 1 : chunk_;
    auto padded = ids;
    padded.resize(graphs_.at(kEmbedding).info().inputs[0].shape[1]);
    const Array numbers = whole_numbers(graphs_.at(kEmbedding).info().inputs[0].dtype, padded,
                                        {1, static_cast<int64_t>(padded.size())});
    View embeds = graphs_.at(kEmbedding).run({{"ids", numbers.view()}}).at("inputs_embeds");
    embeds.shape[1] = size;
    std::vector<int64_t> at(size);
    // Padding takes the last position there is; what it computes is dropped.
    for (int64_t i = 0; i < size; ++i) at[i] = manifest_.first_text + std::min(done + i, room_ - 1);
    const Array positions = whole_numbers(named(graph.info().inputs, "positions").dtype, at, {1, size});
    Views inputs{{"inputs_embeds", embeds}, {"positions", positions.view()}};
    for (const auto& [name, array] : past_) inputs["past_" + name] = array.view();
    const Views given = graph.run(inputs);
    for (const auto& [name, entries] : entries_) {
      write_entries(past_.at(name), entries + done, given.at(name), 0, static_cast<int64_t>(ids.size()));
    }
    return likeliest(given.at("logits"), static_cast<int64_t>(ids.size()) - 1);
  }

  std::map<std::string, int64_t> entries_;
  Arrays past_;
  int64_t room_ = 0, chunk_ = 1;
};

}  // namespace

std::unique_ptr<Answers> Answers::over(Graphs& graphs, const Manifest& manifest) {
  if (!manifest.has_text) throw Trouble(manifest.name + " has no text graphs and cannot answer");
  if (graphs.has(kBack)) return std::make_unique<OpenAnswers>(graphs, manifest);
  return std::make_unique<StaticAnswers>(graphs, manifest);
}

std::vector<int64_t> Answers::answer(const View& pixel_values, const std::vector<int64_t>& question, int64_t count,
                                     AnswerTimes& times) {
  const auto start = Clock::now();
  const Views seen = graphs_.at(kVision).run({{"pixel_values", pixel_values}});
  times.vision = ms_since(start);
  const auto behind = Clock::now();
  see(seen);
  times.image_prefill = ms_since(behind);
  times.image_ready = ms_since(start);

  const auto asked = Clock::now();
  std::vector<int64_t> ids{read(question, 0)};
  times.question_prefill = times.ttft_question = ms_since(asked);
  while (static_cast<int64_t>(ids.size()) < count) {
    const auto next = Clock::now();
    ids.push_back(read({ids.back()}, static_cast<int64_t>(question.size() + ids.size()) - 1));
    times.tokens.push_back(ms_since(next));
  }
  return ids;
}

}  // namespace pruneport
