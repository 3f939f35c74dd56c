// What all code for attention shares: sizes and strides, the layout of the KV cache, and trees of proposals.
//
// Keys are stored in blocks of KEY_BLOCK positions: [slot, head, block, dim / pair, position in the block, dim % pair].
// Values are stored as [slot, head, position / pair, dim, position % pair]. `pair` is 2 where attention runs on matrix
// tiles, which multiply pairs of 16-bit values, and 1 elsewhere.
#pragma once

#include "vectors.hpp"

namespace {

struct AttentionShape {
  int64_t rows, queries, heads, kv_heads, head_dim;  // rows: sequences; queries: the most positions of a sequence
  int64_t q_row, q_head, q_token;     // strides of the query, in elements
  int64_t k_row, k_head, k_token;     // of the new keys
  int64_t v_row, v_head, v_token;     // of the new values
  int64_t cache_row_k, cache_head_k;  // of the cached keys
  int64_t cache_row_v, cache_head_v;  // of the cached values
  float scale;
  const int64_t* begins;  // [rows + 1]: index of each row's first query; or null: every row has `queries` queries
  int64_t num_prompts;    // the last `num_prompts` rows read a prompt, the others decode (attention_prompt.hpp)
  int64_t pair;           // values that the cache stores together

  int64_t decoding() const { return rows - num_prompts; }
  int64_t queries_of(int64_t row) const { return begins ? begins[row + 1] - begins[row] : queries; }
  int64_t first_of(int64_t row) const { return begins ? begins[row] : row * queries; }
};

constexpr int KEY_BLOCK = 64;  // positions whose keys are stored together, so that keys are read sequentially

// Offsets of a position's first key and value in the slot of its head. The values of a position are `pair` apart; each
// `pair` dims of its key are together, and the next are KEY_BLOCK * pair after them.
inline int64_t key_at(int64_t position, int64_t D, int64_t pair) {
  return position / KEY_BLOCK * KEY_BLOCK * D + position % KEY_BLOCK * pair;
}
inline int64_t value_at(int64_t position, int64_t D, int64_t pair) {
  return position / pair * pair * D + position % pair;
}

// A tree of proposals, in the columns after a row's start that the pass computes. A column follows its parent, or the
// last position before the start if that is negative. It attends to the positions before the start and to its
// ancestors, in the order that they would have in the sequence. Rows that read a prompt are no trees; beside trees they
// need `begins`, as do trees of different sizes, and of these `columns` is the largest.
struct Tree {
  const int64_t* parents;  // [rows, columns], each less than its column; or null: each column follows the one before
  int64_t columns;

  // Of row b; or null: each column follows the one before.
  const int64_t* parents_of(const AttentionShape& s, int64_t b) const {
    return parents && b < s.decoding() ? parents + b * columns : nullptr;
  }
};

constexpr int MAX_PATH = 32;

// The columns on the path from the start to `column`; returns how many.
inline int path_to(const int64_t* parents, int64_t column, int* path) {
  int steps = 0;
  for (int64_t at = column; at >= 0 && steps < MAX_PATH; at = parents[at]) path[steps++] = int(at);
  for (int i = 0; i < steps / 2; ++i) {
    const int swapped = path[i];
    path[i] = path[steps - 1 - i];
    path[steps - 1 - i] = swapped;
  }
  return steps;
}

inline int64_t whole_blocks(int64_t length) { return (length + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK; }

// Offset of row b in a tensor with these strides; rows with different numbers of queries are concatenated.
inline int64_t row_at(const AttentionShape& s, int64_t b, int64_t row, int64_t token) {
  return s.begins ? s.begins[b] * token : b * row;
}

}  // namespace
