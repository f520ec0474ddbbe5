// SPDX-License-Identifier: Apache-2.0
// Batch normalisation of one feature: its moments, and one value forward and backward. Host and
// device compile the same text, so the backward pass sees the very signs that ReLU saw.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace l0k {

// Mean and sum of squared deviations, collected from parts of the values.
//
// Differences from a shift are summed in float64. Any value near the others will do as shift: what
// is lost is of the order of 2^-53 (mean - shift)^2 / variance, and even where the shift is the one
// outlier among n values, its own share of the variance limits that to 2^-53 n.
struct MomentSums {
  double shift;
  double count;
  double sum;      // of value - shift
  double squares;  // of the same

  L0K_HD void add(double values, double mean, double deviations) {
    const double difference = mean - shift;
    count += values;
    sum += values * difference;
    squares += deviations + values * difference * difference;
  }

  L0K_HD double mean() const { return shift + sum / count; }

  // Rounding may leave a little less than zero; NaN stays.
  L0K_HD double deviations() const {
    const double rest = squares - sum * (sum / count);
    return rest < 0.0 ? 0.0 : rest;
  }
};

// An infinite shift would turn infinite values into NaN too early: their mean is infinite.
L0K_HD double usable_shift(double shift) { return shift - shift == 0.0 ? shift : 0.0; }

L0K_HD double reciprocal_deviation(double variance, double eps) {
  return 1.0 / sqrt(variance + eps);
}

L0K_HD double running_average(double old_value, double new_value, double momentum) {
  return (1.0 - momentum) * old_value + momentum * new_value;
}

// What turns a feature's numbers into results. S may have too few digits for the mean; what `mean`
// here lacks is in beta and grad_mean, so that y is right to rounding however far the numbers are
// from zero.
template <typename S>
struct NormConstants {
  S mean, alpha, beta;  // alpha = rstd weight, beta = bias
  S grad_mean, slope;   // of the backward pass: what all gradients of the batch have to give up
};

template <typename S>
L0K_HD double lost_digits(double mean) {
  return usable_shift(mean - static_cast<double>(static_cast<S>(mean)));
}

template <typename S>
L0K_HD NormConstants<S> norm_constants(double mean, S rstd, S weight, S bias) {
  const S alpha = rstd * weight;
  const double lost = lost_digits<S>(mean) * static_cast<double>(alpha);
  return {static_cast<S>(mean), alpha, static_cast<S>(static_cast<double>(bias) - lost), S(0),
          S(0)};
}

// Sums over the batch: the gradients before the activation, and their products with x - mean, the
// mean of the constants first, then with all its digits.
struct GradSums {
  double grad, product;
};

template <typename S>
L0K_HD GradSums with_all_digits(const GradSums& sums, double mean) {
  return {sums.grad, sums.product - lost_digits<S>(mean) * sums.grad};
}

// The gradient of x through the batch's own mean and variance; `sums` have all digits.
template <typename S>
L0K_HD void use_sums(NormConstants<S>& constants, const GradSums& sums, double count, double mean,
                     S rstd) {
  const double slope =
      sums.product / count * static_cast<double>(rstd) * static_cast<double>(rstd);
  constants.slope = static_cast<S>(slope);
  constants.grad_mean = static_cast<S>(sums.grad / count - lost_digits<S>(mean) * slope);
}

// Before the activation.
template <typename S>
L0K_HD S normalized(S x, S mean, S alpha, S beta) {
  return (x - mean) * alpha + beta;
}

// Written so that NaN stays, forward and backward.
template <typename S>
L0K_HD bool passes_relu(S value) {
  return !(value <= S(0));
}

template <typename S>
L0K_HD S relu(S value) {
  return passes_relu(value) ? value : S(0);
}

// The gradient of x under batch statistics, from the gradient before the activation.
template <typename S>
L0K_HD S norm_grad(S grad, S x, S mean, S alpha, S grad_mean, S slope) {
  return alpha * (grad - grad_mean - (x - mean) * slope);
}

}  // namespace l0k
