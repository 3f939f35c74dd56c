// Attention on Intel's matrix tiles (AMX), over keys and values in bf16 that are stored in pairs (attention_shape.hpp).
// Queries of the heads of a group and of neighbouring tokens read a key-value head together.
//
// Every query has one order of sums, which depends on positions alone: each block of KEY_BLOCK positions has a softmax
// of its own, and these are added up block by block as in FlashAttention (Dao et al. 2022, arXiv 2205.14135). So no bit
// depends on the batch, on the query length, on a prompt's chunks or on how threads share the blocks.
#pragma once

#include <omp.h>

#include "attention_block.hpp"

#if defined(AURORA_TILES)

namespace {

// Where threads leave the blocks of tiles that they share: one tile for each thread, the one that its share ends with.
struct SharedTiles {
  float* parts = nullptr;    // [threads, blocks] of Softmax
  int64_t* done = nullptr;   // [threads] blocks that are finished
  int64_t blocks = 0;        // the most blocks of a tile
};

// A tile of queries: rows [first, first + rows) of a sequence's queries for key-value head g, ordered by token.
struct QueryTile {
  int64_t b, g, first, blocks;  // blocks: of KEY_BLOCK positions, up to the last token's
  int rows;
};

inline int64_t queries_of_head(const AttentionShape& s, int64_t b) { return s.heads / s.kv_heads * s.queries_of(b); }

inline QueryTile query_tile(const AttentionShape& s, int64_t b, int64_t g, int64_t tile, const int64_t* starts) {
  const int64_t first = tile * TILE_QUERIES, queries = queries_of_head(s, b);
  const int rows = int(queries - first < TILE_QUERIES ? queries - first : TILE_QUERIES);
  const int64_t last = (first + rows - 1) / (s.heads / s.kv_heads);
  return {b, g, first, whole_blocks(starts[b] + last + 1) / KEY_BLOCK, rows};
}

// The positions of a tile's rows, and the paths of those whose columns are not in the order of their sequence.
struct TilePositions {
  int64_t token[TILE_QUERIES], length[TILE_QUERIES];
  bool in_order[TILE_QUERIES];
  int path[TILE_QUERIES][MAX_PATH];
};

inline void find_positions(const AttentionShape& s, const QueryTile& tile, int64_t start, const Tree& tree,
                           TilePositions& at) {
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t t = at.token[r] = (tile.first + r) / (s.heads / s.kv_heads);
    at.length[r] = start + t + 1;
    at.in_order[r] = true;
    if (!tree.parents) continue;
    const int steps = path_to(tree.parents + tile.b * tree.columns, t, at.path[r]);
    at.length[r] = start + steps;
    for (int i = 0; i < steps; ++i) at.in_order[r] &= at.path[r][i] == i;
  }
}

// Copy the positions of a row's path that are in block c to their places in `keys` and `values`, which hold the block.
inline void order_block(const TilePositions& at, int r, int64_t c, int64_t start, const uint16_t* cached_keys,
                        const uint16_t* cached_values, int D, uint16_t* keys, uint16_t* values) {
  const int64_t from = c * KEY_BLOCK > start ? c * KEY_BLOCK : start;
  for (int64_t position = from; position < at.length[r] && position < (c + 1) * KEY_BLOCK; ++position) {
    const int64_t column = start + at.path[r][position - start], to = position % KEY_BLOCK;
    const uint16_t* k = cached_keys + key_at(column, D, 2);
    for (int64_t d = 0; d < D / 2; ++d) std::memcpy(keys + (d * KEY_BLOCK + to) * 2, k + d * KEY_BLOCK * 2, 4);
    const uint16_t* v = cached_values + value_at(column, D, 2);
    for (int64_t d = 0; d < D; ++d) values[to / 2 * 2 * D + d * 2 + to % 2] = v[d * 2];
  }
}

