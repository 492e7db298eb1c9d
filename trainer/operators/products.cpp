// The matrix products of linear layers on a CPU that multiplies bfloat16, by torch's small matrix products (brgemm). Operands are
// packed into the layout that these read, and weight gradients are added in float32 where they belong. products.py compiles this file
// and calls it.
//
// One thread computes an element, by a sum in a fixed order. So results do not depend on the number of threads, and the result for a
// row does not depend on the other rows.
//
// Shapes: N rows (tokens), I input width, O output width, both multiples of 32.

#include "half_matrices.h"

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kRows = 64;      // rows of a tile
constexpr int64_t kMostRows = 128; // the most rows of a tile of a weight gradient
constexpr int64_t kPanel = 64;     // columns of a tile
constexpr int64_t kSpan = 256;     // columns that are added up before they are rounded
constexpr int64_t kDepth = 2048;   // the most products of an element that one call adds up
constexpr int64_t kStep = 32;      // the elements that packing takes at a time

// Rows of elements that lie side by side, `row` elements apart.
struct Matrix {
  Half* data;
  int64_t row;
  Half* at(int64_t r, int64_t c) const { return data + r * row + c; }
};

// Calls task(begin, end) for parts of [0, tasks), in parallel. Afterwards a thread's tile registers are free again.
template <class Task> void in_parallel(int64_t tasks, const Task& task) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    task(begin, end);
    at::native::cpublas::brgemm_release();
  });
}

// Writes a panel [depth, width] in pairs. Rows from `known` on are zeros.
void pack_rows(Matrix from, int64_t known, int64_t depth, int64_t width, Half* to) {
  const auto row = [&](int64_t k, int64_t c) { return k < known ? load(from.at(k, c)) : _mm256_setzero_si256(); };
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t c = 0; c < width; c += 16) _mm512_storeu_si512(to + k * width + 2 * c, interleave(row(k, c), row(k + 1, c)));
}

// Writes the transposed of [width, depth] as a panel [depth, width] in pairs.
void pack_columns(Matrix from, int64_t depth, int64_t width, Half* to) {
  for (int64_t c = 0; c < width; c += 16)
    for (int64_t k = 0; k < depth; k += kStep) {
      __m512i x[16];
      for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(from.at(c + i, k));
      transpose(x);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (k / 2 + i) * width * 2 + 2 * c, x[i]);
    }
}

// Writes the transposed of [depth, width] as rows [width, depth], `row` elements apart. Rows of the former from `known` on are zeros.
void pack_transposed(Matrix from, int64_t known, int64_t depth, int64_t width, Half* to, int64_t row) {
  for (int64_t k = 0; k < depth; k += kStep)
    for (int64_t c = 0; c < width; c += kStep) {
      __m512i x[2][16];
      for (int i = 0; i < 32; i++) {
        x[i / 16][i % 16] = k + i < known ? _mm512_loadu_si512(from.at(k + i, c)) : _mm512_setzero_si512();
        _mm_prefetch(reinterpret_cast<const char*>(from.at(std::min(k + kStep + i, known - 1), c)), _MM_HINT_T0);
      }
      transpose(x[0]), transpose(x[1]);
      const auto write = [&](int64_t to_row, __m256i first, __m256i second) {
        _mm512_storeu_si512(to + to_row * row + k, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
      };
      for (int i = 0; i < 16; i++) {
        write(c + 2 * i, _mm512_cvtepi32_epi16(x[0][i]), _mm512_cvtepi32_epi16(x[1][i]));
        write(c + 2 * i + 1, _mm512_cvtepi32_epi16(_mm512_srli_epi32(x[0][i], 16)), _mm512_cvtepi32_epi16(_mm512_srli_epi32(x[1][i], 16)));
      }
    }
}

// Rounds 32 sums, plus a bias for each if there are some, to a line of the cache.
void round_line(__m512 low, __m512 high, const Half* bias, Half* to) {
  if (bias) low = _mm512_add_ps(low, widen(load(bias))), high = _mm512_add_ps(high, widen(load(bias + 16)));
  _mm512_storeu_si512(to, narrow(low, high));
}

// Rounds `height` rows of `width` sums.
void round_rows(const float* sums, const Half* bias, int64_t height, int64_t width, Matrix to) {
  for (int64_t r = 0; r < height; r++)
    for (int64_t c = 0; c < width; c += kStep)
      round_line(load(sums + r * width + c), load(sums + r * width + c + 16), bias ? bias + c : nullptr, to.at(r, c));
}

// Rounds `height` rows of `width` sums into as many columns, which may have a bias each.
void round_transposed(const float* sums, const Half* bias, int64_t height, int64_t width, Matrix to) {
  for (int64_t c = 0; c < width; c += 16)
    for (int64_t r = 0; r < height; r += kStep) {
      __m512i x[2][16];
      for (int i = 0; i < 32; i++) x[i / 16][i % 16] = _mm512_loadu_si512(sums + (r + i) * width + c);
      transpose(x[0]), transpose(x[1]);
      for (int i = 0; i < 16; i++)
        round_line(_mm512_castsi512_ps(x[0][i]), _mm512_castsi512_ps(x[1][i]), bias ? bias + r : nullptr, to.at(c + i, r));
    }
}

// Reads `height` rows of `width` sums.
void widen_rows(Matrix from, int64_t height, int64_t width, float* sums) {
  for (int64_t r = 0; r < height; r++)
    for (int64_t c = 0; c < width; c += 16) _mm512_storeu_ps(sums + r * width + c, widen(load(from.at(r, c))));
}

// How `multiply` reads its right factor, and where it writes the result.
struct Form {
  bool across;  // the right factor is given as [columns, depth]
  bool turned;  // the result and its bias are [columns, rows] and [rows]
  bool add;     // the result is added to what is there; not if it is turned
};

// Writes left [rows, depth] times right [depth, columns] to result [rows, columns], plus bias [columns] unless it is null.
void multiply(Form form, int64_t rows, int64_t columns, int64_t depth, Matrix left, Matrix right, const Half* bias, Matrix result) {
  const auto packed = allocate<Half>(depth * columns);  // by panels
  in_parallel(rounded(columns, kPanel) / kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kPanel; c < std::min(end * kPanel, columns); c += kPanel) {
      const int64_t width = std::min(kPanel, columns - c);
      if (form.across) pack_columns({right.at(c, 0), right.row}, depth, width, packed.get() + c * depth);
      else pack_rows({right.at(0, c), right.row}, depth, depth, width, packed.get() + c * depth);
    }
  });
  const int64_t spans = rounded(columns, kSpan) / kSpan, blocks = rounded(rows, kRows) / kRows;
  in_parallel(blocks * spans, [&](int64_t begin, int64_t end) {
    const auto sums = allocate<float>(kRows * kSpan);
    for (int64_t task = begin; task < end; task++) {
      const int64_t n = task / spans * kRows, height = std::min(kRows, rows - n);
      const int64_t first = task % spans * kSpan, span = std::min(kSpan, columns - first);
      if (form.add) widen_rows({result.at(n, first), result.row}, height, span, sums.get());
      for (int64_t k = 0; k < depth; k += kDepth)
        for (int64_t c = first; c < first + span; c += kPanel) {
          const int64_t width = std::min(kPanel, columns - c);
          brgemm(height, width, std::min(kDepth, depth - k), left.row, width, span, form.add || k > 0, left.at(n, k),
                 packed.get() + c * depth + k * width, sums.get() + c - first);
        }
      if (form.turned) round_transposed(sums.get(), bias ? bias + n : nullptr, height, span, {result.at(first, n), result.row});
      else round_rows(sums.get(), bias ? bias + first : nullptr, height, span, {result.at(n, first), result.row});
    }
  });
}

