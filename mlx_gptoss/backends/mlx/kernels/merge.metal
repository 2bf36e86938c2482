// Joins the partial results of attention.metal's blocks, and adds the sinks to the denominator. One threadgroup a query.
//
// partial: float [rows, HEADS, BLOCKS, DIM]; states: float [rows, HEADS, BLOCKS, 2]; sinks: T [HEADS] -> out: T [rows,
// HEADS, DIM]
// Template: T, int DIM. Threadgroup: DIM. Grid: x: HEADS; y: rows.

const int heads = threadgroups_per_grid.x, blocks = partial_shape[2];
const uint query = threadgroup_position_in_grid.y * heads + threadgroup_position_in_grid.x;
const uint dim = thread_index_in_threadgroup;
const ulong first = ulong(query) * blocks;
const float sink = float(sinks[threadgroup_position_in_grid.x]);

float highest = sink;
for (int block = 0; block < blocks; block++) highest = metal::max(highest, states[2 * (first + block)]);
float sum = metal::exp(sink - highest), y = 0;
for (int block = 0; block < blocks; block++) {
  const float shrink = metal::exp(states[2 * (first + block)] - highest);
  sum += states[2 * (first + block) + 1] * shrink;
  y += partial[(first + block) * DIM + dim] * shrink;
}
out[ulong(query) * DIM + dim] = T(y / sum);
