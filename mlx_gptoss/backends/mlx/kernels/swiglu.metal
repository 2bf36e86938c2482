// gate_up, its bias and the clamped SwiGLU of every token's experts. A simdgroup computes ROWS values: as many rows of
// gate and of up.
//
// x: T [tokens, D]; experts: uint [tokens, ACTIVE]; codes, scales, biases: of [E, 2 I, D], gate rows first, as in
// codes.metal; bias: [E, 2 I + OUT]; limits: float [2], SwiGLU's limit and alpha -> hidden: T [tokens, ACTIVE, I]
// Template: T, int D, int I, int OUT, int GROUP, int BITS, bool E2M1, int ROWS, int ACTIVE. Grid: x: simdgroups side by
// side, enough for I rows; y: tokens * ACTIVE.

const uint lane = thread_index_in_simdgroup;
const uint pair = threadgroup_position_in_grid.y;
const int first =
    (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * ROWS;
const ulong expert = experts[pair];
const ulong input = pair / ACTIVE * D;

float sums[2 * ROWS] = {0};
for (int k = lane * STEP; k < D; k += 32 * STEP) {
  float values[STEP], total = 0;
  #pragma clang loop unroll(full)
  for (int i = 0; i < STEP; i++) {
    values[i] = float(x[input + k + i]);
    total += values[i];
  }
  #pragma clang loop unroll(full)
  for (int r = 0; r < 2 * ROWS; r++) {
    // Beyond the last row it is computed again.
    const int row = (r < ROWS ? 0 : I) + metal::min(first + r % ROWS, I - 1);
    sums[r] += product_of_step<D, GROUP, BITS, E2M1>(
        (const device uint8_t*)codes, scales, biases, expert * (2 * I) + row, k, values, total);
  }
}
#pragma clang loop unroll(full)
for (int r = 0; r < 2 * ROWS; r++) sums[r] = simd_sum(sums[r]);

const float limit = limits[0], alpha = limits[1];
#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; r++) {
  const int row = first + r;
  if (lane == r && row < I) {
    const ulong at = expert * (2 * I + OUT) + row;
    float gate = sums[r] + float(bias[at]);
    float up = sums[ROWS + r] + float(bias[at + I]);
    gate = gate > limit ? limit : gate;  // unlike min and max, this keeps a NaN
    up = up > limit ? limit : up < -limit ? -limit : up;
    hidden[ulong(pair) * I + row] = T(gate / (1.0f + metal::exp(-alpha * gate)) * (up + 1.0f));
  }
}
