// The residual stream after a product, and the RMSNorm of that. One threadgroup a row.
//
// product, residual: T [rows, D]; weight: T [D]; epsilon: float [1] -> out, normed: T [rows, D]
// Template: T, int D, int THREADS (a multiple of 32, at most 1024). Grid: THREADS * rows threads.

constexpr int PER_THREAD = (D + THREADS - 1) / THREADS;

threadgroup float squares[THREADS / 32];

const uint row = threadgroup_position_in_grid.x;
const uint index = thread_index_in_threadgroup;
const ulong start = ulong(row) * D;

float values[PER_THREAD];
float square = 0;
#pragma clang loop unroll(full)
for (int i = 0; i < PER_THREAD; i++) {
  const uint at = index + i * THREADS;
  values[i] = 0;
  if (at < D) {
    const T sum = T(float(product[start + at]) + float(residual[start + at]));
    out[start + at] = sum;
    values[i] = float(sum);  // as rounded, which is what the next layer reads
    square += values[i] * values[i];
  }
}
square = simd_sum(square);
if (thread_index_in_simdgroup == 0) squares[simdgroup_index_in_threadgroup] = square;
threadgroup_barrier(mem_flags::mem_threadgroup);

float total = 0;
for (int i = 0; i < THREADS / 32; i++) total += squares[i];
const float scale = metal::precise::rsqrt(total / D + epsilon[0]);
#pragma clang loop unroll(full)
for (int i = 0; i < PER_THREAD; i++) {
  const uint at = index + i * THREADS;
  if (at < D) normed[start + at] = T(values[i] * scale * float(weight[at]));
}
