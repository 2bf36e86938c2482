// Attention of one new token a row with its cached keys: GROUP queries share a KV head, and so each key and value is
// read once for all of them. The keys are split among BLOCKS threadgroups, whose partial results merge.metal joins, and
// among the SIMDGROUPS of each, in tiles of 32 keys. In a ring of R places, place j has the latest position that is j
// modulo R, and those WINDOW or more positions old are not seen.
//
// q: T [rows, VECTORS, DIM], of which the first KV_HEADS * GROUP are queries; kv: T [2, slots, KV_HEADS, places, DIM],
// or with BITS = 8 uint codes [2, slots, KV_HEADS, places, DIM / 4], with scales and biases float [2, slots, KV_HEADS,
// places, 1]; sinks: T [KV_HEADS * GROUP]; slots, positions: int [rows], where each row is in the cache and in its
// sequence; factor: float [1], on scores
// -> out: if SPLIT float [rows, KV_HEADS * GROUP, BLOCKS, DIM], sums of exp(score - top) * value, with states: float
// [rows, KV_HEADS * GROUP, BLOCKS, 2], top and the sum of exp(score - top); otherwise T [rows, KV_HEADS * GROUP, DIM],
// the result with the sinks, and states is not written.
// Template: T, OUT (out's type), int VECTORS, int GROUP, int DIM (a multiple of 32), int WINDOW (0: all are seen), int
// BITS (16 or 8), int SIMDGROUPS, bool SPLIT. Threadgroup: 32 * SIMDGROUPS. Grid: x: KV_HEADS; y: BLOCKS; z: rows.

constexpr int QUARTER = DIM / 4;     // of a key, which four lanes share
constexpr int PER_LANE = DIM / 32;   // of a value, which all lanes share
constexpr float LOWEST = -3.402823466e38f;

threadgroup float queries[GROUP * DIM];
threadgroup float query_sums[GROUP];
threadgroup float powers[SIMDGROUPS * 32 * GROUP];
threadgroup float outs[SIMDGROUPS * GROUP * DIM];
threadgroup float tops[SIMDGROUPS * GROUP];
threadgroup float totals[SIMDGROUPS * GROUP];

const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const int head = threadgroup_position_in_grid.x, heads = threadgroups_per_grid.x;
const int block = threadgroup_position_in_grid.y, blocks = threadgroups_per_grid.y;
const int row = threadgroup_position_in_grid.z;
const int position = positions[row];
const int capacity = kv_shape[3];
const int places = metal::min(position + 1, capacity);
const ulong key_row = (ulong(slots[row]) * heads + head) * capacity;
const ulong value_row = (ulong(kv_shape[1] + slots[row]) * heads + head) * capacity;
const int first_query = (row * heads + head) * GROUP;

