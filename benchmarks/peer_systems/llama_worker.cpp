// llama.cpp's side of benchmarks/peers.py, over the public interfaces of libllama and libmtmd.
//
//     llama_worker quantise IN.gguf OUT.gguf
//     llama_worker work TEXT.gguf MMPROJ.gguf PHOTO.rgb SIDE PREFIX QUESTION THREADS UBATCH NEW_TOKENS
//
// PHOTO.rgb holds SIDE x SIDE pixels of three bytes, PREFIX and QUESTION are token ids separated by commas. `work` says
// {"ready": ...} when everything is loaded and the prefix is in the cache, and then answers each line of standard input
// with one line of JSON: "check PATH" writes the image features as float32 to PATH, "run" measures one photo, one
// question and NEW_TOKENS further tokens.
#include "llama.h"
#include "mtmd.h"
#include "mtmd-helper.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[noreturn]] void fail(const std::string & what) { throw std::runtime_error(what); }

void errors_only(ggml_log_level level, const char * text, void *) {
    if (level >= GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) fputs(text, stderr);
}

std::vector<llama_token> token_ids(const std::string & list) {
    std::vector<llama_token> ids;
    std::stringstream parts(list);
    for (std::string part; std::getline(parts, part, ',');) ids.push_back(std::stoi(part));
    return ids;
}

struct ChunksFree { void operator()(mtmd_input_chunks * chunks) const { mtmd_input_chunks_free(chunks); } };
struct BitmapFree { void operator()(mtmd_bitmap * bitmap) const { mtmd_bitmap_free(bitmap); } };

class Model {
  public:
    Model(const char * text, const char * mmproj, int threads, int ubatch) {
        model_ = llama_model_load_from_file(text, llama_model_default_params());
        if (!model_) fail(std::string(text) + " cannot be loaded");
        auto of_context = llama_context_default_params();
        of_context.n_ctx = of_context.n_batch = 2048;
        of_context.n_ubatch = ubatch;
        of_context.n_threads = of_context.n_threads_batch = threads;
        context_ = llama_init_from_model(model_, of_context);
        if (!context_) fail("no context");
        auto of_vision = mtmd_context_params_default();
        of_vision.use_gpu = false;
        of_vision.n_threads = threads;
        of_vision.print_timings = false;
        vision_ = mtmd_init_from_file(mmproj, model_, of_vision);
        if (!vision_) fail(std::string(mmproj) + " cannot be loaded");
    }

    // Decodes tokens behind `past` others and returns the likeliest next one.
    llama_token decode(const std::vector<llama_token> & ids, int past) {
        llama_batch batch = llama_batch_init((int) ids.size(), 0, 1);
        batch.n_tokens = (int) ids.size();
        for (size_t i = 0; i < ids.size(); i++) {
            batch.token[i] = ids[i];
            batch.pos[i] = past + (int) i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = i + 1 == ids.size();
        }
        const int failed = llama_decode(context_, batch);
        llama_batch_free(batch);
        if (failed) fail("llama_decode returned " + std::to_string(failed));
        const float * logits = llama_get_logits_ith(context_, -1);
        const auto best = std::max_element(logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model_)));
        if (!std::isfinite(*best)) fail("the logits are not finite");
        return (llama_token) (best - logits);
    }

    void forget_after(int past) { llama_memory_seq_rm(llama_get_memory(context_), 0, past, -1); }

    llama_context * context_ = nullptr;
    mtmd_context * vision_ = nullptr;

  private:
    llama_model * model_ = nullptr;
};

// The photo as llama.cpp prepares it: resized, normalised, one chunk of image tokens.
class Photo {
  public:
    Photo(const Model & model, const char * path, int side) {
        std::ifstream file(path, std::ios::binary);
        const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
        if (bytes.size() != (size_t) side * side * 3) fail(std::string(path) + " has a wrong size");
        bitmap_.reset(mtmd_bitmap_init(side, side, (const unsigned char *) bytes.data()));
        const std::string marker = mtmd_default_marker();
        mtmd_input_text text{};
        text.text = marker.c_str();
        text.text_len = marker.size();
        text.parse_special = true;
        const mtmd_bitmap * one = bitmap_.get();
        if (mtmd_tokenize(model.vision_, chunks_.get(), &text, &one, 1)) fail("the photo cannot be prepared");
        for (size_t i = 0; i < mtmd_input_chunks_size(chunks_.get()); i++) {
            const auto * each = mtmd_input_chunks_get(chunks_.get(), i);
            if (mtmd_input_chunk_get_type(each) == MTMD_INPUT_CHUNK_TYPE_IMAGE) chunk_ = each;
        }
        if (!chunk_) fail("no image among the chunks");
    }

