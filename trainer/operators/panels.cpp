// The matrix products of linear layers on a CPU that does not multiply bfloat16: in float32, of operands that are float32 or
// bfloat16 each. They are widened while they are packed into panels, sums are rounded when they are complete, and weight gradients
// are added in float32 where they belong. The blocks are those of Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication", 2008: a panel of the right factor stays in the first cache while rows of the left one pass, which stay in the
// second. What is packed takes 8 MiB at most, however large a weight is, and some 2 MiB for each thread. panels.py compiles this
// file and calls it.
//
// One thread computes an element, by a sum in a fixed order. So results do not depend on the number of threads, and the result for
// a row does not depend on the other rows.
//
// Shapes: M rows of the result, N columns, K products for each element.

#include "kernels.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kHeight = 6;        // rows of a tile, whose sums are in registers
constexpr int64_t kWidth = 16;        // columns of a tile and of a panel
constexpr int64_t kRows = 96;         // rows that a thread computes at a time, or a few more or less
constexpr int64_t kStep = 384;        // products of an element that are added up before its sum leaves the registers
constexpr int64_t kFew = 32;          // rows of the right factor that are packed for all panels at a time
constexpr int64_t kAhead = 8;         // rows that are fetched before they are packed
constexpr int64_t kDepth = 2048;      // the most rows of the right factor that are packed at a time, if results are not rounded
constexpr int64_t kPacked = 1 << 21;  // the most elements that are packed at a time, unless a single panel has more
constexpr int64_t kSpan = 4096;       // the most columns for which a thread holds sums

// Rows of elements that lie side by side, `row` elements apart. `half`: they are bfloat16, else float32.
struct Matrix {
  void* data;
  int64_t row, half;
  // Calls task(pointer to the element) with its type.
  template <class Task> void at(int64_t r, int64_t c, const Task& task) const {
    if (half) task(static_cast<Half*>(data) + r * row + c);
    else task(static_cast<float*>(data) + r * row + c);
  }
};

__m256 load(const float* x) { return _mm256_loadu_ps(x); }
__m256 load(const Half* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
void store(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
void store(Half* to, __m256 x) {  // rounds to the nearest number, ties to even
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i all = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), is_nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}

// Says that `width` elements will be read soon.
template <class T> void prefetch(const T* from, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / sizeof(T)) _mm_prefetch(reinterpret_cast<const char*>(from + c), _MM_HINT_T0);
}

