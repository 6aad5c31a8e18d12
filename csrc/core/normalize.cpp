// normalize.cpp: y = activation((x - mean) * scale * rstd + offset + residual), see affine.h.
//
// Method. One visit to every element. y may be x or residual: a vector is read before it is written.
#include "affine.h"

namespace fusebn::FUSEBN_TARGET {
namespace {

template <class T, Activation A>
struct Normalize {
  using V = Vec<T>;
  const T* x;
  const T* residual;
  T* out;
  bool streaming;

  FUSEBN_INLINE void prefetch(int64_t e) const {
    __builtin_prefetch(x + e, 0, 2);
    if (residual) __builtin_prefetch(residual + e, 0, 2);
  }

  template <bool rows, class L>
  FUSEBN_INLINE void visit(int64_t e, int64_t, const V (&k)[3], L lanes) const {
    const V z = preactivation(load(x + e, lanes) - k[0], k[1], k[2], residual, e, lanes);
    write(out + e, activate<A>(z), lanes, streaming);
  }
};

}  // namespace

template <class T>
void normalize(const T* x, Block b, const Normalization<T>& n, T* y, Executor& executor) {
  using S = Stat<T>;
  if (b.elements() == 0) return;
  ChannelConstants<T, 3> constants(b);
  for (int64_t c = 0; c < b.channels; ++c) {
    const Affine affine(n, c);
    constants.set(c, {S(n.mean[c]), S(affine.a), S(affine.b(n, c))});
  }
  constants.seal();
  const bool streaming = b.elements() * int64_t(sizeof(T)) >= streaming_bytes();
  with_activation(n.activation, [&]<Activation A>() {
    map(Normalize<T, A>{x, n.residual, y, streaming}, b, constants, false, executor);
  });
}

#define FUSEBN_INSTANTIATE(T) \
  template void normalize<T>(const T*, Block, const Normalization<T>&, T*, Executor&);
FUSEBN_INSTANTIATE(float16)
FUSEBN_INSTANTIATE(bfloat16)
FUSEBN_INSTANTIATE(float)
FUSEBN_INSTANTIATE(double)

}  // namespace fusebn::FUSEBN_TARGET