// Returns how many of `rows` rows a tile has, so that each of `threads` threads has about as many.
int64_t even_height(int64_t rows, int64_t threads) {
  const auto most = [&](int64_t height) { return rounded(rounded(rows, height) / height, threads) * height; };
  int64_t best = kMostRows;
  for (int64_t height = best - kStep; height > 0; height -= kStep)
    if (most(height) < most(best)) best = height;
  return best;
}

// Writes to total [O, I], or adds to it, the gradient of a weight: columns [N, O], the gradient of the outputs, transposed, times
// rows [N, I].
void add_weight_gradient(int64_t tokens, int64_t outputs, int64_t inputs, Matrix columns, Matrix rows, float* total, bool add) {
  const int64_t height = even_height(outputs, at::get_num_threads());
  const int64_t most = rounded(std::min(tokens, kDepth), kStep), panels = rounded(inputs, kPanel) / kPanel;
  const auto packed = allocate<Half>(most * inputs);
  for (int64_t n = 0; n < tokens; n += kDepth) {
    const int64_t known = std::min(kDepth, tokens - n), depth = rounded(known, kStep);
    in_parallel(panels, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * kPanel; c < std::min(end * kPanel, inputs); c += kPanel)
        pack_rows({rows.at(n, c), rows.row}, known, depth, std::min(kPanel, inputs - c), packed.get() + c * depth);
    });
    in_parallel(rounded(outputs, height) / height, [&](int64_t begin, int64_t end) {
      const int64_t row = depth + kStep;  // not a power of two, or all rows would want the same lines of the cache
      const auto left = allocate<Half>(height * row);
      for (int64_t o = begin * height; o < std::min(end * height, outputs); o += height) {
        const int64_t count = std::min(height, outputs - o);
        pack_transposed({columns.at(n, o), columns.row}, known, depth, count, left.get(), row);
        for (int64_t c = 0; c < inputs; c += kPanel) {
          const int64_t width = std::min(kPanel, inputs - c);
          brgemm(count, width, depth, row, width, inputs, add || n > 0, left.get(), packed.get() + c * depth, total + o * inputs + c);
        }
      }
    });
  }
}

}  // namespace

// Writes rows [N, I] times the transposed of weight [O, I], plus `bias` [O] unless it is null, to result [N, O]. The
// weight is packed or, if there are fewer rows than outputs and their number is a multiple of 32, the rows.
extern "C" const char* linear_outputs(int64_t tokens, int64_t outputs, int64_t inputs, const Matrix* rows, const Matrix* weight,
                                      const Half* bias, const Matrix* result) {
  return guarded([&] {
    if (tokens < outputs && tokens % kStep == 0) multiply({true, true}, outputs, tokens, inputs, *weight, *rows, bias, *result);
    else multiply({true}, tokens, outputs, inputs, *rows, *weight, bias, *result);
  });
}

// Writes columns [N, O], the gradient of the outputs, times weight [O, I] to result [N, I], or adds it to what is there.
extern "C" const char* input_gradient(int64_t tokens, int64_t outputs, int64_t inputs, const Matrix* columns, const Matrix* weight,
                                      bool add, const Matrix* result) {
  return guarded([&] { multiply({false, false, add}, tokens, inputs, outputs, *columns, *weight, nullptr, *result); });
}

// Writes columns [N, O], transposed, times rows [N, I], the gradient of a weight, to total [O, I], or adds it to what is there.
extern "C" const char* weight_gradient(int64_t tokens, int64_t outputs, int64_t inputs, const Matrix* columns, const Matrix* rows,
                                       float* total, bool add) {
  return guarded([&] { add_weight_gradient(tokens, outputs, inputs, *columns, *rows, total, add); });
}
