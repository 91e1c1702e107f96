// Answers about a photo: the image is prefilled when it arrives, and a question costs only its own tokens.
#pragma once

#include <functional>
#include <memory>

#include "graphs.h"

namespace pruneport {

// Milliseconds of one photo and one question; see AnswerRun in docs/findings.schema.json.
struct AnswerTimes {
  double vision = 0, image_prefill = 0, image_ready = 0, question_prefill = 0, ttft_question = 0;
  std::vector<double> tokens;
};

// One bundle's text graphs over one KV cache.
class Answers {
 public:
  static std::unique_ptr<Answers> over(Graphs& graphs, const Manifest& manifest);
  virtual ~Answers() = default;

  // Fills the cache with the photo `pixel_values`, and answers `question` greedily with `count` tokens, past any end.
  std::vector<int64_t> answer(const View& pixel_values, const std::vector<int64_t>& question, int64_t count,
                              AnswerTimes& times);
  virtual size_t cache_bytes() const = 0;

 protected:
  Answers(Graphs& graphs, const Manifest& manifest) : graphs_(graphs), manifest_(manifest) {}
  virtual void see(const Views& seen) = 0;
  // The likeliest token behind `ids`, whose entries go into the cache behind `done` text tokens.
  virtual int64_t read(const std::vector<int64_t>& ids, int64_t done) = 0;

  Graphs& graphs_;
  const Manifest& manifest_;
};

}  // namespace pruneport
