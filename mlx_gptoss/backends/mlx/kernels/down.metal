// down, its bias, the router's weights and the sum over every token's experts, added to the residual stream. Each
// simdgroup of a threadgroup computes ROWS rows of one of the token's experts.
//
// hidden: T [tokens, ACTIVE, D]; experts: uint [tokens, ACTIVE]; weights: T [tokens, ACTIVE]; codes, scales, biases: of
// [E, N, D], as in codes.metal; bias: [E, BEFORE + N], of which down's are the last N; residual: T [tokens, N];
// next_bias: T [N] -> out: T [tokens, N], and base: the same plus next_bias
// Template: T, int D, int N, int BEFORE, int GROUP, int BITS, bool E2M1, int ROWS, int ACTIVE (at most 32). Threadgroup:
// 32 * ACTIVE threads. Grid: x: threadgroups side by side, enough for N rows; y: tokens.

threadgroup float parts[ACTIVE * ROWS];

const uint lane = thread_index_in_simdgroup;
const uint token = threadgroup_position_in_grid.y;
const uint place = simdgroup_index_in_threadgroup;
const int first = threadgroup_position_in_grid.x * ROWS;
const uint pair = token * ACTIVE + place;
const ulong expert = experts[pair];
const ulong input = ulong(pair) * D;

float sums[ROWS] = {0};
for (int k = lane * STEP; k < D; k += 32 * STEP) {
  float values[STEP], total = 0;
  #pragma clang loop unroll(full)
  for (int i = 0; i < STEP; i++) {
    values[i] = float(hidden[input + k + i]);
    total += values[i];
  }
  #pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; r++) {
    const int row = metal::min(first + r, N - 1);  // beyond the last row it is computed again
    sums[r] += product_of_step<D, GROUP, BITS, E2M1>(
        (const device uint8_t*)codes, scales, biases, expert * N + row, k, values, total);
  }
}
#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; r++) {
  const float sum = simd_sum(sums[r]);
  if (lane == r && first + r < N) {
    parts[place * ROWS + r] = (sum + float(bias[expert * (BEFORE + N) + BEFORE + first + r])) * float(weights[pair]);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const int row = first + lane;
if (place == 0 && lane < ROWS && row < N) {
  float y = float(residual[token * N + row]);
  for (int i = 0; i < ACTIVE; i++) y += parts[i * ROWS + lane];
  out[token * N + row] = T(y);
  base[token * N + row] = T(y + float(next_bias[row]));
}
