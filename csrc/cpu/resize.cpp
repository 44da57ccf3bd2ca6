#include "cpu/resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace vila2::cpu {
namespace {

double weight_at(Filter filter, double x) {
  x = std::fabs(x);
  if (filter == Filter::kBilinear) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// The windows of one axis. The arithmetic is Pillow's, operation by operation: the bits depend on it.
class Axis {
 public:
  Axis(int64_t old_size, int64_t new_size, Filter filter) : starts_(static_cast<size_t>(new_size)) {
    const double scale = static_cast<double>(old_size) / static_cast<double>(new_size);
    const double stretch = std::max(scale, 1.0), step = 1 / stretch;
    const double support = (filter == Filter::kBilinear ? 1 : 2) * stretch;
    std::vector<std::vector<double>> windows(starts_.size());
    size_t most = 0;
    for (size_t i = 0; i < windows.size(); ++i) {
      const double center = (static_cast<double>(i) + 0.5) * scale;
      const auto start = static_cast<int32_t>(std::max(0.0, center - support + 0.5));
      const auto end = static_cast<int32_t>(std::min(static_cast<double>(old_size), center + support + 0.5));
      std::vector<double>& window = windows[i];
      double sum = 0;
      for (int32_t x = start; x < end; ++x) {
        window.push_back(weight_at(filter, (x - center + 0.5) * step));
        sum += window.back();
      }
      for (double& weight : window) {
        if (sum != 0) weight /= sum;
      }
      starts_[i] = start;
      most = std::max(most, window.size());
    }
    pairs_ = (static_cast<int64_t>(most) + kTapGroup - 1) / kTapGroup * kTapGroup / 2;
    taps_.resize(starts_.size() * static_cast<size_t>(pairs_));
    for (size_t i = 0; i < windows.size(); ++i) {
      for (size_t x = 0; x < windows[i].size(); ++x) {
        const double exact = windows[i][x] * (1 << kWeightBits);
        const auto weight = static_cast<int32_t>(exact < 0 ? exact - 0.5 : exact + 0.5);
        TapPair& pair = taps_[i * static_cast<size_t>(pairs_) + x / 2];
        pair.high[x % 2] = static_cast<int16_t>(weight >> kLowBits);
        pair.low[x % 2] = static_cast<int16_t>(weight & ((1 << kLowBits) - 1));
      }
    }
  }

  Windows windows() const {
    return {starts_.data(), taps_.data(), static_cast<int64_t>(starts_.size()), pairs_};
  }
  int64_t start(int64_t i) const { return starts_[static_cast<size_t>(i)]; }
  const TapPair* taps(int64_t i) const { return taps_.data() + i * pairs_; }
  int64_t pairs() const { return pairs_; }

 private:
  std::vector<int32_t> starts_;
  std::vector<TapPair> taps_;
  int64_t pairs_ = 0;
};

using Bytes = std::vector<uint8_t>;
using Rows = std::vector<const uint8_t*>;

// Rows of an image with `beyond` readable bytes behind each: the last ones are copies.
class SafeRows {
 public:
  SafeRows(const uint8_t* image, int64_t height, int64_t stride, int64_t beyond)
      : image_(image), height_(height), stride_(stride) {
    const int64_t copies = std::min(height, (beyond + stride - 1) / stride);
    own_ = height - copies;
    copies_.resize(static_cast<size_t>(copies * stride + beyond));
    std::memcpy(copies_.data(), image + own_ * stride, static_cast<size_t>(copies * stride));
  }
  // Of a row beyond the last one, the last one.
  const uint8_t* operator[](int64_t row) const {
    row = std::min(row, height_ - 1);
    return row < own_ ? image_ + row * stride_ : copies_.data() + (row - own_) * stride_;
  }

 private:
  const uint8_t* image_;
  int64_t height_, stride_, own_;
  Bytes copies_;
};

int64_t reach(const Axis& axis) { return 3 * 2 * axis.pairs() + kReadBeyond; }

// The horizontal pass runs only as far ahead of the vertical one as its window reaches, into a ring of rows
// that stays in a cache.
void pixels_then_rows(const ResizeJob& job, const Axis* across, const Axis* down) {
  const ResizeKernels& kernel = *kernels().resize;
  const int64_t stride = 3 * job.new_width, group = kernel.rows, padded = stride + kReadBeyond;
  const int64_t taps = down ? 2 * down->pairs() : 1;
  const int64_t ring_rows = (taps + 2 * group - 1) / group * group;
  Bytes ring(across ? static_cast<size_t>(ring_rows * padded) : 0);
  const SafeRows source(job.image, job.height, 3 * job.width, across ? reach(*across) : 0);
  Rows from(static_cast<size_t>(group)), window(static_cast<size_t>(taps));
  std::vector<uint8_t*> to(static_cast<size_t>(group));
  int64_t done = 0;  // rows that are in the ring, or were
  for (int64_t y = 0; y < job.new_height; ++y) {
    const int64_t start = down ? down->start(y) : y;
    while (across && done < std::min(start + taps, job.height)) {
      for (int64_t i = 0; i < group; ++i) {
        from[static_cast<size_t>(i)] = source[done + i];
        to[static_cast<size_t>(i)] = ring.data() + (done + i) % ring_rows * padded;
      }
      kernel.mix_pixels(from.data(), across->windows(), to.data());
      done += group;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = std::min(start + tap, job.height - 1);
      window[static_cast<size_t>(tap)] = across ? ring.data() + row % ring_rows * padded : source[row];
    }
    uint8_t* out = job.out + y * stride;
    if (down) {
      kernel.mix_rows(window.data(), down->taps(y), down->pairs(), out, stride);
    } else {
      std::memcpy(out, window[0], static_cast<size_t>(stride));
    }
  }
}

void rows_then_pixels(const ResizeJob& job, const Axis& across, const Axis& down) {
  const ResizeKernels& kernel = *kernels().resize;
  const int64_t old_stride = 3 * job.width, stride = 3 * job.new_width, group = kernel.rows;
  const int64_t taps = 2 * down.pairs();
  const int64_t padded = old_stride + reach(across), out_padded = stride + 1;
  Bytes mixed(static_cast<size_t>(group * padded)), narrow(static_cast<size_t>(group * out_padded));
  Rows from, window(static_cast<size_t>(taps));
  std::vector<uint8_t*> to;
  for (int64_t i = 0; i < group; ++i) {
    from.push_back(mixed.data() + i * padded);
    to.push_back(narrow.data() + i * out_padded);
  }
  for (int64_t y = 0; y < job.new_height; y += group) {
    const int64_t count = std::min(group, job.new_height - y);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t row = std::min(down.start(y + i) + tap, job.height - 1);
        window[static_cast<size_t>(tap)] = job.image + row * old_stride;
      }
      kernel.mix_rows(window.data(), down.taps(y + i), down.pairs(), mixed.data() + i * padded, old_stride);
    }
    kernel.mix_pixels(from.data(), across.windows(), to.data());
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(job.out + (y + i) * stride, to[static_cast<size_t>(i)], static_cast<size_t>(stride));
    }
  }
}

}  // namespace

void resize(const ResizeJob& job) {
  const bool is_wider = job.width != job.new_width, is_taller = job.height != job.new_height;
  if (!is_wider && !is_taller) {
    std::memcpy(job.out, job.image, static_cast<size_t>(job.height * job.width * 3));
    return;
  }
  const Axis across(is_wider ? job.width : 1, is_wider ? job.new_width : 1, job.filter);
  const Axis down(is_taller ? job.height : 1, is_taller ? job.new_height : 1, job.filter);
  if (is_wider && is_taller && job.rows_first) {
    rows_then_pixels(job, across, down);
  } else {
    pixels_then_rows(job, is_wider ? &across : nullptr, is_taller ? &down : nullptr);
  }
}

}  // namespace vila2::cpu
