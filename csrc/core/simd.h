// simd.h: vectors of 64 bytes, whatever the machine has underneath.
//
// One Vec is 16 floats or 8 doubles: one register with AVX-512, two with AVX2, four with SSE or
// NEON. The lane count, and with it the order of every sum, is the same everywhere; fma() is one
// rounding wherever the hardware has it, and the compiler is told never to invent one
// (-ffp-contract=off). So x86-64-v3 and x86-64-v4 return the same bits.
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

// The unsigned integer as wide as S, and the register types. `aligned(1)` loads from anywhere.
template <class S> struct Lane;
template <> struct Lane<float> {
  using Bits = uint32_t;
};
template <> struct Lane<double> {
  using Bits = uint64_t;
};
template <class S, int bytes>
struct RegisterOf {
  typedef S type __attribute__((vector_size(bytes)));
};
template <class S>
using Register = typename RegisterOf<S, kRegister>::type;

template <class S>
struct Vec {
  static constexpr int kLanes = 64 / sizeof(S);
  static constexpr int kParts = 64 / kRegister;
  static constexpr int kPartLanes = kLanes / kParts;
  Register<S> part[kParts];
};

// Full: all lanes count. Part: only the first n do (0 < n < kLanes).
struct Full {};
struct Part {
  int64_t n;
};

// Builds a Vec register by register; spelled out, so that the parts never leave their registers.
template <class S, class F>
FUSEBN_INLINE Vec<S> each(F f) {
  Vec<S> r;
  r.part[0] = f(0);
  if constexpr (Vec<S>::kParts >= 2) r.part[1] = f(1);
  if constexpr (Vec<S>::kParts == 4) r.part[2] = f(2), r.part[3] = f(3);
  return r;
}

template <class S>
FUSEBN_INLINE Vec<S> splat(S value) {
  return each<S>([=](int) { return Register<S>{} + value; });
}
template <class S>
FUSEBN_INLINE Vec<S> operator+(Vec<S> a, Vec<S> b) {
  return each<S>([=](int i) { return a.part[i] + b.part[i]; });
}
template <class S>
FUSEBN_INLINE Vec<S> operator-(Vec<S> a, Vec<S> b) {
  return each<S>([=](int i) { return a.part[i] - b.part[i]; });
}
template <class S>
FUSEBN_INLINE Vec<S> operator*(Vec<S> a, Vec<S> b) {
  return each<S>([=](int i) { return a.part[i] * b.part[i]; });
}
template <class S>
FUSEBN_INLINE Vec<S> operator/(Vec<S> a, Vec<S> b) {
  return each<S>([=](int i) { return a.part[i] / b.part[i]; });
}

// a < b ? yes : no, lane by lane. A comparison with NaN is false.
template <class S>
FUSEBN_INLINE Vec<S> where_less(Vec<S> a, Vec<S> b, Vec<S> yes, Vec<S> no) {
  return each<S>([=](int i) { return a.part[i] < b.part[i] ? yes.part[i] : no.part[i]; });
}

// a == 0 ? yes : no.
template <class S>
FUSEBN_INLINE Vec<S> where_zero(Vec<S> a, Vec<S> yes, Vec<S> no) {
  return each<S>([=](int i) { return a.part[i] == S(0) ? yes.part[i] : no.part[i]; });
}

// a * b + c in one rounding where the machine has it (x86-64-v2 has not).
FUSEBN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return each<float>([=](int i) -> Register<float> {
#if FUSEBN_AVX512
    return (Register<float>)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]);
#elif FUSEBN_AVX2
    return (Register<float>)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#elif defined(__ARM_NEON)
    return (Register<float>)vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i],
                                      (float32x4_t)b.part[i]);
#else
    return a.part[i] * b.part[i] + c.part[i];
