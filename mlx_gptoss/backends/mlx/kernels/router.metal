// The ACTIVE largest router logits of a token and the softmax over them, largest first. Of equal logits the one of the
// lowest expert comes first. One simdgroup a token.
//
// logits: T [tokens, EXPERTS] -> experts: uint [tokens, ACTIVE], weights: T [tokens, ACTIVE]
// Template: T, int EXPERTS, int ACTIVE (at most 32 and at most EXPERTS). Grid: 32 * tokens threads in groups of 32.

constexpr int PER_LANE = (EXPERTS + 31) / 32;
constexpr uint SIGN = 0x80000000;

const uint token = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;

// Keys are ordered like the logits. They are integers, so that even NaNs have an order and every expert chosen is one
// that exists, and another one each time. 0 is no expert.
uint keys[PER_LANE];
#pragma clang loop unroll(full)
for (int i = 0; i < PER_LANE; i++) {
  const uint expert = lane + 32 * i;
  keys[i] = 0;
  if (expert < EXPERTS) {
    const uint bits = as_type<uint>(float(logits[token * EXPERTS + expert]));
    keys[i] = metal::max(bits & SIGN ? ~bits : bits | SIGN, 1u);
  }
}

float largest = 0, total = 0, share = 0;  // share: of the lane's place among the chosen
uint chosen = 0;
for (uint place = 0; place < ACTIVE; place++) {
  uint best = keys[0];
  #pragma clang loop unroll(full)
  for (int i = 1; i < PER_LANE; i++) best = metal::max(best, keys[i]);
  const uint top = simd_max(best);
  uint candidate = EXPERTS;
  #pragma clang loop unroll(full)
  for (int i = PER_LANE - 1; i >= 0; i--) {
    if (keys[i] == top) candidate = lane + 32 * i;
  }
  const uint expert = simd_min(candidate);
  #pragma clang loop unroll(full)
  for (int i = 0; i < PER_LANE; i++) {
    if (lane + 32 * i == expert) keys[i] = 0;
  }
  const float logit = as_type<float>(top & SIGN ? top & ~SIGN : ~top);
  if (place == 0) largest = logit;
  const float power = metal::exp(logit - largest);
  total += power;
  if (lane == place) {
    share = power;
    chosen = expert;
  }
}
if (lane < ACTIVE) {
  experts[token * ACTIVE + lane] = chosen;
  weights[token * ACTIVE + lane] = T(share / total);
}
