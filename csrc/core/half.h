// half.h: the two 16-bit element types. Arithmetic is never done in them: simd.h widens to float.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
namespace fusebn {

struct float16 {
  uint16_t bits;  // IEEE 754 binary16
};

struct bfloat16 {
  uint16_t bits;  // the upper half of a binary32
};

}  // namespace fusebn
#pragma GCC visibility pop
