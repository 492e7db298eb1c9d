// Causal attention on a CPU that multiplies bfloat16 matrices, after FlashAttention (arXiv 2205.14135), with torch's small matrix
// products (brgemm) of bfloat16 operands and float32 results. tiles.py compiles this file and calls it.
//
// A task is a head: nothing is summed over tasks, and every sum has a fixed order, so results do not depend on the number of
// threads. Scores are kept in base 2: the softmax is exp2(score * log2(e) / sqrt(D) - statistic).
//
// Shapes: B sequences, A query heads, G key heads, S tokens, D head width, a multiple of 16; P: S rounded up to a multiple of 32,
// filled with zeros. "Pairs" are the layout of a second factor [K, N]: [K / 2, N, 2], the rows 2i and 2i + 1 interleaved.

#include "half_matrices.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

constexpr int64_t kRows = 64;   // queries of a tile in the forward pass
constexpr int64_t kKeys = 64;   // keys of a tile in the backward pass
constexpr int64_t kSpan = 512;  // the most keys, or queries, beside them
constexpr float kLog2e = 1.4426950408889634f;

struct Shape { int64_t batch, heads, groups, length, width; };

// [B, heads, S, D] with strides in elements; D is contiguous.
struct Heads {
  Half* data;
  int64_t batch_stride, head_stride, row;
  Half* of(int64_t batch, int64_t head) const { return data + batch * batch_stride + head * head_stride; }
};

// The work space of a thread. With `base` null it only counts.
struct Space {
  char* base = nullptr;
  int64_t used = 0;
  template <class T> T* take(int64_t count) {
    char* taken = base + used;
    used += rounded(count * sizeof(T), 64);
    return reinterpret_cast<T*>(taken);
  }
};

// Calls `task(space, index)` for every index below `tasks`, in parallel.
template <class Workspace, class Task> void for_each(int64_t tasks, const Workspace& like, const Task& task) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Workspace space = like;
    void* memory = std::aligned_alloc(64, space.bytes());
    if (!memory) throw std::bad_alloc();
    try {
      space.lay(Space{static_cast<char*>(memory)});
      for (int64_t index = begin; index < end; index++) task(space, index);
    } catch (...) {
      std::free(memory);
      throw;
    }
    std::free(memory);
    at::native::cpublas::brgemm_release();
  });
}

// 2^x for x <= 0, with a relative error below 3e-7; 0 below -150, NaN for NaN.
__m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-160.f), x);  // returns the second operand if one is NaN
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = _mm512_sub_ps(x, whole);
  __m512 power = _mm512_set1_ps(1.32764713e-3f);  // a minimax polynomial on [-0.5, 0.5]
  for (float factor : {9.67554189e-3f, 5.55071346e-2f, 2.40221202e-1f, 6.93146944e-1f, 1.f})
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(power, whole);
}

// Writes the transposed [D, P] of a head [S, D] in pairs, or plain if `in_pairs` is false.
void pack_transposed(const Half* from, int64_t row, const Shape& shape, int64_t padded, bool in_pairs, Half* to) {
  for (int64_t s = 0; s < padded; s += 16)
    for (int64_t d = 0; d < shape.width; d += 32) {
      const int64_t pairs = std::min<int64_t>(16, (shape.width - d) / 2);
      const __mmask16 mask = (1u << pairs) - 1;
      __m512i x[16];
      for (int i = 0; i < 16; i++)
        x[i] = s + i < shape.length ? _mm512_maskz_loadu_epi32(mask, from + (s + i) * row + d) : _mm512_setzero_si512();
      transpose(x);
      for (int i = 0; i < pairs; i++) {
        if (in_pairs) {
          _mm512_storeu_si512(to + (d / 2 + i) * padded * 2 + s * 2, x[i]);
        } else {
          store(to + (d + 2 * i) * padded + s, _mm512_cvtepi32_epi16(x[i]));
          store(to + (d + 2 * i + 1) * padded + s, _mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16)));
        }
      }
    }
}

// Writes a head [S, D], as [P, D], in pairs.
void pack_rows(const Half* from, int64_t row, const Shape& shape, int64_t padded, Half* to) {
  for (int64_t s = 0; s < padded; s += 2)
    for (int64_t d = 0; d < shape.width; d += 16) {
      const __m256i even = s < shape.length ? load(from + s * row + d) : _mm256_setzero_si256();
      const __m256i odd = s + 1 < shape.length ? load(from + (s + 1) * row + d) : _mm256_setzero_si256();
      _mm512_storeu_si512(to + s * shape.width + 2 * d, interleave(even, odd));
    }
}

