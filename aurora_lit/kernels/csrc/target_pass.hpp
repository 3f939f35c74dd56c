// A round's pass of the target in one call: embeddings, decoder layers, the target's own token at the columns of the
// sequences that decode, and storing states for the draft and for traces. The weights displace everything else from the
// processor's caches, so that what a caller does between smaller calls is read from memory anew each round.
//
// Shapes: N columns, B rows, H hidden size, S slots, L capacity of a slot.
#pragma once

#include "decoder.hpp"
#include "rows.hpp"
#include "screen.hpp"

namespace {

// Where the states of all columns are stored, each at its row's position.
struct StateTable {
  void* data;       // or null: they are not stored
  int64_t slot;     // numbers of a slot
  int64_t is_bf16;  // else fp32
};

// A target, and what it computes for one round.
struct TargetPass {
  void (*decode)(const DecoderCall*);
  RowTable embedding;
  int64_t vocabulary;
  Matrix head;
  void (*choose)(const float*, int64_t, int, const void*, int, int, const Draws*);
  const DecoderCall* decoder;  // `begins` has N as its last number
  const int64_t* ids;          // [N]
  int64_t columns, chosen;     // the first `chosen` columns get a token
  Draws draws;
  StateTable aux, last;        // [S, L, 3 H] and [S, L, H]
  const int64_t* keeps_last;   // [B] 0: the row's last states are not stored
  int64_t skips_prompts_last;  // 1: prompts have no last states; of the last layer they need keys and values alone
};

// Store states [N, width] of all columns, but of rows with `wanted` 0: those of column t of row b at position
// starts[b] + t of its slot.
inline void store_states(const DecoderCall& call, const float* states, int64_t width, const StateTable& table,
                         const int64_t* wanted) {
  const AttentionShape& s = call.attention;
  for (int64_t b = 0; b < s.rows; ++b) {
    if (wanted && !wanted[b]) continue;
    const int64_t first = s.first_of(b) * width, count = s.first_of(b + 1) * width - first;
    const int64_t place = call.slots[b] * table.slot + call.starts[b] * width;
    if (table.is_bf16) {
      Product<Bf16>::round(states + first, count, static_cast<uint16_t*>(table.data) + place);
    } else {
      std::memcpy(static_cast<float*>(table.data) + place, states + first, size_t(count) * sizeof(float));
    }
  }
}

// The decoder's pass without the last states of prompts: all layers for all rows, the last one as far as the cache, and
// then the last one for the rows that decode, which come first. Their bits are those of one pass.
inline void decode_without_prompts_last(const TargetPass& p) {
  DecoderCall call = *p.decoder;
  call.only_cache = 1;
  p.decode(&call);
  AttentionShape& s = call.attention;
  s.rows = s.decoding(), s.num_prompts = 0;
  if (!s.rows) return;
  s.queries = 0;
  for (int64_t b = 0; b < s.rows; ++b) s.queries = s.queries_of(b) > s.queries ? s.queries_of(b) : s.queries;
  call.layers += call.num_layers - 1, call.num_layers = 1;
  call.only_cache = 0, call.aux = nullptr;
  p.decode(&call);
}

// 0, and nothing is computed, if an id is not in the vocabulary.
inline int run_pass(const TargetPass& p) {
  const DecoderCall& call = *p.decoder;
  const int H = int(call.hidden), outputs = int(p.head.outputs), chosen = int(p.chosen);
  for (int64_t i = 0; i < p.columns; ++i)
    if (p.ids[i] < 0 || p.ids[i] >= p.vocabulary) return 0;
  for (int64_t i = 0; i < p.columns; ++i) p.embedding.row(H, p.ids[i], call.hidden_states + i * H);
  if (p.skips_prompts_last && call.attention.num_prompts)
    decode_without_prompts_last(p);
  else
    p.decode(&call);
  if (p.aux.data) store_states(call, call.aux, 3 * H, p.aux, nullptr);
  if (p.last.data) store_states(call, call.normed, H, p.last, p.keeps_last);
  if (chosen) p.choose(call.normed, H, chosen, p.head.weight, H, outputs, &p.draws);
  return 1;
}

}  // namespace
