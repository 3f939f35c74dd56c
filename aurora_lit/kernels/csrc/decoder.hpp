// Decoder layers of the Llama form in one parallel region: norm, projections, RoPE, attention over the KV cache, gated
// MLP, residuals. With few rows a model spends more time between kernels than in them; one region avoids that. The same
// code runs EAGLE-3's draft layer, whose input is a normed embedding concatenated with a normed hidden state. Every row
// is computed independently and in one order, so this is as batch-invariant as the kernels it consists of.
//
// Shapes: N rows (positions of all sequences), H hidden size, D head size, M intermediate size of the MLP.
#pragma once

#include <chrono>
#include <initializer_list>

#include "attention.hpp"
#include "top_k.hpp"

namespace {

// Parts of a pass whose time a benchmark asks for. Attention includes the rotation and the writing of the cache.
enum PassPart { PRODUCTS, ATTENTION, REST, NUM_PARTS };

// Adds up the nanoseconds of each part; does nothing if `totals` is null.
class PassClock {
 public:
  explicit PassClock(int64_t* totals) : totals_(totals) {
    if (totals_) last_ = std::chrono::steady_clock::now();
  }
  // The time since the last call belonged to `part`.
  void end_of(PassPart part) {
    if (!totals_) return;
    const auto now = std::chrono::steady_clock::now();
    totals_[part] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
  }

