// A round's pass of the target in one call: embeddings, decoder layers, the target's own token at the columns of the
// sequences that decode, and the draft's features. The weights displace everything else from the processor's caches, so
// that what a caller does between smaller calls is read from memory anew each round.
//
// Shapes: N columns, B rows, H hidden size, S slots, L capacity of a slot.
#pragma once

#include "choose.hpp"
#include "decoder.hpp"
#include "rows.hpp"
#include "screen.hpp"

namespace {

// A target, and what it computes for one round.
struct TargetPass {
  void (*decode)(const DecoderCall*);
  RowTable embedding;
  int64_t vocabulary;
  Matrix head;
  void (*argmax)(const float*, int64_t, int, const void*, int, int, int64_t*);
  int (*screened_argmax)(const float*, int64_t, int, const void*, int, int, int64_t*, const Screen*);
  void (*choose)(const float*, int64_t, int, const void*, int, int, const Draws*);
  const Screen* screen;  // or null: `argmax` is used
  const DecoderCall* decoder;  // `begins` has N as its last number
  const int64_t* ids;          // [N]
  int64_t columns, chosen;     // the first `chosen` columns get a token
  Draws draws;                 // `temperatures` null: the largest output of each
  void* features;              // [S, L, 3 H] the auxiliary states are stored here too, each at its row's position; or null
  int64_t features_slot;       // numbers of a slot
  int64_t features_are_bf16;   // else fp32
};

// Store the auxiliary states of all columns: column t of row b at position starts[b] + t of its slot.
inline void store_features(const TargetPass& p) {
  const DecoderCall& call = *p.decoder;
  const AttentionShape& s = call.attention;
  const int64_t width = 3 * call.hidden;
  for (int64_t b = 0; b < s.rows; ++b) {
    const int64_t first = s.first_of(b), count = s.first_of(b + 1) - first;
    const float* from = call.aux + first * width;
    const int64_t place = call.slots[b] * p.features_slot + call.starts[b] * width;
    if (p.features_are_bf16) {
      uint16_t* to = static_cast<uint16_t*>(p.features) + place;
      for (int64_t i = 0; i < count * width; ++i) to[i] = to_bf16(from[i]);
    } else {
      std::memcpy(static_cast<float*>(p.features) + place, from, size_t(count * width) * sizeof(float));
    }
  }
}

// 0, and nothing is computed, if an id is not in the vocabulary.
inline int run_pass(const TargetPass& p) {
  const DecoderCall& call = *p.decoder;
  const int H = int(call.hidden), outputs = int(p.head.outputs), chosen = int(p.chosen);
  for (int64_t i = 0; i < p.columns; ++i)
    if (p.ids[i] < 0 || p.ids[i] >= p.vocabulary) return 0;
  for (int64_t i = 0; i < p.columns; ++i) p.embedding.row(H, p.ids[i], call.hidden_states + i * H);
  p.decode(&call);
  if (p.features) store_features(p);
  if (!chosen) return 1;
  if (p.draws.temperatures)
    p.choose(call.normed, H, chosen, p.head.weight, H, outputs, &p.draws);
  else if (p.screen)
    p.screened_argmax(call.normed, H, chosen, p.head.weight, H, outputs, p.draws.tokens, p.screen);
  else
    p.argmax(call.normed, H, chosen, p.head.weight, H, outputs, p.draws.tokens);
  return 1;
}

}  // namespace