void scale_row(float* x, int64_t width, float factor) {
  for (int64_t d = 0; d < width; d += 16) _mm512_storeu_ps(x + d, _mm512_mul_ps(load(x + d), _mm512_set1_ps(factor)));
}

void round_row(const float* x, int64_t width, float factor, Half* to) {
  for (int64_t d = 0; d < width; d += 16) store(to + d, narrow(_mm512_mul_ps(load(x + d), _mm512_set1_ps(factor))));
}

// Takes the exponential of the first `seen` of `count` scores, minus their maximum or the one before, as weights; the others get
// weight 0. Updates the maximum, of scores as they are, and the sum, and returns the factor by which earlier weights have become smaller.
float exponentials(const float* scores, int64_t seen, int64_t count, float scale, Half* weights, float& maximum, float& sum) {
  const auto mask = [&](int64_t i) -> __mmask16 { return seen - i >= 16 ? 0xffff : (1u << (seen - i)) - 1; };
  __m512 highest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (int64_t i = 0; i < seen; i += 16) highest = _mm512_mask_max_ps(highest, mask(i), highest, load(scores + i));
  const float before = maximum;
  maximum = std::max(before, _mm512_reduce_max_ps(highest));
  int64_t i = 0;
  for (; i < seen; i += 16) {
    const __m512 shifted = _mm512_sub_ps(load(scores + i), _mm512_set1_ps(maximum));
    const __m512 weight = _mm512_maskz_mov_ps(mask(i), exp2(_mm512_mul_ps(shifted, _mm512_set1_ps(scale))));
    total = _mm512_add_ps(total, weight);
    store(weights + i, narrow(weight));
  }
  for (; i < count; i += 16) store(weights + i, _mm256_setzero_si256());
  const float factor = std::exp2((before - maximum) * scale);
  sum = sum * factor + _mm512_reduce_add_ps(total);
  return factor;
}

struct ForwardSpace {
  int64_t padded, span, width;
  Half *keys, *values, *weights;  // [D, P] and [P, D] in pairs, [rows, span]
  float *scores, *mixed;          // [rows, span], [rows, D]
  int64_t lay(Space space) {
    keys = space.take<Half>(padded * width), values = space.take<Half>(padded * width);
    weights = space.take<Half>(kRows * span), scores = space.take<float>(kRows * span), mixed = space.take<float>(kRows * width);
    return space.used;
  }
  int64_t bytes() { return lay({}); }
};

void forward(const Shape& shape, const Heads& query, const Heads& key, const Heads& value, const Heads& output, float* statistics) {
  const int64_t padded = rounded(shape.length, 32), width = shape.width, span = std::min(kSpan, padded);
  const float scale = kLog2e / std::sqrt(static_cast<float>(width));
  for_each(shape.batch * shape.heads, ForwardSpace{padded, span, width}, [&](ForwardSpace& w, int64_t task) {
    const int64_t batch = task / shape.heads, head = task % shape.heads, group = head / (shape.heads / shape.groups);
    pack_transposed(key.of(batch, group), key.row, shape, padded, true, w.keys);
    pack_rows(value.of(batch, group), value.row, shape, padded, w.values);
    for (int64_t first = 0; first < shape.length; first += kRows) {
      const int64_t rows = std::min(kRows, shape.length - first), stop = first + rows;
      float maxima[kRows], sums[kRows] = {};
      std::fill_n(maxima, kRows, -INFINITY);
      for (int64_t k = 0; k < stop; k += span) {
        const int64_t count = std::min(span, rounded(stop - k, 32));
        brgemm(rows, count, width, query.row, padded, span, false, query.of(batch, head) + first * query.row, w.keys + 2 * k, w.scores);
        for (int64_t r = 0; r < rows; r++) {
          const int64_t seen = std::min(count, first + r + 1 - k);
          const float factor = exponentials(w.scores + r * span, seen, count, scale, w.weights + r * span, maxima[r], sums[r]);
          if (k > 0 && factor != 1) scale_row(w.mixed + r * width, width, factor);
        }
        brgemm(rows, width, count, span, width, width, k > 0, w.weights, w.values + k * width, w.mixed);
      }
      for (int64_t r = 0; r < rows; r++) {
        round_row(w.mixed + r * width, width, 1 / sums[r], output.of(batch, head) + (first + r) * output.row);
        statistics[task * shape.length + first + r] = maxima[r] * scale + std::log2(sums[r]);
      }
    }
  });
}