 private:
  int64_t* totals_;
  std::chrono::steady_clock::time_point last_;
};

struct DecoderLayer {
  const float* norm_embeds;  // or null: the input is only the normed hidden state
  const float* norm_attention;
  const float* norm_mlp;
  const float* norm_query;  // [D], of each head before it is rotated; or null: heads are only rotated
  const float* norm_key;    // likewise
  Matrix query, key, value, output, gate, up, down;
  void* keys;  // the layer's KV cache
  void* values;
};

struct DecoderCall {
  AttentionShape attention;  // set by the caller: cache strides, rows, queries, heads; decode() sets the others
  int64_t hidden, num_layers;
  const DecoderLayer* layers;
  const float* final_norm;
  float eps;
  const float* cosines;  // [positions, D]
  const float* sines;
  int64_t max_positions;  // later positions are rotated like the last one
  const int64_t* slots;
  const int64_t* starts;
  Tree tree;
  const float* embeds;   // [N, H] or null
  float* hidden_states;  // [N, H] in: the first layer's hidden state; out: the last layer's
  float* normed;         // [N, H] out: the last hidden state after the final norm
  float* aux;            // [N, 3, H] out: the hidden states before the layers aux_layer_ids; or null
  int64_t aux_layer_ids[3];
  int64_t* nanoseconds;  // [NUM_PARTS] in and out: the first thread's time in each part is added; or null
  int64_t only_cache;    // 1: of the last layer, keys and values are written to the cache, and nothing else is computed
};

// Root mean square norm of a row (Zhang & Sennrich 2019, as in Llama).
inline void rms_norm(const float* x, const float* weight, int size, float eps, float* out) {
  f16v sums = f16v{};
  int i = 0;
  for (; i + 16 <= size; i += 16) {
    const f16v v = load16(x + i);
    sums = fused(v, v, sums);
  }
  float squares = total(sums);
  for (; i < size; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(squares / float(size) + eps);
  for (i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * factor);
}

// Apply a norm, or none if it is null, and then RoPE to one head in place (RoFormer; halves as in Llama).
inline void place_head(float* x, const float* norm, float eps, const float* cosines, const float* sines, int D) {
  if (norm) rms_norm(x, norm, D, eps, x);
  for (int i = 0; i < D / 2; ++i) {
    const float low = x[i], high = x[i + D / 2];
    x[i] = low * cosines[i] - high * sines[i];
    x[i + D / 2] = high * cosines[i + D / 2] + low * sines[i + D / 2];
  }
}

// gate <- silu(gate) * up over `size` floats; those after the last full vector one by one.
inline void gate_times_up(float* gate, const float* up, int size) {
  int i = 0;
  for (; i + LANES <= size; i += LANES) {
    const fnv g = load_lanes(gate + i), zero = fnv{};
    const fnv e = exp_lanes(g < zero ? g : -g);  // exp(-|g|)
    const fnv y = g * (g < zero ? e : zero + 1.0f) / (e + 1.0f) * load_lanes(up + i);
    std::memcpy(gate + i, &y, sizeof y);
  }
  for (; i < size; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// Distance of query t of a row from its start, in positions.
inline int64_t depth(const AttentionShape& s, const Tree& tree, int64_t row, int64_t t) {
  const int64_t* parents = tree.parents_of(s, row);
  int path[MAX_PATH];
  return parents ? path_to(parents, t, path) - 1 : t;
}

// From this number of decoding rows on, threads share the rounding of a product's inputs, and then have to synchronise.
constexpr int MANY_ROWS = 12;
constexpr int64_t TOKENS_AT_ONCE = 32;  // tokens of a row that one job rotates and writes to the cache

// The rows of a pass: first those of sequences that decode, then those of prompts, which have another arithmetic
// (PromptProduct). Each kind has its own buffer of rounded inputs.
template <class Format>
struct PassRows {
  typedef Product<Format> Decoding;
  typedef PromptProduct<Format> Prompt;
  typedef typename Format::Input Input;
  int decoding, prompts;

  PassRows(int rows, int of_prompts)
      : decoding(Prompt::available() ? rows - of_prompts : rows), prompts(rows - decoding) {}
  size_t decoding_size(int64_t inputs) const {
    return decoding ? Decoding::buffer_rows(decoding) * size_t(Decoding::padded(int(inputs))) : 0;
  }
  size_t prompt_size(int64_t inputs) const {
    return prompts ? Product<Bf16>::buffer_rows(prompts) * size_t(Product<Bf16>::padded(int(inputs))) : 0;
  }
  void round_row(const float* from, int inputs, Input* x, uint16_t* prompt_x, int r) const {
    if (r < decoding)
      Decoding::round_row(from, inputs, x, r, decoding);
    else
      Product<Bf16>::round_row(from, inputs, prompt_x, r - decoding, prompts);
  }
};

template <class Format, class Cache>
void decode(const DecoderCall& call) {
  typedef Product<Format> P;
  typedef PromptProduct<Format> Q;
  typedef typename Format::Input Input;
  AttentionShape s = call.attention;
  const int H = int(call.hidden), D = int(s.head_dim), rows = int(s.first_of(s.rows));
  const PassRows<Format> kinds(rows, rows - int(s.first_of(s.decoding())));
  const int q_width = int(s.heads) * D, kv_width = int(s.kv_heads) * D;
  s.q_head = s.k_head = s.v_head = D;
  s.q_token = q_width, s.k_token = s.v_token = kv_width;
  s.q_row = s.queries * s.q_token, s.k_row = s.v_row = s.queries * s.k_token;
  int64_t widest = 0;  // output of the MLPs' gate
  for (int64_t l = 0; l < call.num_layers; ++l)
    widest = call.layers[l].gate.outputs > widest ? call.layers[l].gate.outputs : widest;
  static thread_local Buffer<float> query, key, value, attended, gate, up;
  static thread_local Buffer<Input> products, shared;
  static thread_local Buffer<uint16_t> prompt_products, prompt_inputs;
  float* q = query.at_least(size_t(rows) * q_width);
  float* k = key.at_least(size_t(rows) * kv_width);
  float* v = value.at_least(size_t(rows) * kv_width);
  float* attention_out = attended.at_least(size_t(rows) * q_width);
  float* g = gate.at_least(size_t(kinds.decoding) * widest);
  float* u = up.at_least(size_t(kinds.decoding) * widest);
  Input* inner = products.at_least(kinds.decoding_size(widest));
  uint16_t* prompt_inner = prompt_products.at_least(kinds.prompt_size(widest));
  int64_t wide = q_width > H ? q_width : H;  // widest input of the other products
  for (int64_t l = 0; l < call.num_layers; ++l)
    wide = call.layers[l].query.inputs > wide ? call.layers[l].query.inputs : wide;
  const size_t input_size = kinds.decoding_size(wide);
  const bool has_many_rows = kinds.decoding >= MANY_ROWS;
  Input* shared_inputs = has_many_rows ? shared.at_least(input_size) : nullptr;
  uint16_t* prompt_x = prompt_inputs.at_least(kinds.prompt_size(wide));

  const int64_t parts = (s.queries + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
  const SharedTiles shared_attention = shared_tiles(s, call.starts);

#pragma omp parallel
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    static thread_local Buffer<float> normed_row, prompt_gate;
    static thread_local Buffer<Input> rounded;
    Input* x = has_many_rows ? shared_inputs : rounded.at_least(input_size);
    float* row = normed_row.at_least(size_t(wide));
    // With few rows each thread rounds all inputs itself, which takes less time than synchronising.
    const auto each_row = [&](auto make) {
      const int decoding = kinds.decoding, prompts = kinds.prompts;
      for (int r = has_many_rows ? decoding * thread / threads : 0;
           r < (has_many_rows ? decoding * (thread + 1) / threads : decoding); ++r)
        make(r);
      for (int r = prompts * thread / threads; r < prompts * (thread + 1) / threads; ++r) make(decoding + r);
      if (has_many_rows || prompts) {
#pragma omp barrier
      }
    };
    const auto share = [&](int64_t outputs, int which) {
      return int(num_blocks(int(outputs)) * int64_t(which) / threads);
    };
    const auto share_begins = [&](const Matrix& m, int which) {
      const ptrdiff_t bytes = with_format<Format>(
          m, [&](auto format) { return Product<decltype(format)>::block_bytes(P::padded(int(m.inputs))); });
      return static_cast<const char*>(m.weight) + share(m.outputs, which) * bytes;
    };
    // What this thread's tiles are configured for: prompts, or matrices with so many bits.
    constexpr int64_t NOTHING = -2, PROMPTS = -1;
    int64_t configured = NOTHING;
    // This thread's blocks of a product for the decoding rows; prefetching continues with its blocks of the next product.
    const auto decoding_product = [&](const Input* x, const Matrix& m, float* y, bool add, const Matrix& next) {
      const Stream stream{share_begins(m, thread + 1), share_begins(next, thread)};
      with_format<Format>(m, [&](auto format) {
        typedef Product<decltype(format)> Own;
        if (configured != m.bits) Own::enter(kinds.decoding), configured = m.bits;
        Own::blocks(x, P::padded(int(m.inputs)), kinds.decoding, m.weight, int(m.outputs), stream, y, m.bias, add,
                    share(m.outputs, thread), share(m.outputs, thread + 1));
      });
    };
    // The same blocks for the rows of prompts; y: of the first row of all.
    const auto prompt_block = [&](const uint16_t* x, const Matrix& m, int b, float* y, ptrdiff_t stride, bool add) {
      const int first = b * BLOCK, left = int(m.outputs) - first;
      if (configured != PROMPTS) Q::enter(), configured = PROMPTS;
      with_format<Format>(m, [&](auto format) {
        PromptProduct<decltype(format)>::block(x, Product<Bf16>::padded(int(m.inputs)), kinds.prompts, m.weight, b, y,
                                               stride, left < BLOCK ? left : BLOCK, m.bias ? m.bias + first : nullptr,
                                               add);
      });
    };
    const auto prompt_product = [&](const uint16_t* x, const Matrix& m, float* y, bool add) {
      float* of_prompts = y + ptrdiff_t(kinds.decoding) * m.outputs;
      for (int b = share(m.outputs, thread); b < share(m.outputs, thread + 1); ++b)
        prompt_block(x, m, b, of_prompts + b * BLOCK, m.outputs, add);
    };
    // Does the products of each kind of rows that there is.
    const auto each_kind = [&](auto of_decoding, auto of_prompts) {
      if (kinds.decoding) of_decoding();
      if (kinds.prompts) of_prompts();
    };
    struct Part {
      const Matrix& matrix;
      float* y;
    };
    const auto product = [&](std::initializer_list<Part> matrices, bool add, const Matrix& next) {
      const auto of_decoding = [&] {
        for (const Part* part = matrices.begin(); part != matrices.end(); ++part)
          decoding_product(x, part->matrix, part->y, add, part + 1 == matrices.end() ? next : part[1].matrix);
      };
      each_kind(of_decoding, [&] {
        for (const Part& part : matrices) prompt_product(prompt_x, part.matrix, part.y, add);
      });
    };
    PassClock clock(thread == 0 ? call.nanoseconds : nullptr);
    for (int64_t l = 0; l < call.num_layers; ++l) {
      const DecoderLayer& layer = call.layers[l];
      const bool only_cache = call.only_cache && l + 1 == call.num_layers;
      Cache* keys = static_cast<Cache*>(layer.keys);
      Cache* values = static_cast<Cache*>(layer.values);
      for (int aux = 0; call.aux && aux < 3; ++aux)
        if (call.aux_layer_ids[aux] == l) {
#pragma omp for schedule(static) nowait
          for (int r = 0; r < rows; ++r)
            std::memcpy(call.aux + (ptrdiff_t(r) * 3 + aux) * H, call.hidden_states + ptrdiff_t(r) * H, size_t(H) * 4);
        }
      const int width = int(layer.query.inputs);
      each_row([&](int r) {
        if (layer.norm_embeds) rms_norm(call.embeds + ptrdiff_t(r) * H, layer.norm_embeds, H, call.eps, row);
        rms_norm(call.hidden_states + ptrdiff_t(r) * H, layer.norm_attention, H, call.eps, row + width - H);
        kinds.round_row(row, width, x, prompt_x, r);
      });
      clock.end_of(REST);
      if (only_cache)
        product({{layer.key, k}, {layer.value, v}}, false, layer.key);
      else
        product({{layer.query, q}, {layer.key, k}, {layer.value, v}}, false, layer.output);
      clock.end_of(PRODUCTS);
#pragma omp barrier
      clock.end_of(REST);
#pragma omp for schedule(static)
      for (int64_t job = 0; job < s.rows * s.kv_heads * parts; ++job) {
        const int64_t b = job / parts / s.kv_heads, kv = job / parts % s.kv_heads, group = s.heads / s.kv_heads;
        const int64_t queries = s.queries_of(b), first = s.first_of(b);
        const int64_t from = job % parts * queries / parts, to = (job % parts + 1) * queries / parts;
        for (int64_t t = from; t < to; ++t) {
          const int64_t position = call.starts[b] + depth(s, call.tree, b, t);
          const int64_t place = (position < call.max_positions ? position : call.max_positions - 1) * D;
          float* token_q = q + (first + t) * q_width;
          const float *cosines = call.cosines + place, *sines = call.sines + place;
          for (int64_t h = kv * group; h < (kv + 1) * group && !only_cache; ++h)
            place_head(token_q + h * D, layer.norm_query, call.eps, cosines, sines, D);
          place_head(k + (first + t) * kv_width + kv * D, layer.norm_key, call.eps, cosines, sines, D);
        }
        write_slot(s, b, kv, k, v, keys, values, call.slots, call.starts, from, to);
      }
      if (only_cache) break;
      attend_share(s, q, keys, values, call.slots, call.starts, call.tree, shared_attention, attention_out);
      clock.end_of(ATTENTION);
      each_row([&](int r) { kinds.round_row(attention_out + ptrdiff_t(r) * q_width, q_width, x, prompt_x, r); });
      clock.end_of(REST);
      product({{layer.output, call.hidden_states}}, true, layer.gate);
      clock.end_of(PRODUCTS);
#pragma omp barrier
      each_row([&](int r) {
        rms_norm(call.hidden_states + ptrdiff_t(r) * H, layer.norm_mlp, H, call.eps, row);
        kinds.round_row(row, H, x, prompt_x, r);
      });
      clock.end_of(REST);
      // A thread's blocks of the gate and of the up projection have the same outputs.
      const int M = int(layer.gate.outputs), inner_k = P::padded(M);
      const int from = share(M, thread), to = share(M, thread + 1);
      const auto gate_decoding = [&] {
        decoding_product(x, layer.gate, g, false, layer.up);
        decoding_product(x, layer.up, u, false, layer.down);
        clock.end_of(PRODUCTS);
        const int count = (to * BLOCK < M ? to * BLOCK : M) - from * BLOCK;
        for (int r = 0; r < kinds.decoding && count > 0; ++r) {
          float* of_row = g + ptrdiff_t(r) * M + from * BLOCK;
          gate_times_up(of_row, u + ptrdiff_t(r) * M + from * BLOCK, count);
          if constexpr (P::ROUNDS_GROUPS)
            for (int i = 0; i < count; i += GROUP)
              P::round_inputs(of_row + i, count - i < GROUP ? count - i : GROUP, from + i / GROUP, inner_k, inner, r,
                              kinds.decoding);
        }
        clock.end_of(REST);
      };
      const auto gate_prompts = [&] {
        float* gates = prompt_gate.at_least(size_t(kinds.prompts) * 2 * BLOCK);
        float* ups = gates + ptrdiff_t(kinds.prompts) * BLOCK;
        for (int b = from; b < to; ++b) {
          const int count = M - b * BLOCK < BLOCK ? M - b * BLOCK : BLOCK;
          prompt_block(prompt_x, layer.gate, b, gates, BLOCK, false);
          prompt_block(prompt_x, layer.up, b, ups, BLOCK, false);
          for (int r = 0; r < kinds.prompts; ++r) {
            gate_times_up(gates + r * BLOCK, ups + r * BLOCK, count);
            Product<Bf16>::round_inputs(gates + r * BLOCK, count, b, Product<Bf16>::padded(M), prompt_inner, r,
                                        kinds.prompts);
          }
        }
        clock.end_of(PRODUCTS);
      };
      each_kind(gate_decoding, gate_prompts);
#pragma omp barrier
      if constexpr (!P::ROUNDS_GROUPS) {
#pragma omp for schedule(static)
        for (int r = 0; r < kinds.decoding; ++r) P::round_row(g + ptrdiff_t(r) * M, M, inner, r, kinds.decoding);
      }
      clock.end_of(REST);
      const Matrix& next = call.layers[l + 1 < call.num_layers ? l + 1 : l].query;
      each_kind([&] { decoding_product(inner, layer.down, call.hidden_states, true, next); },
                [&] { prompt_product(prompt_inner, layer.down, call.hidden_states, true); });
      clock.end_of(PRODUCTS);
#pragma omp barrier
    }
    clock.end_of(REST);
    P::leave();
#pragma omp for schedule(static)
    for (int r = 0; r < (call.only_cache ? 0 : rows); ++r)
      rms_norm(call.hidden_states + ptrdiff_t(r) * H, call.final_norm, H, call.eps, call.normed + ptrdiff_t(r) * H);
  }
}

// Copy positions of the call's slots in every layer: the accepted columns of a tree to their positions.
template <class Cache>
void move(const DecoderCall& call, const int64_t* from, const int64_t* to, int64_t count) {
#pragma omp parallel for schedule(static)
  for (int64_t l = 0; l < call.num_layers; ++l)
    move_positions(call.attention, static_cast<Cache*>(call.layers[l].keys), static_cast<Cache*>(call.layers[l].values),
                   call.slots, from, to, count);
}

}  // namespace