#endif
  });
}
FUSEBN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return each<double>([=](int i) -> Register<double> {
#if FUSEBN_AVX512
    return (Register<double>)_mm512_fmadd_pd((__m512d)a.part[i], (__m512d)b.part[i],
                                             (__m512d)c.part[i]);
#elif FUSEBN_AVX2
    return (Register<double>)_mm256_fmadd_pd((__m256d)a.part[i], (__m256d)b.part[i],
                                             (__m256d)c.part[i]);
#elif defined(__ARM_NEON)
    return (Register<double>)vfmaq_f64((float64x2_t)c.part[i], (float64x2_t)a.part[i],
                                       (float64x2_t)b.part[i]);
#else
    return a.part[i] * b.part[i] + c.part[i];
#endif
  });
}

// The first n lanes of one, then the other's.
template <class S>
FUSEBN_INLINE Vec<S> splice(Vec<S> first, int64_t n, Vec<S> other) {
  alignas(64) static constexpr S kIndex[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                               8, 9, 10, 11, 12, 13, 14, 15};
  Vec<S> index;
  __builtin_memcpy(&index, kIndex, sizeof index);
  return where_less(index, splat(S(n)), first, other);
}

// The lanes that count, 0 in the others.
template <class S>
FUSEBN_INLINE Vec<S> keep(Vec<S> v, Full) {
  return v;
}
template <class S>
FUSEBN_INLINE Vec<S> keep(Vec<S> v, Part lanes) {
  return splice(v, lanes.n, splat(S(0)));
}

template <class S, int bytes>
FUSEBN_INLINE S sum_halves(const S* lanes) {
  if constexpr (bytes == sizeof(S)) {
    return lanes[0];
  } else {
    typename RegisterOf<S, bytes / 2>::type low, high;
    __builtin_memcpy(&low, lanes, bytes / 2);
    __builtin_memcpy(&high, (const char*)lanes + bytes / 2, bytes / 2);
    low = low + high;
    return sum_halves<S, bytes / 2>((const S*)&low);
  }
}

// The sum of all lanes, by halves: the same order on every machine.
template <class S>
FUSEBN_INLINE S sum(Vec<S> v) {
  return sum_halves<S, 64>((const S*)&v);
}

// ---- 16-bit elements, one register of 32-bit lanes at a time ----

using Bits = Register<uint32_t>;
typedef uint16_t Halves __attribute__((vector_size(kRegister / 2)));

template <class T>
FUSEBN_INLINE Register<float> to_float(Halves h) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if FUSEBN_AVX512
    // Half i goes to half 2 i + 1: one instruction, where widening and shifting are two.
    alignas(64) static constexpr uint16_t kFrom[32] = {
        0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
        0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    return (Register<float>)_mm512_maskz_permutexvar_epi16(
        0xaaaaaaaa, _mm512_load_si512(kFrom), _mm512_castsi256_si512((__m256i)h));
#else
    return (Register<float>)(__builtin_convertvector(h, Bits) << 16);
#endif
  }
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

// Round to nearest, ties to even; a NaN stays one (in bfloat16 the NaN 0x7fc0).
template <class T>
FUSEBN_INLINE Halves from_float(Register<float> v) {
  [[maybe_unused]] const Bits u = (Bits)v;
  if constexpr (std::is_same_v<T, bfloat16>) {
    // Not the instruction of AVX512-BF16: it flushes denormals to zero, and no other machine does.
#if FUSEBN_AVX512
    // As below, with the NaN put in by the first addition and the odd bit added where it is set.
    const __m512i bits = (__m512i)u;
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i r = _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), number, bits,
                                      _mm512_set1_epi32(0x7fff));
    r = _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                        17, 19, 21, 23, 25, 27, 29, 31};
    return (Halves)_mm512_castsi512_si256(
        _mm512_permutexvar_epi16(_mm512_load_si512(kUpper), r));
#else
    const Bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const Bits bits = (u & 0x7fffffff) > 0x7f800000 ? Bits{} + 0x7fc0 : rounded;
    return __builtin_convertvector(bits, Halves);
#endif
  }
#if FUSEBN_AVX512
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FUSEBN_AVX2
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
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

