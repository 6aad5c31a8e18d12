// affine.h: the constants of a channel behind normalize and both backward verbs.
//
//   y = activation((x - mean) * a + offset + residual),   a = scale * rstd
//
// and never x * a + b, which cancels when |mean| >> std. The mean comes in double. With m the mean
// rounded to the type of the lanes, the rest of it goes into the offset,
//
//   y = activation((x - m) * a + b + residual),           b = offset - (mean - m) * a
//
// at no cost per element: mean - m is tiny, so b cancels nothing, and a float32 channel of
// 1e6 +- 1 is centred as exactly as its mean is known.
#pragma once
#include "activation.h"
#include "walks.h"

namespace fusebn::FUSEBN_TARGET {

struct Affine {
  double a, m_low;  // m_low = mean - m

  template <class T>
  Affine(const Normalization<T>& n, int64_t c) {
    a = n.scale ? double(n.scale[c]) * n.rstd[c] : n.rstd[c];
    m_low = n.mean[c] - double(Stat<T>(n.mean[c]));
  }

  template <class T>
  double b(const Normalization<T>& n, int64_t c) const {
    return (n.offset ? double(n.offset[c]) : 0) - m_low * a;
  }
};

// What the activation sees.
template <class T, class L>
FUSEBN_INLINE Vec<T> preactivation(Vec<T> centred, Vec<T> a, Vec<T> b, const T* residual, int64_t e,
                                   L lanes) {
  Vec<T> z = fma(centred, a, b);
  if (residual) z = z + load(residual + e, lanes);
  return z;
}

// Calls f with the activation as a constant.
template <class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::identity: return f.template operator()<Activation::identity>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::relu6: return f.template operator()<Activation::relu6>();
    case Activation::leaky_relu: return f.template operator()<Activation::leaky_relu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
  }
}

}  // namespace fusebn::FUSEBN_TARGET