// Blocks [from, to) of a tile. keys, values: of its key-value head. If other threads compute the other blocks, the
// results are kept in `parts` [blocks], and the thread that finishes last, by `done`, adds them up.
inline void attend_tile(const AttentionShape& s, const QueryTile& tile, int64_t from, int64_t to, const float* q,
                        const uint16_t* keys, const uint16_t* values, int64_t start, const Tree& tree, float* parts,
                        int64_t* done, TileBuffers& room, float* out) {
  const int D = int(s.head_dim), rows = tile.rows;
  const int64_t group = s.heads / s.kv_heads, block_size = int64_t(KEY_BLOCK) * D;
  static thread_local TilePositions at;
  find_positions(s, tile, start, tree, at);
  const __m512 scale = _mm512_set1_ps(s.scale * 1.44269504088896341f);  // scores are exponents of 2
  const auto head = [&](int r) { return tile.g * group + (tile.first + r) % group; };
  for (int r = 0; r < rows; ++r) {
    const float* x = q + row_at(s, tile.b, s.q_row, s.q_token) + head(r) * s.q_head + at.token[r] * s.q_token;
    for (int d = 0; d < D; d += TILE_INPUTS) {
      uint16_t* high = room.q.data() + d / TILE_INPUTS * TILE + 2 * r * TILE_INPUTS;
      store_parts(_mm512_mul_ps(_mm512_loadu_ps(x + d), scale), _mm512_mul_ps(_mm512_loadu_ps(x + d + 16), scale),
                  high, high + TILE_INPUTS);
    }
  }
  room.configure(rows);
  const Softmax sum(room.sum.data());
  std::memset(sum.sums, 0, sizeof(float) * size_t(TILE_QUERIES) * size_t(D + 1));
  _mm256_storeu_ps(sum.tops, _mm256_set1_ps(LOWEST));
  // Blocks before the tree, and all if every row's path is in order, are computed for all rows at once. While the
  // exponentials of one are computed, so are the next one's scores, and while its values, the sum of those before.
  bool in_order = true;
  for (int r = 0; r < rows; ++r) in_order &= at.in_order[r];
  int64_t shared_end = in_order ? to : start / KEY_BLOCK;
  shared_end = shared_end < from ? from : shared_end > to ? to : shared_end;
  int64_t valid[2][TILE_QUERIES];
  const auto block_rows = [&](int64_t c, int first, int count) {
    int64_t* of_block = valid[c % 2];
    for (int r = first; r < first + count; ++r) {
      const int64_t rest = at.length[r] - c * KEY_BLOCK;
      of_block[r] = rest < 0 ? 0 : rest < KEY_BLOCK ? rest : KEY_BLOCK;
    }
    return BlockRows(first, count, D, of_block);
  };
  const auto part_at = [&](int64_t c) {
    return Softmax(parts ? parts + size_t(c) * Softmax::size(D) : room.part.data() + size_t(c % 2) * Softmax::size(D));
  };
  const auto scores_at = [&](int64_t c) { return room.scores.data() + c % 2 * TILE_ROWS * KEY_BLOCK; };
  int64_t added = from;  // blocks before it are in the sum
  const auto add_before = [&](int64_t end) {
    if (parts) return;
    for (; added < end; ++added) add_block(part_at(added), rows, D, sum);
  };
  if (from < shared_end) {
    const BlockRows block = block_rows(from, 0, rows);
    block.multiply_keys(room, keys + from * block_size);
    block.store_scores(scores_at(from));
  }
  for (int64_t c = from; c < shared_end; ++c) {
    const BlockRows block = block_rows(c, 0, rows), next = block_rows(c + 1, 0, rows);
    const bool has_next = c + 1 < shared_end;
    const uint16_t* v = values + c * block_size;
    if (has_next) next.multiply_keys(room, keys + (c + 1) * block_size);
    const Softmax part = part_at(c);
    block.exponentiate(room, scores_at(c), tile.first == 0 ? v : nullptr, part);
    if (has_next) next.store_scores(scores_at(c + 1));
    for (int d = 0; d < D; d += 64) {
      block.multiply_values(room, v, d);
      add_before(c);
      block.store_values(part, d);
    }
  }
  add_before(shared_end);
  for (int64_t c = shared_end; c < to; ++c) {
    const Softmax part = part_at(c);
    std::memcpy(room.keys.data(), keys + c * block_size, size_t(block_size) * 2);
    std::memcpy(room.values.data(), values + c * block_size, size_t(block_size) * 2);
    for (int r = 0, end; r < rows; r = end) {  // rows that have the same keys and values
      for (end = r + 1; end < rows; ++end)
        if (at.in_order[r] ? !at.in_order[end] : at.token[end] != at.token[r]) break;
      if (!at.in_order[r]) order_block(at, r, c, start, keys, values, D, room.keys.data(), room.values.data());
      room.configure(end - r);
      const BlockRows block = block_rows(c, r, end - r);
      block.multiply_keys(room, at.in_order[r] ? keys + c * block_size : room.keys.data());
      block.store_scores(scores_at(c));
      block.exponentiate(room, scores_at(c), nullptr, part);
      for (int d = 0; d < D; d += 64) {
        block.multiply_values(room, at.in_order[r] ? values + c * block_size : room.values.data(), d);
        block.store_values(part, d);
      }
    }
    add_before(c + 1);
  }
  if (parts) {
    if (__atomic_add_fetch(done, to - from, __ATOMIC_ACQ_REL) < tile.blocks) return;
    *done = 0;
    for (int64_t c = 0; c < tile.blocks; ++c) add_block(Softmax(parts + size_t(c) * Softmax::size(D)), rows, D, sum);
  }
  for (int r = 0; r < rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(1.0f / sum.sums[r]);
    float* y = out + ((s.first_of(tile.b) + at.token[r]) * s.heads + head(r)) * D;
    for (int d = 0; d < D; d += 16)
      _mm512_storeu_ps(y + d, _mm512_mul_ps(_mm512_loadu_ps(sum.values + r * D + d), inverse));
  }
}

