// simd.h: vectors of 64 bytes of elements, whatever the machine has underneath.
//
// A Vec<T> holds 64 bytes of elements of type T, widened to Stat<T>: 16 floats, 8 doubles, or 32 floats
// where the elements have 16 bits. Sixteen floats are one register with AVX-512, two with AVX2, four
// with SSE or NEON. The lanes, and with them the order of every sum, are the same everywhere; fma() is
// one rounding wherever the hardware has it, and the compiler is told never to invent one
// (-ffp-contract=off). So x86-64-v3 and x86-64-v4 return the same bits.
//
// The lanes of a Vec<bfloat16> are its even elements, then its odd ones: a shift and a mask take them
// out of memory as they lie, where restoring their order would cost more than the arithmetic. What is
// laid out beside the elements (constants, sums) is laid out like this, too: see `lane_of`.
//
// This header is compiled once for each instruction set, inside namespace FUSEBN_TARGET. It uses
// nothing from the standard library that could end up as a shared (weak) symbol: the linker would
// keep one copy for all instruction sets, perhaps one this machine cannot run.
#pragma once
#include <cstdint>

#include "batch_norm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fusebn::FUSEBN_TARGET {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FUSEBN_AVX512 1
inline constexpr int kRegister = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FUSEBN_AVX2 1
inline constexpr int kRegister = 32;
#else
inline constexpr int kRegister = 16;
#endif

#define FUSEBN_INLINE inline __attribute__((always_inline))

template <class S, int bytes>
struct RegisterOf {
  typedef S type __attribute__((vector_size(bytes)));
};
template <class S>
using Register = typename RegisterOf<S, kRegister>::type;
using Bits = Register<uint32_t>;

template <class T>
struct Vec {
  using S = Stat<T>;
  static constexpr int kLanes = 64 / sizeof(T);
  static constexpr int kParts = kLanes * sizeof(S) / kRegister;
  static constexpr int kPartLanes = kLanes / kParts;
  Register<S> part[kParts];
};

// How many elements apart those of neighbouring lanes are, and the lane of an element.
template <class T>
inline constexpr int kStep = std::is_same_v<T, bfloat16> ? 2 : 1;
template <class T>
constexpr int lane_of(int element) {
  return element % kStep<T> * (Vec<T>::kLanes / kStep<T>) + element / kStep<T>;
}

// Full: all elements count. Part: only the first n do (0 < n < kLanes).
struct Full {};
struct Part {
  int64_t n;
};

// Builds a Vec register by register; spelled out, so that the parts never leave their registers.
template <class T, class F>
FUSEBN_INLINE Vec<T> each(F f) {
  constexpr int n = Vec<T>::kParts;
  Vec<T> r;
  r.part[0] = f(0);
  if constexpr (n >= 2) r.part[1] = f(1);
  if constexpr (n >= 4) r.part[2] = f(2), r.part[3] = f(3);
  if constexpr (n == 8) r.part[4] = f(4), r.part[5] = f(5), r.part[6] = f(6), r.part[7] = f(7);
  return r;
}

template <class T>
FUSEBN_INLINE Vec<T> splat(Stat<T> value) {
  return each<T>([=](int) { return Register<Stat<T>>{} + value; });
}
template <class T>
FUSEBN_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return each<T>([=](int i) { return a.part[i] + b.part[i]; });
}
template <class T>
FUSEBN_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return each<T>([=](int i) { return a.part[i] - b.part[i]; });
}
template <class T>
FUSEBN_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return each<T>([=](int i) { return a.part[i] * b.part[i]; });
}
template <class T>
FUSEBN_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return each<T>([=](int i) { return a.part[i] / b.part[i]; });
}

// a < b ? yes : no, lane by lane. A comparison with NaN is false.
template <class T>
FUSEBN_INLINE Vec<T> where_less(Vec<T> a, Vec<T> b, Vec<T> yes, Vec<T> no) {
  return each<T>([=](int i) { return a.part[i] < b.part[i] ? yes.part[i] : no.part[i]; });
}

