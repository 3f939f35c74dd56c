// The largest outputs of each row of a product, found while they are computed; the other outputs are not stored.
#pragma once

#include <cmath>

#include "matmul.hpp"

#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_max_threads() { return 1; }
#endif

namespace {

struct Top {
  float value;
  int64_t index;
};

// Larger outputs first; of equal outputs the one with the smaller index.
inline bool comes_before(const Top& a, const Top& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Insert an output into the `count` largest, which are sorted.
inline void insert_top(Top* tops, int count, const Top& one) {
  if (!comes_before(one, tops[count - 1])) return;
  int at = count - 1;
  for (; at > 0 && comes_before(one, tops[at - 1]); --at) tops[at] = tops[at - 1];
  tops[at] = one;
}

// The largest output of a block.
inline float largest(const float* block) {
  const f16v low = *reinterpret_cast<const f16v*>(block), high = *reinterpret_cast<const f16v*>(block + 16);
  return largest(low > high ? low : high);
}

// log(sum(exp(x))) over outputs that are added block by block, relative to the largest one so far.
struct LogSumExp {
  float most = -INFINITY;
  float sum = 0.0f;  // of exp(x - most)

  void rescale(float more) {
    if (!(more > most)) return;
    sum *= std::exp(most - more);
    most = more;
  }
  void add(const float* block, int width) {
    if (width == BLOCK) {
      rescale(largest(block));
      const f16v low = *reinterpret_cast<const f16v*>(block), high = *reinterpret_cast<const f16v*>(block + 16);
      sum += total(exp_vector(low - most) + exp_vector(high - most));
      return;
    }
    for (int i = 0; i < width; ++i) add(LogSumExp{block[i], 1.0f});
  }
  void add(const LogSumExp& other) {
    rescale(other.most);
    if (other.sum > 0.0f) sum += other.sum * std::exp(other.most - most);
  }
  float value() const { return most + std::log(sum); }
};

// So few blocks are multiplied by the calling thread alone: others would take longer to wake, or to get a processor.
constexpr int BLOCKS_OF_ONE_THREAD = 8;

// Multiplies some blocks on all threads and calls `each(thread, block, y, width)` with the outputs y [rows, width] of
// each. `chosen`: numbers of `count` blocks, or null for the first `count` blocks. x: inputs that are already rounded.
template <class Format, class Each>
void each_block(const typename Format::Input* x, int k, int rows, const void* w, int outputs, const int* chosen,
                int count, Each each) {
  typedef Product<Format> P;
  const char* weight = static_cast<const char*>(w);
  const auto place = [&](int i) { return weight + (chosen ? chosen[i] : i) * P::block_bytes(k); };
#pragma omp parallel if (count > BLOCKS_OF_ONE_THREAD)
  {
    static thread_local Buffer<float> of_block;
    float* y = of_block.at_least(size_t(rows) * BLOCK);
    P::enter(rows);
#pragma omp for schedule(static)
    for (int i = 0; i < count; ++i) {
      const int b = chosen ? chosen[i] : i, width = outputs - b * BLOCK < BLOCK ? outputs - b * BLOCK : BLOCK;
      const Stream stream{place(i) + P::block_bytes(k), place(i + 1 < count ? i + 1 : i)};
      P::blocks(x, k, rows, place(i), width, stream, y, nullptr, false, 0, 1);
      each(omp_get_thread_num(), b, y, width);
    }
    P::leave();
  }
}

// A row's outputs are replaced by output * inverse + noise, so that the largest is drawn (noise.hpp).
struct Perturbation {
  float inverse;       // of the temperature
  const float* noise;  // [outputs]; null: the row is not changed

  void apply(float* y, int b, int width) const {
    const float* of_block = noise + ptrdiff_t(b) * BLOCK;
    for (int i = 0; i < width; ++i) y[i] = y[i] * inverse + of_block[i];
  }
};

// The `count` largest outputs of each row over some blocks, sorted; if `lse` is not null, also the log-sum-exp over all
// outputs of these blocks. `perturbations`: of each row, or null: none.
template <class Format>
void top_of_blocks(const typename Format::Input* x, int k, int rows, const void* w, int outputs, const int* chosen,
                   int num_chosen, int count, Top* tops, LogSumExp* lse, const Perturbation* perturbations = nullptr) {
  static thread_local Buffer<Top> all_tops;
  static thread_local Buffer<LogSumExp> all_sums;
  // Each thread has its own part; the parts are merged in the order of threads.
  const int most_parts = omp_get_max_threads();
  Top* parts = all_tops.at_least(size_t(most_parts) * rows * count);
  LogSumExp* sums = all_sums.at_least(size_t(most_parts) * rows);
  for (int i = 0; i < most_parts * rows * count; ++i) parts[i] = Top{-INFINITY, 0};
  for (int i = 0; i < most_parts * rows; ++i) sums[i] = LogSumExp{};
  each_block<Format>(x, k, rows, w, outputs, chosen, num_chosen, [=](int thread, int b, float* y, int width) {
    Top* own = parts + ptrdiff_t(thread) * rows * count;
    for (int r = 0; r < rows; ++r) {
      float* row = y + ptrdiff_t(r) * width;
      if (perturbations && perturbations[r].noise) perturbations[r].apply(row, b, width);
      if (lse) sums[ptrdiff_t(thread) * rows + r].add(row, width);
      if (width == BLOCK && !(largest(row) > own[(r + 1) * count - 1].value)) continue;
      for (int i = 0; i < width; ++i) insert_top(own + r * count, count, Top{row[i], b * BLOCK + i});
    }
  });
  for (int r = 0; r < rows; ++r) {
    Top* of_row = tops + ptrdiff_t(r) * count;
    for (int i = 0; i < count; ++i) of_row[i] = Top{-INFINITY, 0};
    if (lse) lse[r] = LogSumExp{};
    for (int part = 0; part < most_parts; ++part) {
      const Top* own = parts + (ptrdiff_t(part) * rows + r) * count;
      for (int i = 0; i < count; ++i) insert_top(of_row, count, own[i]);
      if (lse) lse[r].add(sums[ptrdiff_t(part) * rows + r]);
    }
  }
}

}  // namespace
