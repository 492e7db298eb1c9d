// What the kernels for CPUs that multiply bfloat16 share: vectors of such numbers, and the layout of torch's small matrix products
// (brgemm), which multiply bfloat16 and add in float32. "Pairs" are the layout of a second factor [K, N]: [K / 2, N, 2], the rows
// 2i and 2i + 1 interleaved.

#pragma once

#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include "kernels.h"

namespace {

using at::native::cpublas::brgemm;

__m512 load(const float* x) { return _mm512_loadu_ps(x); }
__m256i load(const Half* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
void store(Half* to, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
__m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
__m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
__m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
__m512i interleave(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Transposes 16 x 16 elements of 32 bits.
void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 16; j += 8) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

}  // namespace
