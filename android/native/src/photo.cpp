#include "photo.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pruneport {
namespace {

constexpr int kMaxAspect = 50;
// Weights are whole numbers of this fraction: what is left of 32 bits beside 8 of a sample and 2 for a sum beyond it.
constexpr int kBits = 32 - 8 - 2;

struct Kernel {
  double reach;
  double (*weight)(double);
};

double triangle(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

double sinc(double x) { return x == 0 ? 1 : std::sin(x * M_PI) / (x * M_PI); }
double lanczos(double x) { return std::abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0; }

// Of one output sample: where its input samples begin, and their weights.
struct Taps {
  int first;
  std::vector<int> weights;
};

std::vector<Taps> taps(int from, int to, const std::string& resample) {
  std::vector<Taps> all(to);
  const double scale = static_cast<double>(from) / to;
  if (resample == "nearest") {
    for (int i = 0; i < to; ++i) all[i] = {std::min(from - 1, static_cast<int>((i + 0.5) * scale)), {1 << kBits}};
    return all;
  }
  const Kernel kernel = resample == "bilinear" ? Kernel{1, triangle}
                        : resample == "lanczos" ? Kernel{3, lanczos}
                                                : Kernel{2, cubic};
  const double stretch = std::max(scale, 1.0), reach = kernel.reach * stretch;
  for (int i = 0; i < to; ++i) {
    const double centre = (i + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(centre - reach + 0.5));
    const int last = std::min(from, static_cast<int>(centre + reach + 0.5));
    std::vector<double> exact(last - first);
    double sum = 0;
    for (int j = first; j < last; ++j) sum += exact[j - first] = kernel.weight((j - centre + 0.5) / stretch);
    all[i].first = first;
    for (double weight : exact) {
      const double scaled = (sum != 0 ? weight / sum : weight) * (1 << kBits);
      all[i].weights.push_back(static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
    }
  }
  return all;
}

using Pixels = std::vector<uint8_t>;

// Rows (rows, from, 3) -> (rows, to, 3).
Pixels resized_rows(const uint8_t* pixels, int rows, int from, int to, const std::string& resample) {
  if (from == to) return Pixels(pixels, pixels + static_cast<size_t>(rows) * from * 3);
  Pixels out(static_cast<size_t>(rows) * to * 3);
  const auto all = taps(from, to, resample);
  for (int y = 0; y < rows; ++y) {
    const uint8_t* row = pixels + static_cast<size_t>(y) * from * 3;
    for (int x = 0; x < to; ++x) {
      for (int channel = 0; channel < 3; ++channel) {
        int64_t sum = 1 << (kBits - 1);
        const uint8_t* at = row + static_cast<size_t>(all[x].first) * 3 + channel;
        for (int weight : all[x].weights) {
          sum += static_cast<int64_t>(weight) * *at;
          at += 3;
        }
        out[(static_cast<size_t>(y) * to + x) * 3 + channel] =
            static_cast<uint8_t>(std::clamp<int64_t>(sum >> kBits, 0, 255));
      }
    }
  }
  return out;
}

// Columns (from, width, 3) -> (to, width, 3).
Pixels resized_columns(const Pixels& pixels, int width, int from, int to, const std::string& resample) {
  if (from == to) return pixels;
  const size_t stride = static_cast<size_t>(width) * 3;
  Pixels out(stride * to);
  const auto all = taps(from, to, resample);
  for (int y = 0; y < to; ++y) {
    for (size_t x = 0; x < stride; ++x) {
      int64_t sum = 1 << (kBits - 1);
      const uint8_t* at = pixels.data() + all[y].first * stride + x;
      for (int weight : all[y].weights) {
        sum += static_cast<int64_t>(weight) * *at;
        at += stride;
      }
      out[y * stride + x] = static_cast<uint8_t>(std::clamp<int64_t>(sum >> kBits, 0, 255));
    }
  }
  return out;
}

}  // namespace

Array pixel_values(const View& photo, const ImageInfo& info) {
  if (photo.dtype != "uint8" || photo.shape.size() != 3 || photo.shape[2] != 3 || count_of(photo.shape) == 0) {
    throw Trouble("the photo is not uint8 (H, W, 3)");
  }
  const int height = static_cast<int>(photo.shape[0]), width = static_cast<int>(photo.shape[1]);
  const int shorter = std::min(height, width), longer = std::max(height, width);
  if (longer > static_cast<int64_t>(kMaxAspect) * shorter) {
    throw Trouble("the photo is " + std::to_string(width) + " x " + std::to_string(height) +
                  "; its long side may be at most " + std::to_string(kMaxAspect) + " times the short");
  }
  int new_height = info.height, new_width = info.width;
  if (info.centre_crop) {
    // The long side is cut off to a whole pixel, not rounded, as CLIP's preprocessor does it.
    const int other = static_cast<int>(static_cast<int64_t>(info.resize_shortest) * longer / shorter);
    new_height = height <= width ? info.resize_shortest : other;
    new_width = height <= width ? other : info.resize_shortest;
  }
  const Pixels wide = resized_rows(photo.data, height, width, new_width, info.resample);
  const Pixels pixels = resized_columns(wide, new_width, height, new_height, info.resample);
  const int top = info.centre_crop ? (new_height - info.height) / 2 : 0;
  const int left = info.centre_crop ? (new_width - info.width) / 2 : 0;
  Array values("float32", {1, 3, info.height, info.width});
  auto* out = reinterpret_cast<float*>(values.bytes.data());
  for (int channel = 0; channel < 3; ++channel) {
    for (int y = 0; y < info.height; ++y) {
      for (int x = 0; x < info.width; ++x) {
        const uint8_t grey = pixels[(static_cast<size_t>(top + y) * new_width + left + x) * 3 + channel];
        *out++ = (static_cast<float>(grey) * info.rescale - info.mean[channel]) / info.std[channel];
      }
    }
  }
  return values;
}

}  // namespace pruneport