struct BackwardSpace {
  int64_t padded, span, width, key_rows;
  Half *keys, *queries, *grads, *query_rows, *grad_rows;    // [D, P]; [D, P] in pairs, twice; [P, D] in pairs, twice
  float *grad_query, *grad_key, *grad_value;                // [D, P]; [key rows, D], twice
  float *statistics, *products, *scores, *grad_weights;     // [P], twice; [keys, span], twice
  Half *weights, *grad_scores, *grad_score_pairs;           // [keys, span], twice; in pairs
  int64_t lay(Space space) {
    for (Half** whole : {&keys, &queries, &grads, &query_rows, &grad_rows}) *whole = space.take<Half>(padded * width);
    grad_query = space.take<float>(padded * width);
    grad_key = space.take<float>(key_rows * width), grad_value = space.take<float>(key_rows * width);
    statistics = space.take<float>(padded), products = space.take<float>(padded);
    scores = space.take<float>(kKeys * span), grad_weights = space.take<float>(kKeys * span);
    for (Half** tile : {&weights, &grad_scores, &grad_score_pairs}) *tile = space.take<Half>(kKeys * span);
    return space.used;
  }
  int64_t bytes() { return lay({}); }
};

// Computes weights and gradients of scores of `keys` keys from `key` on with `queries` queries from `query` on, key by query. If the
// number of keys is odd, they are the last ones, and no query sees the one after them.
void differentiate(const BackwardSpace& w, int64_t key, int64_t keys, int64_t query, int64_t queries, float scale) {
  for (int64_t k = 0; k < keys; k += 2)
    for (int64_t q = 0; q < queries; q += 32) {
      __m512 weights[2][2], grads[2][2];
      for (int half = 0; half < 2; half++) {
        const int64_t at = q + 16 * half;
        const __m512 statistic = load(w.statistics + query + at), product = load(w.products + query + at);
        for (int odd = 0; odd < 2; odd++) {
          const int64_t place = (k + odd) * w.span + at, hidden = key + k + odd - (query + at);  // the first queries do not see it
          const __mmask16 seen = hidden <= 0 ? 0xffff : hidden < 16 ? 0xffffu << hidden : 0;
          const __m512 shifted = _mm512_fmsub_ps(load(w.scores + place), _mm512_set1_ps(scale), statistic);
          weights[odd][half] = _mm512_maskz_mov_ps(seen, exp2(shifted));
          grads[odd][half] = _mm512_maskz_mul_ps(seen, weights[odd][half], _mm512_sub_ps(load(w.grad_weights + place), product));
        }
        _mm512_storeu_si512(w.grad_score_pairs + k * queries + 2 * at, interleave(narrow(grads[0][half]), narrow(grads[1][half])));
      }
      for (int odd = 0; odd < 2; odd++) {
        _mm512_storeu_si512(w.weights + (k + odd) * w.span + q, narrow(weights[odd][0], weights[odd][1]));
        _mm512_storeu_si512(w.grad_scores + (k + odd) * w.span + q, narrow(grads[odd][0], grads[odd][1]));
      }
    }
}

// Writes the products of output and its gradient, by token, and the statistics; where there is no token, so that weights are 0.
void prepare_statistics(const Heads& output, const Heads& grad, const Shape& shape, int64_t batch, int64_t head,
                        const float* statistics, const BackwardSpace& w) {
  for (int64_t s = 0; s < w.padded; s++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; s < shape.length && d < shape.width; d += 16)
      sum = _mm512_fmadd_ps(widen(load(output.of(batch, head) + s * output.row + d)),
                            widen(load(grad.of(batch, head) + s * grad.row + d)), sum);
    w.products[s] = _mm512_reduce_add_ps(sum);
    w.statistics[s] = s < shape.length ? statistics[(batch * shape.heads + head) * shape.length + s] : 1e30f;
  }
}