    const mtmd_input_chunk * chunk() const { return chunk_; }
    int tokens() const { return (int) mtmd_input_chunk_get_n_tokens(chunk_); }

  private:
    std::unique_ptr<mtmd_bitmap, BitmapFree> bitmap_;
    std::unique_ptr<mtmd_input_chunks, ChunksFree> chunks_{mtmd_input_chunks_init()};
    const mtmd_input_chunk * chunk_ = nullptr;
};

// The features (tokens, width), which stay valid until the next call.
float * encoded(const Model & model, const Photo & photo) {
    if (mtmd_encode_chunk(model.vision_, photo.chunk())) fail("the photo cannot be encoded");
    return mtmd_get_output_embd(model.vision_);
}

int quantise(const char * from, const char * to) {
    auto params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
    params.nthread = 1;
    return (int) llama_model_quantize(from, to, &params);
}

int work(char ** words) {
    const int side = std::stoi(words[3]), threads = std::stoi(words[6]), ubatch = std::stoi(words[7]);
    const int new_tokens = std::stoi(words[8]);
    const auto prefix = token_ids(words[4]), question = token_ids(words[5]);
    Model model(words[0], words[1], threads, ubatch);
    const Photo photo(model, words[2], side);
    const int before = (int) prefix.size();
    model.decode(prefix, 0);
    printf("{\"ready\": true, \"build\": \"%s\"}\n", llama_print_system_info());
    fflush(stdout);
    for (std::string line; std::getline(std::cin, line);) {
        if (line.rfind("check ", 0) == 0) {
            const float * features = encoded(model, photo);
            const size_t width = llama_model_n_embd_inp(llama_get_model(model.context_));
            std::ofstream file(line.substr(6), std::ios::binary);
            file.write((const char *) features, (std::streamsize) (photo.tokens() * width * sizeof(float)));
            if (!file) fail("the features cannot be written");
            printf("{\"compared\": \"image features\"}\n");
            fflush(stdout);
            continue;
        }
        model.forget_after(before);
        const double seen = now_ms();
        float * features = encoded(model, photo);
        const double encode_ms = now_ms() - seen;
        llama_pos past = 0;
        if (mtmd_helper_decode_image_chunk(
                model.vision_, model.context_, photo.chunk(), features, before, 0, 2048, &past, nullptr, nullptr)) {
            fail("the image cannot be prefilled");
        }
        llama_synchronize(model.context_);
        const double ready_ms = now_ms() - seen;
        const double asked = now_ms();
        llama_token token = model.decode(question, past);
        const double first_ms = now_ms() - asked;
        past += (int) question.size();
        std::string times;
        for (int i = 0; i < new_tokens; i++) {
            const double start = now_ms();
            token = model.decode({token}, past++);
            times += (i ? ", " : "") + std::to_string(now_ms() - start);
        }
        printf("{\"encode_ms\": %f, \"image_ready_ms\": %f, \"ttft_question_ms\": %f, \"token_ms\": [%s]}\n", encode_ms,
               ready_ms, first_ms, times.c_str());
        fflush(stdout);
    }
    return 0;
}

}  // namespace

int main(int count, char ** words) {
    llama_log_set(errors_only, nullptr);
    mtmd_helper_log_set(errors_only, nullptr);
    llama_backend_init();
    const std::string verb = count > 1 ? words[1] : "";
    try {
        if (verb == "quantise" && count == 4) return quantise(words[2], words[3]);
        if (verb == "work" && count == 11) return work(words + 2);
    } catch (const std::exception & error) {
        fprintf(stderr, "llama_worker: %s\n", error.what());
        return 1;
    }
    fprintf(stderr, "usage: llama_worker quantise IN OUT | work TEXT MMPROJ PHOTO SIDE PREFIX QUESTION THREADS UBATCH NEW\n");
    return 2;
}
