// CPU kernels: a linear layer for few or many rows, and attention over a slot cache.
//
// All are batch-invariant: every output is summed in one fixed order that does not depend on how many rows, queries
// or requests are computed together. Speculative and plain decoding therefore give bit-equal logits, in bf16 weights
// too. Compiled by kernels/native.py with -march=native.

#include "drafting.hpp"
#include "lk_loss.hpp"
#include "screen.hpp"

extern "C" {

int aurora_block() { return BLOCK; }

// weight [outputs, inputs] -> blocks of 32 outputs: [block][input][32]
void aurora_pack_fp32(const float* weight, int outputs, int inputs, float* packed) {
  const int blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int k = 0; k < inputs; ++k)
      for (int i = 0; i < BLOCK; ++i) {
        const int o = b * BLOCK + i;
        packed[(ptrdiff_t(b) * inputs + k) * BLOCK + i] = o < outputs ? weight[ptrdiff_t(o) * inputs + k] : 0.0f;
      }
}

int aurora_uses_tiles() {
#if defined(AURORA_TILES)
  return tiles_allowed();
#else
  return 0;
#endif
}

// weight [outputs, inputs] -> [block][input pair][32][2]; `padded` is `inputs` rounded up to a multiple of 32
void aurora_pack_bf16(const float* weight, int outputs, int inputs, int padded, uint16_t* packed) {
  const int blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int k = 0; k < padded; ++k)
      for (int i = 0; i < BLOCK; ++i) {
        const int o = b * BLOCK + i;
        const float w = o < outputs && k < inputs ? weight[ptrdiff_t(o) * inputs + k] : 0.0f;
        packed[(ptrdiff_t(b) * padded + k / 2 * 2) * BLOCK + i * 2 + k % 2] = to_bf16(w);
      }
}

int aurora_group() { return GROUP; }

// Whether weights in groups are multiplied at full speed.
int aurora_has_vnni() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

// What all kinds of weights have; slots are fp32 beside weights of fp32 and else bf16.
// linear: y [rows, outputs] = x [rows, inputs] times packed weight, with inputs rounded as the kind has it and sums in
// fp32. argmax: where each row of that is largest. decode: decoder layers over packed weights and slots. draft_start,
// draft_step: the steps of a proposal.
#define AURORA_KIND(name, Kind, Cache)                                                                                 \
  void aurora_linear_##name(const float* x, int64_t x_stride, int rows, const void* packed, int inputs, int outputs,   \
                            float* y, const float* bias) {                                                             \
    multiply<Kind>(x, x_stride, rows, packed, inputs, outputs, y, bias);                                               \
  }                                                                                                                    \
  void aurora_argmax_##name(const float* x, int64_t x_stride, int rows, const void* packed, int inputs, int outputs,   \
                            int64_t* places) {                                                                         \
    multiply_argmax<Kind>(x, x_stride, rows, packed, inputs, outputs, places);                                         \
  }                                                                                                                    \
  void aurora_decode_##name(const DecoderCall* call) { decode<Kind, Cache>(*call); }                                   \
  void aurora_draft_start_##name(const DraftCall* call, Drafting* d) { draft_start<Kind, Cache>(*call, *d); }          \
  void aurora_draft_step_##name(const DraftCall* call, Drafting* d) { draft_step<Kind, Cache>(*call, *d); }
AURORA_KIND(fp32, Float, float)
AURORA_KIND(bf16, BFloat, uint16_t)
AURORA_KIND(int8, Grouped<8>, uint16_t)
AURORA_KIND(int4, Grouped<4>, uint16_t)

#if defined(AURORA_BYTE_TILES)
AURORA_KIND(int8_per_output, Bytes, uint16_t)

// argmax behind a screen; returns how many blocks of the weight were read
#define AURORA_SCREENED(name, Kind)                                                                                    \
  int aurora_screened_argmax_##name(const float* x, int64_t x_stride, int rows, const void* packed, int inputs,        \
                                    int outputs, int64_t* places, const Screen* screen) {                              \
    return screened_argmax<Kind>(x, x_stride, rows, packed, *screen, inputs, outputs, places);                         \
  }
AURORA_SCREENED(fp32, Float)
AURORA_SCREENED(bf16, BFloat)
AURORA_SCREENED(int8, Grouped<8>)
AURORA_SCREENED(int4, Grouped<4>)
#endif

void aurora_attention_fp32(const AttentionShape* shape, const float* q, const float* k, const float* v, float* keys,
                           float* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<float>(*shape, q, k, v, keys, values, slots, starts, out);
}

void aurora_attention_bf16(const AttentionShape* shape, const float* q, const float* k, const float* v, uint16_t* keys,
                           uint16_t* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<uint16_t>(*shape, q, k, v, keys, values, slots, starts, out);
}

// What lies between the steps of a proposal is made and freed by the caller.
Drafting* aurora_drafting_new() { return new Drafting; }
void aurora_drafting_free(Drafting* drafting) { delete drafting; }
int64_t aurora_draft_finish(const Drafting* drafting, int64_t count, int64_t* tokens, int64_t* parents) {
  return draft_finish(*drafting, count, tokens, parents);
}

// Keys and values of every layer from positions `from` of the call's slots to `to`.
void aurora_move_fp32(const DecoderCall* call, const int64_t* from, const int64_t* to, int64_t count) {
  move<float>(*call, from, to, count);
}
void aurora_move_bf16(const DecoderCall* call, const int64_t* from, const int64_t* to, int64_t count) {
  move<uint16_t>(*call, from, to, count);
}

// The LK loss of rows of logits; the draft's logits become their gradient.
void aurora_lk_rows(const LKRows* rows) { lk_rows(*rows); }

}  // extern "C"
