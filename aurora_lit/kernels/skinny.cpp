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

// y [rows, outputs] = x [rows, inputs] times packed weight
void aurora_linear_fp32(const float* x, int64_t x_stride, int rows, const float* packed, int inputs, int outputs,
                        float* y, const float* bias) {
  multiply<Float>(x, x_stride, rows, packed, inputs, outputs, y, bias);
}

// the same with bf16 weights; inputs are rounded to bf16, sums stay fp32
void aurora_linear_bf16(const float* x, int64_t x_stride, int rows, const uint16_t* packed, int inputs, int outputs,
                        float* y, const float* bias) {
  multiply<BFloat>(x, x_stride, rows, packed, inputs, outputs, y, bias);
}

// the same with weights of eight or four bits in groups (kernels/grouped.py)
void aurora_linear_int8(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                        float* y, const float* bias) {
  multiply<Grouped<8>>(x, x_stride, rows, packed, inputs, outputs, y, bias);
}
void aurora_linear_int4(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                        float* y, const float* bias) {
  multiply<Grouped<4>>(x, x_stride, rows, packed, inputs, outputs, y, bias);
}

#if defined(AURORA_BYTE_TILES)
// and with weights of eight bits with a scale an output (kernels/row_scaled.py)
void aurora_linear_bytes(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                         float* y, const float* bias) {
  multiply<Bytes>(x, x_stride, rows, packed, inputs, outputs, y, bias);
}
void aurora_argmax_bytes(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                         int64_t* places) {
  multiply_argmax<Bytes>(x, x_stride, rows, packed, inputs, outputs, places);
}
int aurora_screened_argmax_fp32(const float* x, int64_t x_stride, int rows, const float* packed, int inputs, int outputs,
                               int64_t* places, const Screen* screen) {
  return screened_argmax<Float>(x, x_stride, rows, packed, *screen, inputs, outputs, places);
}
int aurora_screened_argmax_bf16(const float* x, int64_t x_stride, int rows, const uint16_t* packed, int inputs, int outputs,
                               int64_t* places, const Screen* screen) {
  return screened_argmax<BFloat>(x, x_stride, rows, packed, *screen, inputs, outputs, places);
}
int aurora_screened_argmax_int8(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                               int64_t* places, const Screen* screen) {
  return screened_argmax<Grouped<8>>(x, x_stride, rows, packed, *screen, inputs, outputs, places);
}
int aurora_screened_argmax_int4(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                               int64_t* places, const Screen* screen) {
  return screened_argmax<Grouped<4>>(x, x_stride, rows, packed, *screen, inputs, outputs, places);
}
void aurora_decode_bytes(const DecoderCall* call) { decode<Bytes, uint16_t>(*call); }
void aurora_draft_start_bytes(const DraftCall* call, Drafting* d) { draft_start<Bytes, uint16_t>(*call, *d); }
void aurora_draft_step_bytes(const DraftCall* call, Drafting* d) { draft_step<Bytes, uint16_t>(*call, *d); }
#endif

// where each row of the product is largest
void aurora_argmax_fp32(const float* x, int64_t x_stride, int rows, const float* packed, int inputs, int outputs,
                        int64_t* places) {
  multiply_argmax<Float>(x, x_stride, rows, packed, inputs, outputs, places);
}
void aurora_argmax_bf16(const float* x, int64_t x_stride, int rows, const uint16_t* packed, int inputs, int outputs,
                        int64_t* places) {
  multiply_argmax<BFloat>(x, x_stride, rows, packed, inputs, outputs, places);
}
void aurora_argmax_int8(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                        int64_t* places) {
  multiply_argmax<Grouped<8>>(x, x_stride, rows, packed, inputs, outputs, places);
}
void aurora_argmax_int4(const float* x, int64_t x_stride, int rows, const uint8_t* packed, int inputs, int outputs,
                        int64_t* places) {
  multiply_argmax<Grouped<4>>(x, x_stride, rows, packed, inputs, outputs, places);
}

void aurora_attention_fp32(const AttentionShape* shape, const float* q, const float* k, const float* v, float* keys,
                           float* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<float>(*shape, q, k, v, keys, values, slots, starts, out);
}

void aurora_attention_bf16(const AttentionShape* shape, const float* q, const float* k, const float* v, uint16_t* keys,
                           uint16_t* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<uint16_t>(*shape, q, k, v, keys, values, slots, starts, out);
}

// Decoder layers over packed weights and slots, both of one type; beside weights in groups slots are bf16.
void aurora_decode_fp32(const DecoderCall* call) { decode<Float, float>(*call); }
void aurora_decode_bf16(const DecoderCall* call) { decode<BFloat, uint16_t>(*call); }
void aurora_decode_int8(const DecoderCall* call) { decode<Grouped<8>, uint16_t>(*call); }
void aurora_decode_int4(const DecoderCall* call) { decode<Grouped<4>, uint16_t>(*call); }

// The steps of a proposal; what lies between them is made and freed by the caller.
Drafting* aurora_drafting_new() { return new Drafting; }
void aurora_drafting_free(Drafting* drafting) { delete drafting; }
void aurora_draft_start_fp32(const DraftCall* call, Drafting* drafting) { draft_start<Float, float>(*call, *drafting); }
void aurora_draft_step_fp32(const DraftCall* call, Drafting* drafting) { draft_step<Float, float>(*call, *drafting); }
void aurora_draft_start_bf16(const DraftCall* call, Drafting* drafting) { draft_start<BFloat, uint16_t>(*call, *drafting); }
void aurora_draft_step_bf16(const DraftCall* call, Drafting* drafting) { draft_step<BFloat, uint16_t>(*call, *drafting); }
void aurora_draft_start_int8(const DraftCall* call, Drafting* drafting) { draft_start<Grouped<8>, uint16_t>(*call, *drafting); }
void aurora_draft_step_int8(const DraftCall* call, Drafting* drafting) { draft_step<Grouped<8>, uint16_t>(*call, *drafting); }
void aurora_draft_start_int4(const DraftCall* call, Drafting* drafting) { draft_start<Grouped<4>, uint16_t>(*call, *drafting); }
void aurora_draft_step_int4(const DraftCall* call, Drafting* drafting) { draft_step<Grouped<4>, uint16_t>(*call, *drafting); }
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