// Transposes 8 x 8 elements.
void transpose(__m256 x[8]) {
  __m256 y[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
      x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
  std::copy(y, y + 8, x);
}

// Writes [height, width], `row` elements apart, as rows of `padded` elements; the rest of each is zeros.
template <class T>
void widen(const T* from, int64_t row, int64_t height, int64_t width, int64_t padded, float* to, int64_t to_row) {
  for (int64_t r = 0; r < height; r++, from += row, to += to_row) {
    prefetch(from + kAhead * row, width);
    int64_t c = 0;
    for (; c + 8 <= width; c += 8) store(to + c, load(from + c));
    for (; c < padded; c++) to[c] = c < width ? float(from[c]) : 0;
  }
}

// Writes [depth, height] as tiles [depth, kHeight], `tile` elements apart, which have room for two more elements. Columns of the
// last one may be zeros.
template <class T> void pack_tiles(const T* from, int64_t row, int64_t depth, int64_t height, float* to, int64_t tile) {
  for (int64_t k = 0; k < depth; k++, from += row) {
    prefetch(from + kAhead * row, height);
    for (int64_t r = 0; r < height; r += kHeight) {
      float* const at = to + r / kHeight * tile + k * kHeight;
      if (r + 8 <= height) store(at, load(from + r));
      else for (int64_t i = 0; i < kHeight; i++) at[i] = r + i < height ? float(from[r + i]) : 0;
    }
  }
}

// Writes the transposed of [width, depth] as a panel [depth, kWidth]. Columns from `width` on are zeros.
template <class T> void pack_columns(const T* from, int64_t row, int64_t depth, int64_t width, float* to) {
  int64_t k = 0;
  for (; width == kWidth && k + 8 <= depth; k += 8)
    for (int64_t c = 0; c < kWidth; c += 8) {
      __m256 x[8];
      for (int i = 0; i < 8; i++) x[i] = load(from + (c + i) * row + k);
      transpose(x);
      for (int i = 0; i < 8; i++) store(to + (k + i) * kWidth + c, x[i]);
    }
  for (; k < depth; k++)
    for (int64_t c = 0; c < kWidth; c++) to[k * kWidth + c] = c < width ? float(from[c * row + k]) : 0;
}

// Writes left [kHeight, depth] times a panel [depth, kWidth] to the sums of a tile, or adds it to them. An element of the left
// factor is `row` from the one below it and `next` from the one beside it.
void multiply_tile(int64_t depth, const float* left, int64_t row, int64_t next, const float* panel, float* sums, int64_t sums_row,
                   bool add) {
  __m256 x[kHeight][2];
#pragma GCC unroll 6
  for (int r = 0; r < kHeight; r++)
    for (int i = 0; i < 2; i++) x[r][i] = add ? load(sums + r * sums_row + 8 * i) : _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; k++, left += next, panel += kWidth) {
    const __m256 first = load(panel), second = load(panel + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kHeight; r++) {
      const __m256 factor = _mm256_broadcast_ss(left + r * row);
      x[r][0] = _mm256_fmadd_ps(factor, first, x[r][0]);
      x[r][1] = _mm256_fmadd_ps(factor, second, x[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kHeight; r++)
    for (int i = 0; i < 2; i++) store(sums + r * sums_row + 8 * i, x[r][i]);
}

// Writes `width` sums, plus a bias for each if there are some, or adds them to what is there.
template <class T> void finish(const float* sums, const float* bias, int64_t width, bool add, T* to) {
  int64_t c = 0;
  for (; c + 8 <= width; c += 8) {
    __m256 x = load(sums + c);
    if (bias) x = _mm256_add_ps(x, load(bias + c));
    store(to + c, add ? _mm256_add_ps(x, load(to + c)) : x);
  }
  for (; c < width; c++) to[c] = sums[c] + (bias ? bias[c] : 0) + (add ? float(to[c]) : 0);
}

// Calls task(begin, end) for parts of [0, tasks), in parallel.
template <class Task> void in_parallel(int64_t tasks, const Task& task) { at::parallel_for(0, tasks, 1, task); }

int64_t parts_of(int64_t n, int64_t size) { return rounded(n, size) / size; }

// Whether `multiply` reads the transposed of what is given as its left factor, as its right factor.
struct Transposed {
  bool left, right;
};

// Writes left [M, K] times right [K, N] to result [M, N], plus bias [N] unless it is null, or adds it to what is there.
void multiply(Transposed transposed, int64_t rows, int64_t columns, int64_t products, Matrix left, Matrix right, const float* bias,
              bool add, Matrix result) {
  // Rounded results are complete before they are written; others are added up in several parts. Parts have about the same size.
  const int64_t deepest = result.half ? products : std::min(products, kDepth);
  const int64_t widest = std::min(std::max(kPacked / deepest / kWidth, int64_t{1}) * kWidth, kSpan);
  const int64_t span = rounded(parts_of(columns, parts_of(columns, widest)), kWidth);
  const int64_t blocks = rounded(parts_of(rows, kRows), at::get_num_threads()), height = rounded(parts_of(rows, blocks), kHeight);
  const int64_t row = transposed.left ? 1 : kStep + 16, next = transposed.left ? kHeight : 1;  // in a tile of the left block
  const int64_t tile = transposed.left ? kStep * kHeight + 8 : kHeight * row, sums_row = span + kWidth;  // not powers of two
  const auto packed = allocate<float>(deepest * span);
  for (int64_t first = 0; first < columns; first += span)
    for (int64_t done = 0; done < products; done += deepest) {
      const int64_t width = std::min(span, columns - first), depth = std::min(deepest, products - done);
      in_parallel(parts_of(width, kWidth), [&](int64_t begin, int64_t end) {
        for (int64_t k = 0; k < depth; k += kFew)  // panels that lie side by side read the same lines of the cache
          for (int64_t c = begin * kWidth; c < end * kWidth; c += kWidth) {
            const int64_t step = std::min(kFew, depth - k), used = std::min(kWidth, width - c);
            float* const to = packed.get() + c * depth + k * kWidth;
            if (transposed.right)
              right.at(first + c, done + k, [&](const auto* from) { pack_columns(from, right.row, step, used, to); });
            else right.at(done + k, first + c, [&](const auto* from) { widen(from, right.row, step, used, kWidth, to, kWidth); });
          }
      });
      in_parallel(blocks, [&](int64_t begin, int64_t end) {
        const auto sums = allocate<float>(height * sums_row), block = allocate<float>(height / kHeight * tile);
        for (int64_t n = begin * height; n < std::min(end * height, rows); n += height) {
          const int64_t count = std::min(height, rows - n);
          for (int64_t k = 0; k < depth; k += kStep) {
            const int64_t step = std::min(kStep, depth - k);
            if (transposed.left)
              left.at(done + k, n, [&](const auto* from) { pack_tiles(from, left.row, step, count, block.get(), tile); });
            else {
              left.at(n, done + k, [&](const auto* from) { widen(from, left.row, count, step, step, block.get(), row); });
              std::fill(block.get() + count * row, block.get() + rounded(count, kHeight) * row, 0.0f);
            }
            for (int64_t c = 0; c < width; c += kWidth)
              for (int64_t r = 0; r < count; r += kHeight)
                multiply_tile(step, block.get() + r / kHeight * tile, row, next, packed.get() + c * depth + k * kWidth,
                              sums.get() + r * sums_row + c, sums_row, k > 0);
          }
          const float* const added = bias && done == 0 ? bias + first : nullptr;
          for (int64_t r = 0; r < count; r++)
            result.at(n + r, first, [&](auto* to) { finish(sums.get() + r * sums_row, added, width, add || done > 0, to); });
        }
      });
    }
}

}  // namespace

// Writes rows [N, I] times the transposed of weight [O, I], plus `bias` [O] unless it is null, to result [N, O].
extern "C" const char* linear_outputs(int64_t tokens, int64_t outputs, int64_t inputs, const Matrix* rows, const Matrix* weight,
                                      const float* bias, const Matrix* result) {
  return guarded([&] { multiply({false, true}, tokens, outputs, inputs, *rows, *weight, bias, false, *result); });
}

// Writes columns [N, O], the gradient of the outputs, times weight [O, I] to result [N, I], or adds it to what is there.
extern "C" const char* input_gradient(int64_t tokens, int64_t outputs, int64_t inputs, const Matrix* columns, const Matrix* weight,
                                      bool add, const Matrix* result) {
  return guarded([&] { multiply({false, false}, tokens, inputs, outputs, *columns, *weight, nullptr, add, *result); });
}

// Writes columns [N, O], transposed, times rows [N, I], the gradient of a weight, to total [O, I], or adds it to what is there.
extern "C" const char* weight_gradient(int64_t tokens, int64_t outputs, int64_t inputs, const Matrix* columns, const Matrix* rows,
                                       bool add, const Matrix* total) {
  return guarded([&] { multiply({true, false}, outputs, inputs, tokens, *columns, *rows, nullptr, add, *total); });
}
