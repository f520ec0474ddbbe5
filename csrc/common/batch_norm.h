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

// Before the activation; alpha = rstd weight, beta = bias.
template <typename S>
L0K_HD S normalized(S x, S mean, S alpha, S beta) {
  return (x - mean) * alpha + beta;
}

// Written so that NaN stays, forward and backward.
template <typename S>
L0K_HD S relu(S value) {
  return value <= S(0) ? S(0) : value;
}

template <typename S>
L0K_HD S relu_grad(S grad, S value) {
  return value <= S(0) ? S(0) : grad;
}

// The gradient of x under batch statistics, from the gradient before the activation; grad_mean is
// the mean of these gradients over the batch, slope the mean of grad (x - mean), times rstd^2.
template <typename S>
L0K_HD S norm_grad(S grad, S x, S mean, S alpha, S grad_mean, S slope) {
  return alpha * (grad - grad_mean - (x - mean) * slope);
}

}  // namespace l0k