// Writes the transposed of `grad_query` [D, P], times `factor`.
void write_transposed(const BackwardSpace& w, const Shape& shape, float factor, Half* to, int64_t row) {
  for (int64_t s = 0; s < shape.length; s += 16)
    for (int64_t d = 0; d < shape.width; d += 16) {
      __m512i x[16];
      for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(w.grad_query + (d + i) * w.padded + s);
      transpose(x);
      for (int i = 0; i < 16 && s + i < shape.length; i++)
        store(to + (s + i) * row + d, narrow(_mm512_mul_ps(_mm512_castsi512_ps(x[i]), _mm512_set1_ps(factor))));
    }
}

void backward(const Shape& shape, const Heads& query, const Heads& key, const Heads& value, const Heads& output, const Heads& grad,
              const float* statistics, const Heads& grad_query, const Heads& grad_key, const Heads& grad_value) {
  const int64_t padded = rounded(shape.length, 32), width = shape.width, span = std::min(kSpan, padded);
  const int64_t shared = shape.heads / shape.groups, key_rows = shared > 1 ? padded : std::min(kKeys, padded);
  const float factor = 1 / std::sqrt(static_cast<float>(width));
  for_each(shape.batch * shape.groups, BackwardSpace{padded, span, width, key_rows}, [&](BackwardSpace& w, int64_t task) {
    const int64_t batch = task / shape.groups, group = task % shape.groups;
    pack_transposed(key.of(batch, group), key.row, shape, padded, false, w.keys);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++) {
      const bool first = head == group * shared, last = head == (group + 1) * shared - 1;
      pack_transposed(query.of(batch, head), query.row, shape, padded, true, w.queries);
      pack_transposed(grad.of(batch, head), grad.row, shape, padded, true, w.grads);
      pack_rows(query.of(batch, head), query.row, shape, padded, w.query_rows);
      pack_rows(grad.of(batch, head), grad.row, shape, padded, w.grad_rows);
      prepare_statistics(output, grad, shape, batch, head, statistics, w);
      for (int64_t k = 0; k < shape.length; k += kKeys) {
        const int64_t keys = std::min(kKeys, shape.length - k);
        float* of_key = w.grad_key + (shared > 1 ? k * width : 0);
        float* of_value = w.grad_value + (shared > 1 ? k * width : 0);
        for (int64_t q = k; q < padded; q += span) {
          const int64_t queries = std::min(span, padded - q);
          const bool add = q > k || !first;
          brgemm(keys, queries, width, key.row, padded, span, false, key.of(batch, group) + k * key.row, w.queries + 2 * q, w.scores);
          brgemm(keys, queries, width, value.row, padded, span, false, value.of(batch, group) + k * value.row, w.grads + 2 * q,
                 w.grad_weights);
          differentiate(w, k, keys, q, queries, kLog2e * factor);
          brgemm(keys, width, queries, span, width, width, add, w.weights, w.grad_rows + q * width, of_value);
          brgemm(keys, width, queries, span, width, width, add, w.grad_scores, w.query_rows + q * width, of_key);
          brgemm(width, queries, rounded(keys, 2), padded, queries, padded, k > 0, w.keys + k, w.grad_score_pairs, w.grad_query + q);
        }
        for (int64_t i = 0; last && i < keys; i++) {
          round_row(of_key + i * width, width, factor, grad_key.of(batch, group) + (k + i) * grad_key.row);
          round_row(of_value + i * width, width, 1, grad_value.of(batch, group) + (k + i) * grad_value.row);
        }
      }
      write_transposed(w, shape, factor, grad_query.of(batch, head), grad_query.row);
    }
  });
}

}  // namespace

extern "C" const char* attention_forward(const Shape* shape, const Heads* query, const Heads* key, const Heads* value,
                                         const Heads* output, float* statistics) {
  return guarded([&] { forward(*shape, *query, *key, *value, *output, statistics); });
}

extern "C" const char* attention_backward(const Shape* shape, const Heads* query, const Heads* key, const Heads* value,
                                          const Heads* output, const Heads* grad, const float* statistics, const Heads* grad_query,
                                          const Heads* grad_key, const Heads* grad_value) {
  return guarded([&] { backward(*shape, *query, *key, *value, *output, *grad, statistics, *grad_query, *grad_key, *grad_value); });
}

// Returns the bytes that a thread of the backward pass, which takes more than one of the forward pass, works in.
extern "C" int64_t attention_workspace(const Shape* shape) {
  const int64_t padded = rounded(shape->length, 32);
  const int64_t key_rows = shape->heads > shape->groups ? padded : std::min(kKeys, padded);
  return BackwardSpace{padded, std::min(kSpan, padded), shape->width, key_rows}.bytes();
}
