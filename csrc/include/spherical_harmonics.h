// Real spherical harmonics to degree 3 in the signs and order of the 3D Gaussian files, as polynomials of a direction
// of length 1, and the color they give. Shared by CPU and GPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "everywhere.h"

namespace trellis {

// The terms of degree 0 to `Degree` in a direction; term k at basis[k * stride].
template <int Degree, class T>
TRELLIS_EVERYWHERE void harmonic_basis(T x, T y, T z, T* basis, int stride = 1) {
  constexpr T c1 = T(0.4886025119029199), c20 = T(1.0925484305920792), c22 = T(0.31539156525252005),
              c24 = T(0.5462742152960396), c30 = T(0.5900435899266435), c31 = T(2.890611442640554),
              c32 = T(0.4570457994644658), c33 = T(0.3731763325901154), c35 = T(1.445305721320277);
  const T xx = x * x, yy = y * y, zz = z * z;
  basis[0] = T(0.28209479177387814);
  if constexpr (Degree >= 1) {
    basis[1 * stride] = -c1 * y;
    basis[2 * stride] = c1 * z;
    basis[3 * stride] = -c1 * x;
  }
  if constexpr (Degree >= 2) {
    basis[4 * stride] = c20 * x * y;
    basis[5 * stride] = -c20 * y * z;
    basis[6 * stride] = c22 * (2 * zz - xx - yy);
    basis[7 * stride] = -c20 * x * z;
    basis[8 * stride] = c24 * (xx - yy);
  }
  if constexpr (Degree >= 3) {
    basis[9 * stride] = -c30 * y * (3 * xx - yy);
    basis[10 * stride] = c31 * x * y * z;
    basis[11 * stride] = -c32 * y * (4 * zz - xx - yy);
    basis[12 * stride] = c33 * z * (2 * zz - 3 * xx - 3 * yy);
    basis[13 * stride] = -c32 * x * (4 * zz - xx - yy);
    basis[14 * stride] = c35 * z * (xx - yy);
    basis[15 * stride] = -c30 * x * (xx - 3 * yy);
  }
}

// sum_k w_k d basis_k / d (x, y, z), with w_k at w[k * stride].
template <int Degree, class T>
TRELLIS_EVERYWHERE void harmonic_slope(T x, T y, T z, const T* w, int stride, T& by_x, T& by_y, T& by_z) {
  constexpr T c1 = T(0.4886025119029199), c20 = T(1.0925484305920792), c22 = T(0.31539156525252005),
              c24 = T(0.5462742152960396), c30 = T(0.5900435899266435), c31 = T(2.890611442640554),
              c32 = T(0.4570457994644658), c33 = T(0.3731763325901154), c35 = T(1.445305721320277);
  by_x = -c1 * w[3 * stride];
  by_y = -c1 * w[1 * stride];
  by_z = c1 * w[2 * stride];
  if constexpr (Degree >= 2) {
    const T w4 = c20 * w[4 * stride], w5 = -c20 * w[5 * stride], w6 = 2 * c22 * w[6 * stride],
            w7 = -c20 * w[7 * stride], w8 = 2 * c24 * w[8 * stride];
    by_x += y * w4 - x * w6 + z * w7 + x * w8;
    by_y += x * w4 + z * w5 - y * w6 - y * w8;
    by_z += y * w5 + 2 * z * w6 + x * w7;
  }
  if constexpr (Degree >= 3) {
    const T xx = x * x, yy = y * y, zz = z * z, xy = x * y, xz = x * z, yz = y * z;
    const T w9 = -3 * c30 * w[9 * stride], w10 = c31 * w[10 * stride], w11 = -c32 * w[11 * stride],
            w12 = 3 * c33 * w[12 * stride], w13 = -c32 * w[13 * stride], w14 = c35 * w[14 * stride],
            w15 = -3 * c30 * w[15 * stride];
    by_x += 2 * xy * w9 + yz * w10 - 2 * xy * w11 - 2 * xz * w12 + (4 * zz - 3 * xx - yy) * w13 + 2 * xz * w14 +
            (xx - yy) * w15;
    by_y += (xx - yy) * w9 + xz * w10 + (4 * zz - xx - 3 * yy) * w11 - 2 * yz * w12 - 2 * xy * w13 - 2 * yz * w14 -
            2 * xy * w15;
    by_z += xy * w10 + 8 * yz * w11 + (2 * zz - xx - yy) * w12 + 8 * xz * w13 + (xx - yy) * w14;
  }
}

// What a direction is divided by to have length 1: times this. 0 if it has no length or is not finite: then only
// degree 0 is seen.
template <class T>
TRELLIS_EVERYWHERE T inverse_length(T x, T y, T z) {
  const T square = x * x + y * y + z * z;
  return square > T(1e-24) && square <= T(3e38) ? 1 / std::sqrt(square) : T(0);
}

// A component of a direction of length 1, where NaN and infinity times 0 is 0.
template <class T>
TRELLIS_EVERYWHERE T scaled(T component, T inverse) {
  return inverse > 0 ? component * inverse : T(0);
}

// body<Degree>() for the degree that has so many terms. Degree 0 needs no direction and no kernel.
template <class Body>
void with_harmonic_degree(int64_t terms, const Body& body) {
  if (terms == 4) return body.template operator()<1>();
  if (terms == 9) return body.template operator()<2>();
  if (terms == 16) return body.template operator()<3>();
  throw std::invalid_argument("coefficients must have 4, 9 or 16 terms; got " + std::to_string(terms));
}

}  // namespace trellis
