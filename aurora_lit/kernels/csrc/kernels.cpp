// The C interface of the CPU kernels: products with packed weights, attention over the KV cache, decoder layers,
// drafting and the LK loss. Compiled by kernels/build.py with -march=native, called by the other modules of kernels/.
//
// All kernels are batch-invariant: every output is summed in one fixed order that does not depend on how many rows,
// queries or sequences are computed together. Speculative and plain decoding therefore give bit-equal logits, with
// quantised weights too.
//
// Terms: a *row* is a row of a product's input matrix, or a sequence in attention; a *block* is BLOCK (32) outputs of
// a weight, stored together; a *format* is a type that describes how weights are stored (kernels/weight_format.py).

#include "drafting.hpp"
#include "lk_loss.hpp"
#include "sampler.hpp"
#include "screen.hpp"
#include "suffix_index.hpp"
#include "target_pass.hpp"

extern "C" {

// Number of outputs of a block.
int aurora_block() { return BLOCK; }

// Have the calling thread compute without others.
void aurora_compute_alone() {
#if defined(_OPENMP)
  omp_set_num_threads(1);
#endif
}

// Pack a weight [outputs, inputs] as [block][input][32 outputs].
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

// 1 if the processor and the system allow AMX tiles.
int aurora_uses_tiles() {
#if defined(AURORA_TILES)
  return tiles_allowed();
#else
  return 0;
#endif
}

// Pack a weight [outputs, inputs] as [block][pair of inputs][32 outputs][2]; `padded`: `inputs` rounded up to a
// multiple of 32.
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

// Number of inputs of a group in the grouped formats.
int aurora_group() { return GROUP; }

// Pack codes of a grouped weight, their scales and their minima (pack_codes in grouped.hpp); the size in bytes of a
// packed block with this number of groups.
#define AURORA_GROUPED(BITS)                                                                                           \
  void aurora_pack_int##BITS(const uint8_t* codes, const uint16_t* scales, const uint16_t* mins, int outputs,          \
                             int inputs, void* packed) {                                                               \
    pack_codes<BITS>(codes, scales, mins, outputs, inputs, static_cast<WeightGroup<BITS>*>(packed));                   \
  }                                                                                                                    \
  int64_t aurora_block_bytes_int##BITS(int groups) { return groups * int64_t(sizeof(WeightGroup<BITS>)); }
AURORA_GROUPED(4)
AURORA_GROUPED(5)
AURORA_GROUPED(6)
AURORA_GROUPED(8)
void aurora_pack_int8_split(const uint8_t* codes, const uint16_t* scales, const uint16_t*, int outputs, int inputs,
                            void* packed) {
  pack_split(codes, scales, outputs, inputs, packed);
}
int64_t aurora_block_bytes_int8_split(int groups) { return SplitBlock::bytes(groups); }

// 1 if the processor has products of bytes, with which grouped weights are multiplied at full speed.
int aurora_has_byte_products() {
#if defined(AURORA_BYTE_PRODUCTS)
  return 1;
#else
  return 0;
#endif
}

// The functions of each weight format.
//   linear       y [rows, outputs] = x [rows, inputs] times the packed weight, plus bias; the format rounds the inputs
//   choose       a token for each row of that product, the largest output or one that is drawn (choose.hpp)
//   row, rows    one row, or some rows, of a packed weight (rows.hpp)
#define AURORA_FORMAT(name, Format)                                                                                    \
  void aurora_linear_##name(const float* x, int64_t x_stride, int rows, const void* packed, int inputs, int outputs,   \
                            float* y, const float* bias) {                                                             \
    multiply<Format>(x, x_stride, rows, packed, inputs, outputs, y, bias);                                             \
  }                                                                                                                    \
  void aurora_choose_##name(const float* x, int64_t x_stride, int rows, const void* packed, int inputs, int outputs,   \
                            const Draws* draws) {                                                                      \
    multiply_choose<Format>(x, x_stride, rows, packed, inputs, outputs, *draws);                                       \
  }                                                                                                                    \
  void aurora_row_##name(const void* packed, int64_t width, int64_t index, float* to) {                                \
    Rows<Format>::read(packed, width, index, to);                                                                      \
  }                                                                                                                    \
  int aurora_rows_##name(const void* packed, int64_t rows, int64_t width, const int64_t* indices, int64_t count,       \
                         float* to) {                                                                                  \
    return read_rows<Format>(packed, rows, width, indices, count, to);                                                 \
  }
AURORA_FORMAT(fp32, Fp32)
AURORA_FORMAT(bf16, Bf16)
AURORA_FORMAT(int8, Grouped<8>)
AURORA_FORMAT(int8_split, SplitInt8<true>)
AURORA_FORMAT(int6, Grouped<6>)
AURORA_FORMAT(int5, Grouped<5>)
AURORA_FORMAT(int4, Grouped<4>)

