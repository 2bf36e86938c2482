// Products with quantized weights, for the bodies in swiglu.metal and down.metal. Codes lie as MLX has them: rows of
// D * BITS / 8 bytes, lowest bits first; E2M1 are the 4-bit floats of MXFP4, others unsigned integers. A group of GROUP
// weights shares a scale, and integers a bias: weight = code * scale + bias.

constant constexpr int STEP = 16;  // weights that a lane takes at once: within one group, which has 32 at least

// The sum of code * x over 8 codes in BITS bytes.
template <int BITS>
inline float product_of_8(const device uint8_t* codes, const thread float* x) {
  float sum = 0;
  if constexpr (BITS == 4) {
    const uint word = *(const device uint*)codes;
    #pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++) sum += float(word >> 4 * i & 15) * x[i];
  } else {
    ulong word = 0;
    #pragma clang loop unroll(full)
    for (int i = 0; i < BITS; i++) word |= ulong(codes[i]) << 8 * i;
    #pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++) sum += float(uint(word >> BITS * i) & ((1u << BITS) - 1)) * x[i];
  }
  return sum;
}

// The sum of code * x over 8 codes E2M1, divided by 2^14. Two codes at a time become half floats, whose exponents are
// smaller by 14: code s of the word's low half and code s of its high half.
inline float product_of_8_floats(uint word, const thread float* x) {
  float sum = 0;
  #pragma clang loop unroll(full)
  for (int i = 0; i < 4; i++) {
    const uint pair = word >> 4 * i;
    const half2 values = as_type<half2>((pair & 0x00070007) << 9 | (pair & 0x00080008) << 12);
    sum += float(values.x) * x[i] + float(values.y) * x[i + 4];
  }
  return sum;
}

// The sum of weight * x over STEP weights from number `first` of a row on. row: of codes; group: of scales and biases.
template <int D, int GROUP, int BITS, bool E2M1, typename Scale, typename Bias>
inline float product_of_step(
    const device uint8_t* codes, const device Scale* scales, const device Bias* biases, ulong row, int first,
    const thread float* x, float total) {
  const device uint8_t* at = codes + row * (D * BITS / 8) + first * BITS / 8;
  const ulong group = row * (D / GROUP) + first / GROUP;
  if constexpr (E2M1) {
    const uint2 words = *(const device uint2*)at;
    const float sum = product_of_8_floats(words.x, x) + product_of_8_floats(words.y, x + 8);
    return sum * 16384.0f * as_type<float>(uint(scales[group]) << 23);  // e8m0
  } else {
    const float sum = product_of_8<BITS>(at, x) + product_of_8<BITS>(at + BITS, x + 8);
    return sum * float(scales[group]) + total * float(biases[group]);
  }
}