for (int i = thread_index_in_threadgroup; i < GROUP * DIM; i += 32 * SIMDGROUPS) {
  queries[i] = float(q[(row * VECTORS + head * GROUP) * DIM + i]) * factor[0];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (BITS == 8 && thread_index_in_threadgroup < GROUP) {
  float sum = 0;
  for (int d = 0; d < DIM; d++) sum += queries[thread_index_in_threadgroup * DIM + d];
  query_sums[thread_index_in_threadgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float top[GROUP], total[GROUP], shift[GROUP], sums[GROUP * PER_LANE];  // total and shift: of the lane's own keys
#pragma clang loop unroll(full)
for (int h = 0; h < GROUP; h++) {
  top[h] = LOWEST;
  total[h] = shift[h] = 0;
}
#pragma clang loop unroll(full)
for (int i = 0; i < GROUP * PER_LANE; i++) sums[i] = 0;

const int quarter = lane % 4;
for (int start = (block * SIMDGROUPS + simdgroup) * 32; start < places; start += blocks * SIMDGROUPS * 32) {
  // Scores: eight keys at a time, then each lane owns one key of the tile.
  float scores[GROUP];
  for (int part = 0; part < 4; part++) {
    const ulong at = key_row + metal::min(start + part * 8 + int(lane) / 4, places - 1);
    float key[QUARTER];
    if constexpr (BITS == 8) {
      #pragma clang loop unroll(full)
      for (int i = 0; i < QUARTER / 4; i++) {
        const uint word = kv[at * (DIM / 4) + quarter * (QUARTER / 4) + i];
        #pragma clang loop unroll(full)
        for (int j = 0; j < 4; j++) key[4 * i + j] = float((word >> (8 * j)) & 255);
      }
    } else {
      #pragma clang loop unroll(full)
      for (int d = 0; d < QUARTER; d++) key[d] = float(kv[at * DIM + quarter * QUARTER + d]);
    }
    #pragma clang loop unroll(full)
    for (int h = 0; h < GROUP; h++) {
      float score = 0;
      #pragma clang loop unroll(full)
      for (int d = 0; d < QUARTER; d++) score += queries[h * DIM + quarter * QUARTER + d] * key[d];
      score += simd_shuffle_xor(score, 1);
      score += simd_shuffle_xor(score, 2);
      if (part == quarter) scores[h] = score;
    }
  }
  const int own = start + quarter * 8 + lane / 4;
  const bool seen = own < places && (WINDOW == 0 || (position - own) % capacity < WINDOW);
  float scale = 1, bias = 0;  // of the value of the own key
  if constexpr (BITS == 8) {
    const int at = metal::min(own, places - 1);
    const float key_scale = float(scales[key_row + at]), key_bias = float(biases[key_row + at]);
    #pragma clang loop unroll(full)
    for (int h = 0; h < GROUP; h++) scores[h] = scores[h] * key_scale + query_sums[h] * key_bias;
    scale = float(scales[value_row + at]);
    bias = float(biases[value_row + at]);
  }
  #pragma clang loop unroll(full)
  for (int h = 0; h < GROUP; h++) {
    const float new_top = metal::max(top[h], simd_max(seen ? scores[h] : LOWEST));
    const float shrink = metal::exp(top[h] - new_top);
    const float power = seen ? metal::exp(scores[h] - new_top) : 0.0f;
    top[h] = new_top;
    total[h] = total[h] * shrink + power;
    shift[h] = shift[h] * shrink + power * bias;
    #pragma clang loop unroll(full)
    for (int i = 0; i < PER_LANE; i++) sums[h * PER_LANE + i] *= shrink;
    powers[(simdgroup * 32 + own - start) * GROUP + h] = power * scale;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  // Values: one key at a time, each lane its own dimensions.
  const int count = metal::min(32, places - start);
  for (int j = 0; j < count; j++) {
    const ulong at = (value_row + start + j) * DIM + lane * PER_LANE;
    #pragma clang loop unroll(full)
    for (int i = 0; i < PER_LANE; i++) {
      float value;
      if constexpr (BITS == 8) {
        value = float(((const device uint8_t*)kv)[at + i]);
      } else {
        value = float(kv[at + i]);
      }
      #pragma clang loop unroll(full)
      for (int h = 0; h < GROUP; h++) {
        sums[h * PER_LANE + i] += powers[(simdgroup * 32 + j) * GROUP + h] * value;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

#pragma clang loop unroll(full)
for (int h = 0; h < GROUP; h++) {
  const float whole = simd_sum(total[h]), moved = simd_sum(shift[h]);
  if (lane == 0) {
    tops[simdgroup * GROUP + h] = top[h];
    totals[simdgroup * GROUP + h] = whole;
  }
  #pragma clang loop unroll(full)
  for (int i = 0; i < PER_LANE; i++) {
    outs[(simdgroup * GROUP + h) * DIM + lane * PER_LANE + i] = sums[h * PER_LANE + i] + moved;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int i = thread_index_in_threadgroup; i < GROUP * DIM; i += 32 * SIMDGROUPS) {
  const int h = i / DIM;
  float highest = SPLIT ? LOWEST : float(sinks[head * GROUP + h]);
  for (int s = 0; s < SIMDGROUPS; s++) highest = metal::max(highest, tops[s * GROUP + h]);
  float sum = SPLIT ? 0.0f : metal::exp(float(sinks[head * GROUP + h]) - highest), y = 0;
  for (int s = 0; s < SIMDGROUPS; s++) {
    const float shrink = metal::exp(tops[s * GROUP + h] - highest);
    sum += totals[s * GROUP + h] * shrink;
    y += outs[s * GROUP * DIM + i] * shrink;
  }
  if constexpr (SPLIT) {
    const ulong at = ulong(first_query + h) * blocks + block;
    out[at * DIM + i % DIM] = OUT(y);
    if (i % DIM == 0) {
      states[2 * at] = highest;
      states[2 * at + 1] = sum;
    }
  } else {
    out[first_query * DIM + i] = OUT(y / sum);
  }
}