// Called before the parallel region.
inline SharedTiles shared_tiles(const AttentionShape& s, const int64_t* starts) {
  static thread_local Buffer<float> parts;
  static thread_local Buffer<int64_t> done;
  SharedTiles shared;
  if (s.pair != 2) return shared;
  const size_t threads = size_t(omp_get_max_threads());
  for (int64_t b = 0; b < s.decoding(); ++b) {
    const int64_t blocks = whole_blocks(starts[b] + s.queries_of(b)) / KEY_BLOCK;
    shared.blocks = blocks > shared.blocks ? blocks : shared.blocks;
  }
  shared.parts = parts.at_least(threads * size_t(shared.blocks) * Softmax::size(int(s.head_dim)));
  shared.done = done.at_least(threads);
  std::memset(shared.done, 0, threads * sizeof(int64_t));
  return shared;
}

// This thread's share of attention: an equal number of (tile, block)s.
inline void attend_tiles(const AttentionShape& s, const float* q, const uint16_t* keys, const uint16_t* values,
                         const int64_t* slots, const int64_t* starts, const Tree& tree, const SharedTiles& shared,
                         float* out) {
  const int D = int(s.head_dim);
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const auto tiles_of = [&](int64_t b) { return (queries_of_head(s, b) + TILE_QUERIES - 1) / TILE_QUERIES; };
  const auto blocks_of = [&](int64_t b) {  // of one key-value head
    int64_t blocks = 0;
    for (int64_t i = 0; i < tiles_of(b); ++i) blocks += query_tile(s, b, 0, i, starts).blocks;
    return blocks;
  };
  int64_t total = 0;
  for (int64_t b = 0; b < s.decoding(); ++b) total += s.kv_heads * blocks_of(b);
  const int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
  if (from == to) return;

  static thread_local TileBuffers room;
  room.q.at_least(size_t(D / TILE_INPUTS) * TILE);
  room.p.at_least(size_t(BLOCK_STEPS) * TILE);
  room.keys.at_least(size_t(KEY_BLOCK) * D);
  room.values.at_least(size_t(KEY_BLOCK) * D);
  room.scores.at_least(size_t(2 * TILE_ROWS) * KEY_BLOCK);
  room.part.at_least(2 * Softmax::size(D));
  room.sum.at_least(Softmax::size(D));
  TileConfig products;  // that of the products around attention
  store_tile_config(products);
  room.configured = 0;
  int64_t at = 0;
  for (int64_t b = 0; b < s.decoding() && at < to; ++b) {
    const int64_t head_blocks = blocks_of(b);
    for (int64_t g = 0; g < s.kv_heads && at < to; ++g) {
      if (at + head_blocks <= from) {
        at += head_blocks;
        continue;
      }
      const uint16_t* k = keys + slots[b] * s.cache_row_k + g * s.cache_head_k;
      const uint16_t* v = values + slots[b] * s.cache_row_v + g * s.cache_head_v;
      for (int64_t i = 0; i < tiles_of(b) && at < to; ++i) {
        const QueryTile tile = query_tile(s, b, g, i, starts);
        const int64_t first = from > at ? from - at : 0, end = to < at + tile.blocks ? to - at : tile.blocks;
        if (first < end) {
          const bool whole = first == 0 && end == tile.blocks;
          const int64_t owner = ((at + 1) * threads - 1) / total;  // the thread whose share has the tile's first block
          float* parts = whole ? nullptr : shared.parts + owner * shared.blocks * int64_t(Softmax::size(D));
          attend_tile(s, tile, first, end, q, k, v, starts[b], tree, parts, shared.done + owner, room, out);
        }
        at += tile.blocks;
      }
    }
  }
  load_tile_config(products);
}

// Write one position's key and value. A value that is not finite would reach queries that do not attend to it, because
// masked positions have probability zero, not none; so it is stored as zero, and the key as NaN.
inline void write_pairs(const float* k, const float* v, int64_t position, int D, uint16_t* keys, uint16_t* values) {
  uint16_t* kc = keys + key_at(position, D, 2);
  uint16_t* vc = values + value_at(position, D, 2) - position % 2;
  const auto rounded = [](const float* x) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
  };
  const __m512i infinity = _mm512_set1_epi16(0x7f80);
  bool finite = true;
  for (int d = 0; d < D; d += 32)
    finite &= !_mm512_cmpeq_epi16_mask(_mm512_and_si512(rounded(v + d), infinity), infinity);
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(KEY_BLOCK));
  for (int d = 0; d < D; d += 32) {
    const __m512i pairs = finite ? rounded(k + d) : _mm512_set1_epi16(0x7fc0);
    _mm512_i32scatter_epi32(kc + d * KEY_BLOCK, places, pairs, 4);
  }
  // Another thread may be writing the other positions of the pairs, so only these 16 bits are stored.
  const __mmask32 half = position % 2 ? 0xaaaaaaaau : 0x55555555u;
  for (int d = 0; d < D; d += 32) {
    const __m512i x = finite ? rounded(v + d) : _mm512_setzero_si512();
    for (int i = 0; i < 2; ++i) {
      const __m512i words = _mm512_cvtepu16_epi32(i ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
      _mm512_mask_storeu_epi16(vc + 2 * (d + 16 * i), half, position % 2 ? _mm512_slli_epi32(words, 16) : words);
    }
  }
}

}  // namespace
#else

namespace {
struct SharedTiles {};
inline SharedTiles shared_tiles(const AttentionShape&, const int64_t*) { return {}; }
}  // namespace

#endif