// a == 0 ? yes : no.
template <class T>
FUSEBN_INLINE Vec<T> where_zero(Vec<T> a, Vec<T> yes, Vec<T> no) {
  return each<T>([=](int i) { return a.part[i] == Stat<T>(0) ? yes.part[i] : no.part[i]; });
}

// a * b + c in one rounding where the machine has it (x86-64-v2 has not).
FUSEBN_INLINE Register<float> fused(Register<float> a, Register<float> b, Register<float> c) {
#if FUSEBN_AVX512
  return (Register<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FUSEBN_AVX2
  return (Register<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Register<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FUSEBN_INLINE Register<double> fused(Register<double> a, Register<double> b, Register<double> c) {
#if FUSEBN_AVX512
  return (Register<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FUSEBN_AVX2
  return (Register<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
  return (Register<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}
template <class T>
FUSEBN_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return each<T>([=](int i) { return fused(a.part[i], b.part[i], c.part[i]); });
}

template <class T, int bytes>
FUSEBN_INLINE Stat<T> sum_halves(const Stat<T>* lanes) {
  if constexpr (bytes == sizeof(Stat<T>)) {
    return lanes[0];
  } else {
    typename RegisterOf<Stat<T>, bytes / 2>::type low, high;
    __builtin_memcpy(&low, lanes, bytes / 2);
    __builtin_memcpy(&high, (const char*)lanes + bytes / 2, bytes / 2);
    low = low + high;
    return sum_halves<T, bytes / 2>((const Stat<T>*)&low);
  }
}

// The sum of all lanes, by halves: the same order on every machine.
template <class T>
FUSEBN_INLINE Stat<T> sum(Vec<T> v) {
  return sum_halves<T, sizeof v>((const Stat<T>*)&v);
}

// ---- lanes in memory ----

// As they are: the first half of them from one place, the second from another.
template <class T>
FUSEBN_INLINE Vec<T> load_lanes(const Stat<T>* first, const Stat<T>* second) {
  using V = Vec<T>;
  return each<T>([=](int i) {
    Register<Stat<T>> r;
    const int half = V::kParts / 2;
    __builtin_memcpy(&r, i < half ? first + i * V::kPartLanes : second + (i - half) * V::kPartLanes,
                     sizeof r);
    return r;
  });
}
template <class T>
FUSEBN_INLINE Vec<T> load_lanes(const Stat<T>* p) {
  return load_lanes<T>(p, p + (Vec<T>::kParts / 2) * Vec<T>::kPartLanes);
}
template <class T>
FUSEBN_INLINE void store_lanes(Stat<T>* p, Vec<T> v) {
  for (int i = 0; i < Vec<T>::kParts; ++i)
    __builtin_memcpy(p + i * Vec<T>::kPartLanes, &v.part[i], sizeof v.part[i]);
}

// Numbers that lie in the order of the elements; the lanes that do not count are 0.
template <class T>
FUSEBN_INLINE Vec<T> load_in_order(const Stat<T>* p, Full) {
  using V = Vec<T>;
  if constexpr (kStep<T> == 1) {
    return load_lanes<T>(p);
  } else {
    constexpr int n = V::kPartLanes, half = V::kParts / 2;
    return each<T>([=](int i) {
      Register<float> pair[2];
      __builtin_memcpy(pair, p + i % half * 2 * n, sizeof pair);
      Bits every_other;
      for (int j = 0; j < n; ++j) every_other[j] = 2 * j + i / half;
      return __builtin_shuffle(pair[0], pair[1], every_other);
    });
  }
}
template <class T>
FUSEBN_INLINE Vec<T> load_in_order(const Stat<T>* p, Part lanes) {
  Stat<T> lane[Vec<T>::kLanes] = {};
  for (int64_t i = 0; i < lanes.n; ++i) lane[i] = p[i];
  return load_in_order<T>(lane, Full{});
}

// The first n elements of one, then the other's.
template <class T>
FUSEBN_INLINE Vec<T> splice(Vec<T> first, int64_t n, Vec<T> other) {
  struct Elements {
    alignas(64) Stat<T> of[Vec<T>::kLanes];
    constexpr Elements() : of() {
      for (int e = 0; e < Vec<T>::kLanes; ++e) of[lane_of<T>(e)] = Stat<T>(e);
    }
  };
  static constexpr Elements kElements;
  return where_less(load_lanes<T>(kElements.of), splat<T>(Stat<T>(n)), first, other);
}

// The lanes that count, 0 in the others.
template <class T>
FUSEBN_INLINE Vec<T> keep(Vec<T> v, Full) {
  return v;
}
template <class T>
FUSEBN_INLINE Vec<T> keep(Vec<T> v, Part lanes) {
  return splice(v, lanes.n, splat<T>(0));
}

// ---- 16-bit elements ----

typedef uint16_t Halves __attribute__((vector_size(kRegister / 2)));

FUSEBN_INLINE Register<float> to_float(Halves h) {
#if FUSEBN_AVX512
  return (Register<float>)_mm512_cvtph_ps((__m256i)h);
#elif FUSEBN_AVX2
  return (Register<float>)_mm256_cvtph_ps((__m128i)h);
#else
  // Move exponent and mantissa into place and rebias the exponent by 112; all ones become all ones,
  // and for a zero exponent the leading 1 that this would imply is subtracted again.
  const Bits wide = __builtin_convertvector(h, Bits);
  const Bits magnitude = (wide & 0x7fff) << 13, exponent = magnitude & (0x7c00u << 13);
  const Bits normal = magnitude + (112u << 23);
  const Bits special = normal + (112u << 23);
  const Bits tiny_sum = normal + (1u << 23);
  const Bits tiny = (Bits)((Register<float>)tiny_sum - (Register<float>)(Bits{} + (113u << 23)));
  const Bits bits = exponent == (0x7c00u << 13) ? special : exponent == 0 ? tiny : normal;
  return (Register<float>)(bits | ((wide & 0x8000) << 16));
#endif
}

// Round to nearest, ties to even; a NaN stays one.
FUSEBN_INLINE Halves to_half(Register<float> v) {
#if FUSEBN_AVX512
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FUSEBN_AVX2
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits u = (Bits)v;
  // In the integer for normal results; for tiny ones by adding 0.5, whose last bit is the last bit
  // of a binary16 denormal.
  const Bits magnitude = u & 0x7fffffff;
  const Bits half_bits = Bits{} + (126u << 23);
  const Bits tiny = (Bits)((Register<float>)magnitude + (Register<float>)half_bits) - half_bits;
  const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Bits special = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits bits = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? tiny : normal;
  return __builtin_convertvector(bits | ((u >> 16) & 0x8000), Halves);
#endif
}

// Rounds to bfloat16, in the upper half of each lane: to nearest, ties to even. A NaN stays as it is if
// its lower half is 0. It is: those of elements have no lower half, `quiet` takes it from those of
// constants, and arithmetic makes none of its own.
// Not by the instruction of AVX512-BF16: it flushes denormals to zero, and no other machine does.
FUSEBN_INLINE Bits round_upper(Register<float> v) {
  const Bits u = (Bits)v;
#if FUSEBN_AVX512
  // The last bit that stays is added where it is set: two instructions instead of three.
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
  const __m512i r = _mm512_add_epi32((__m512i)u, _mm512_set1_epi32(0x7fff));
  return (Bits)_mm512_mask_sub_epi32(r, odd, r, _mm512_set1_epi32(-1));
#else
  return u + 0x7fff + ((u >> 16) & 1);
#endif
}
template <class S>
FUSEBN_INLINE S quiet(S constant) {
  return constant == constant ? constant : S(__builtin_nan(""));
}

// ---- elements in memory ----

// The 64 bytes of a Vec's elements, as they lie in memory.
template <class T>
struct Packed {
  using Word = std::conditional_t<std::is_same_v<T, float16>, Halves, Bits>;
  static constexpr int kWords = 64 / sizeof(Word);
  Word word[kWords];
};

template <class T>
FUSEBN_INLINE Packed<T> pack(Vec<T> v) {
  Packed<T> r;
  constexpr int n = Packed<T>::kWords;
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, bfloat16>)
      r.word[i] = round_upper(v.part[i]) >> 16 | (round_upper(v.part[i + n]) & 0xffff0000u);
    else if constexpr (std::is_same_v<T, float16>)
      r.word[i] = to_half(v.part[i]);
    else
      r.word[i] = (Bits)v.part[i];
  }
  return r;
}

template <class T>
FUSEBN_INLINE Vec<T> load(const T* p, Full) {
  using V = Vec<T>;
  return each<T>([=](int i) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      constexpr int n = Packed<T>::kWords;
      Bits pairs;
      __builtin_memcpy(&pairs, p + i % n * 2 * V::kPartLanes, sizeof pairs);
      return (Register<float>)(i < n ? pairs << 16 : pairs & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, float16>) {
      Halves h;
      __builtin_memcpy(&h, p + i * V::kPartLanes, sizeof h);
      return to_float(h);
    } else {
      Register<T> r;
      __builtin_memcpy(&r, p + i * V::kPartLanes, sizeof r);
      return r;
    }
  });
}
template <class T>
FUSEBN_INLINE void store(T* p, Vec<T> v, Full) {
  const Packed<T> packed = pack(v);
  for (int i = 0; i < Packed<T>::kWords; ++i)
    __builtin_memcpy((char*)p + i * sizeof packed.word[i], &packed.word[i], sizeof packed.word[i]);
}

// Past the cache, to an address that is a multiple of 64; fence() before others may read.
template <class T>
FUSEBN_INLINE void stream(T* p, Vec<T> v) {
#ifdef __x86_64__
  const Packed<T> packed = pack(v);
  for (int i = 0; i < Packed<T>::kWords; ++i) {
    const auto word = packed.word[i];
    char* const to = (char*)p + i * sizeof word;
    if constexpr (sizeof word == 8) _mm_stream_si64((long long*)to, (long long)word);
    if constexpr (sizeof word == 16) _mm_stream_si128((__m128i*)to, (__m128i)word);
#if FUSEBN_AVX512 || FUSEBN_AVX2
    if constexpr (sizeof word == 32) _mm256_stream_si256((__m256i*)to, (__m256i)word);
#endif
#if FUSEBN_AVX512
    if constexpr (sizeof word == 64) _mm512_stream_si512((__m512i*)to, (__m512i)word);
#endif
  }
#else
  store(p, v, Full{});
#endif
}

FUSEBN_INLINE void fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// The elements that do not count are read as 0 and never written.
template <class T>
FUSEBN_INLINE Vec<T> load(const T* p, Part lanes) {
  T element[Vec<T>::kLanes] = {};
#if FUSEBN_AVX512
  const uint64_t mask = (uint64_t(1) << lanes.n) - 1;
  __m512i r;
  if constexpr (sizeof(T) == 2) r = _mm512_maskz_loadu_epi16(__mmask32(mask), p);
  if constexpr (sizeof(T) == 4) r = _mm512_maskz_loadu_epi32(__mmask16(mask), p);
  if constexpr (sizeof(T) == 8) r = _mm512_maskz_loadu_epi64(__mmask8(mask), p);
  __builtin_memcpy(element, &r, sizeof r);
#else
  for (int64_t i = 0; i < lanes.n; ++i) element[i] = p[i];
#endif
  return load(element, Full{});
}
template <class T>
FUSEBN_INLINE void store(T* p, Vec<T> v, Part lanes) {
  const Packed<T> packed = pack(v);
#if FUSEBN_AVX512
  const uint64_t mask = (uint64_t(1) << lanes.n) - 1;
  __m512i r;
  __builtin_memcpy(&r, &packed, sizeof r);
  if constexpr (sizeof(T) == 2) _mm512_mask_storeu_epi16(p, __mmask32(mask), r);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, __mmask16(mask), r);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(p, __mmask8(mask), r);
#else
  T element[Vec<T>::kLanes];
  __builtin_memcpy(element, &packed, sizeof packed);
  for (int64_t i = 0; i < lanes.n; ++i) p[i] = element[i];
#endif
}

// One element.
template <class T>
FUSEBN_INLINE Stat<T> value(const T* p) {
  return load(p, Part{1}).part[0][0];
}

}  // namespace fusebn::FUSEBN_TARGET