// The functions of whole layers, whose matrices all have one format, or all a grouped one, each with its own number of
// bits. The KV cache is fp32 with fp32 weights and bf16 with all others.
//   decode       decoder layers over packed weights and the KV cache
//   draft        proposals of a draft (drafting.hpp)
//   has_prompt_arithmetic    1 if decode() rounds rows of prompts differently
#define AURORA_LAYERS(name, Format, Cache)                                                                             \
  void aurora_decode_##name(const DecoderCall* call) { decode<Format, Cache>(*call); }                                 \
  int aurora_has_prompt_arithmetic_##name() { return PromptProduct<Format>::available(); }                             \
  void aurora_draft_##name(DraftCall* call, DraftState* d) { draft<Format, Cache>(*call, *d); }
AURORA_LAYERS(fp32, Fp32, float)
AURORA_LAYERS(bf16, Bf16, uint16_t)
AURORA_LAYERS(grouped, AnyGrouped, uint16_t)

#if defined(AURORA_INT8_TILES)
AURORA_FORMAT(int8_per_output, Int8PerOutput)
AURORA_LAYERS(int8_per_output, Int8PerOutput, uint16_t)
#endif

void aurora_row_plain(const void* table, int64_t width, int64_t index, float* to) {
  read_plain_row(table, width, index, to);
}

void aurora_attention_fp32(const AttentionShape* shape, const float* q, const float* k, const float* v, float* keys,
                           float* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<float>(*shape, q, k, v, keys, values, slots, starts, out);
}

void aurora_attention_bf16(const AttentionShape* shape, const float* q, const float* k, const float* v, uint16_t* keys,
                           uint16_t* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<uint16_t>(*shape, q, k, v, keys, values, slots, starts, out);
}

// Buffers of drafting; created and freed by the caller.
DraftState* aurora_drafting_new() { return new DraftState; }
void aurora_drafting_free(DraftState* drafting) { delete drafting; }

// A round's pass of the target (target_pass.hpp); 0 if an id is not in the vocabulary.
int aurora_target_pass(const TargetPass* pass) { return run_pass(*pass); }

// Copy keys and values of every layer from positions `from` of the call's slots to positions `to`.
void aurora_move_fp32(const DecoderCall* call, const int64_t* from, const int64_t* to, int64_t count) {
  move<float>(*call, from, to, count);
}
void aurora_move_bf16(const DecoderCall* call, const int64_t* from, const int64_t* to, int64_t count) {
  move<uint16_t>(*call, from, to, count);
}

// Bits and values of the noise that tokens are drawn with (noise.hpp).
void aurora_noise(int64_t key, int64_t position, const int64_t* tokens, int64_t count, int64_t* bits, float* noise) {
  noise_of_tokens(key, position, tokens, count, bits, noise);
}

// A token for each row of stored logits (sampler.hpp); 0, and none is chosen, if a row names a token that is none.
int aurora_choose_dense(float* logits, int64_t vocab, const DenseRow* rows, int64_t count, int64_t* tokens) {
  return choose_dense(logits, vocab, rows, count, tokens);
}

// A memory of sequences, the tokens that it holds and has forgotten (suffix_memory.hpp), and trees of copies
// (suffix_index.hpp).
// Null if the system does not give the memory.
SuffixMemory* aurora_memory_new(int64_t capacity, int64_t heads) {
  SuffixMemory* memory = new SuffixMemory(capacity, heads);
  if (memory->is_whole()) return memory;
  delete memory;
  return nullptr;
}
void aurora_memory_free(SuffixMemory* memory) { delete memory; }
void aurora_memory_insert(SuffixMemory* memory, const int32_t* tokens, int64_t count, int64_t context, int64_t part) {
  memory->insert(tokens, count, context, uint64_t(part));
}
void aurora_memory_counts(SuffixMemory* memory, int64_t* held, int64_t* forgotten) { memory->counts(held, forgotten); }
void aurora_look_up_copies(CopyCall* call, SuffixMemory* memory) { look_up_copies(*call, memory); }

// log_vector of `count` numbers, a multiple of 16.
void aurora_log(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += 16) {
    const f16v logs = log_vector(load16(x + i));
    std::memcpy(y + i, &logs, sizeof logs);
  }
}

// The LK loss; the draft's logits are overwritten with their gradient.
void aurora_lk_rows_bf16(const LKRows<uint16_t>* rows) { lk_rows(*rows); }
void aurora_lk_rows_fp32(const LKRows<float>* rows) { lk_rows(*rows); }

}  // extern "C"