// ---- load and store: elements of any type, as lanes of Stat ----

template <class T>
FUSEBN_INLINE Vec<Stat<T>> load(const T* p, Full) {
  using V = Vec<Stat<T>>;
  return each<Stat<T>>([=](int i) {
    if constexpr (sizeof(T) == 2) {
      Halves h;
      __builtin_memcpy(&h, p + i * V::kPartLanes, sizeof h);
      return to_float<T>(h);
    } else {
      Register<T> r;
      __builtin_memcpy(&r, p + i * V::kPartLanes, sizeof r);
      return r;
    }
  });
}
template <class T>
FUSEBN_INLINE void store(T* p, Vec<Stat<T>> v, Full) {
  using V = Vec<Stat<T>>;
  for (int i = 0; i < V::kParts; ++i) {
    if constexpr (sizeof(T) == 2) {
      const Halves h = from_float<T>(v.part[i]);
      __builtin_memcpy(p + i * V::kPartLanes, &h, sizeof h);
    } else {
      __builtin_memcpy(p + i * V::kPartLanes, &v.part[i], sizeof v.part[i]);
    }
  }
}

// Past the cache, to an address that is a multiple of kStreamAlign; fence() before others may read.
template <class T>
inline constexpr int64_t kStreamAlign = sizeof(T) * Vec<Stat<T>>::kLanes;

template <class T>
FUSEBN_INLINE void stream(T* p, Vec<Stat<T>> v) {
#ifdef __x86_64__
  alignas(64) char bytes[kStreamAlign<T>];
  store(reinterpret_cast<T*>(bytes), v, Full{});
#if FUSEBN_AVX512
  if constexpr (sizeof bytes == 64)
    return _mm512_stream_si512((__m512i*)p, _mm512_load_si512((const __m512i*)bytes));
#endif
#if FUSEBN_AVX512 || FUSEBN_AVX2
  for (int i = 0; i < int(sizeof bytes); i += 32)
    _mm256_stream_si256((__m256i*)((char*)p + i), _mm256_load_si256((const __m256i*)(bytes + i)));
#else
  for (int i = 0; i < int(sizeof bytes); i += 16)
    _mm_stream_si128((__m128i*)((char*)p + i), _mm_load_si128((const __m128i*)(bytes + i)));
#endif
#else
  store(p, v, Full{});
#endif
}

FUSEBN_INLINE void fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// The lanes that do not count are read as 0 and never written.
template <class T>
FUSEBN_INLINE Vec<Stat<T>> load(const T* p, Part lanes) {
#if FUSEBN_AVX512
  const unsigned mask = (1u << lanes.n) - 1;
  if constexpr (sizeof(T) == 2) return {to_float<T>((Halves)_mm256_maskz_loadu_epi16(mask, p))};
  if constexpr (sizeof(T) == 4) return {(Register<float>)_mm512_maskz_loadu_ps(mask, p)};
  if constexpr (sizeof(T) == 8) return {(Register<double>)_mm512_maskz_loadu_pd(mask, p)};
#endif
  T lane[Vec<Stat<T>>::kLanes] = {};
  for (int64_t i = 0; i < lanes.n; ++i) lane[i] = p[i];
  return load(lane, Full{});
}
template <class T>
FUSEBN_INLINE void store(T* p, Vec<Stat<T>> v, Part lanes) {
#if FUSEBN_AVX512
  const unsigned mask = (1u << lanes.n) - 1;
  if constexpr (sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(p, mask, (__m256i)from_float<T>(v.part[0]));
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, mask, (__m512)v.part[0]);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, mask, (__m512d)v.part[0]);
#endif
  T lane[Vec<Stat<T>>::kLanes];
  store(lane, v, Full{});
  for (int64_t i = 0; i < lanes.n; ++i) p[i] = lane[i];
}

// One element.
template <class T>
FUSEBN_INLINE Stat<T> value(const T* p) {
  return load(p, Part{1}).part[0][0];
}

}  // namespace fusebn::FUSEBN_TARGET
