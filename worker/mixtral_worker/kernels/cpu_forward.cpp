// The model's forward pass on a CPU, for steps of few tokens: as many bytes as the memory gives, and nothing between them.
//
// Computes what model/transformer.py computes, on the same weights as they lie in memory, whole layers in one call, because at one token
// a small operation of torch takes longer than its arithmetic. Every number of a token is made by the same additions in the same order
// whatever else runs in the step: a token's logits do not depend on its batch, nor on how its prompt was cut. Sums are float32, and so is
// the stream between the layers; what enters a product has the weights' type. Which positions a token may look at is given by its
// position alone. Loaded, and described to Python, by cpu_forward.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// T tokens of this step, D head size, H query heads, K kv heads, G = H / K, E experts (1: a dense model), F hidden size of one.

struct bf16 {
    uint16_t bits;
};

struct LayerWeights {
    const void *attention_norm, *wqkv, *wo, *ffn_norm, *gate, *w13, *w2;
};

struct Model {
    int32_t is_bf16, dim, n_layers, n_heads, n_kv_heads, head_dim, hidden, vocab;
    int32_t n_experts, experts_per_token, first_expert, local_experts;  // this rank has local_experts of them, from first_expert on
    int32_t block_size, window;                                         // window 0: a token looks at all before it
    float eps;
    int32_t renormalise;  // whether the chosen experts' weights sum to 1
    int64_t n_blocks;
    const void *embedding, *norm, *head;
    void *kv;               // [L, 2, K, blocks, block_size · D]
    const float *rotation;  // [positions, D / 2, 2] cosine and sine
    const LayerWeights *layers;
};

struct Step {
    int32_t tokens, wanted, table_width, n_threads;
    const int64_t *ids, *positions, *rows, *wanted_places;  // rows: whose table; wanted_places: tokens whose logits are asked for
    const int32_t *tables;                                  // [rows, table_width] blocks
    float *x, *delta;                                       // [T, dim] the stream, and what the last half layer adds to it
    float *logits;                                          // [wanted, vocab]
    int32_t *expert_tokens;                                 // [L, E] how many tokens each expert was chosen by; added to
    void *scratch;                                          // scratch_bytes(model, T)
};

namespace {

// ---- numbers: vectors of LANES floats, whatever the processor calls them

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST_TOKENS_AT_ONCE = 6;  // 6 · 4 sums, 4 weights and a token in 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST_TOKENS_AT_ONCE = 2;  // 16 registers
#else
constexpr int LANES = 4, MOST_TOKENS_AT_ONCE = 4;
#endif
constexpr int ROWS = 4;              // weight rows that are multiplied at once
constexpr int TOKENS_IN_CACHE = 48;  // so many tokens' numbers stay near while weights pass by

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void narrow(float x, float &out) { out = x; }
inline void narrow(float x, bf16 &out) {  // to the nearest, ties to even, as torch does
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out.bits = std::isnan(x) ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline Floats load(const float *p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline Floats load(const bf16 *p) {
    Halves narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return (Floats)(__builtin_convertvector(narrow, Ints) << 16);
}
inline void store(float *p, Floats x) { std::memcpy(p, &x, sizeof x); }

inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

// e^x to within two units in the last place; NaN stays NaN. Cephes' polynomial (Moshier 1989).
inline Floats exponential(Floats x) {
    const Floats zero = {};
    x = x < zero - 87.0f ? zero - 87.0f : x;
    x = x > zero + 88.0f ? zero + 88.0f : x;
    const Floats half_even = zero + 12582912.0f;  // adding and taking away 1.5 · 2²³ rounds to a whole number
    Floats n = (x * 1.44269504088896341f + half_even) - half_even;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = zero + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// ---- the one product: ROWS rows of weights with M rows of tokens, each pair a dot product of `size` numbers

// out [M, ROWS]. While at it, fetch the weights `ahead` numbers further on.
template <class W, int M>
inline void dots(const W *const *w, const W *const *x, int size, float *out, int ahead) {
    Floats sums[M][ROWS] = {};
    int k = 0;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<W, bf16>) {
        for (; k + 32 <= size; k += 32) {
            __m512bh weights[ROWS];
            for (int r = 0; r < ROWS; r++) {
                weights[r] = (__m512bh)_mm512_loadu_si512(w[r] + k);
                __builtin_prefetch(w[r] + k + ahead);
            }
            for (int i = 0; i < M; i++) {
                __m512bh token = (__m512bh)_mm512_loadu_si512(x[i] + k);
                for (int r = 0; r < ROWS; r++) sums[i][r] = (Floats)_mm512_dpbf16_ps((__m512)sums[i][r], weights[r], token);
            }
        }
    }
#endif
    for (; k + LANES <= size; k += LANES) {
        Floats weights[ROWS];
        for (int r = 0; r < ROWS; r++) {
            weights[r] = load(w[r] + k);
            __builtin_prefetch(w[r] + k + ahead);
        }
        for (int i = 0; i < M; i++) {
            Floats token = load(x[i] + k);
            for (int r = 0; r < ROWS; r++) sums[i][r] += weights[r] * token;
        }
    }
    for (int i = 0; i < M; i++) {
#if defined(__AVX512F__)
        // Four sums of 16 lanes to four numbers with 8 shuffles.
        __m512 a = (__m512)sums[i][0], b = (__m512)sums[i][1], c = (__m512)sums[i][2], d = (__m512)sums[i][3];
        __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
        all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
        all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
        for (int r = 0; r < ROWS; r++) out[i * ROWS + r] = ((Floats)all)[r * 4];
#else
        for (int r = 0; r < ROWS; r++) out[i * ROWS + r] = sum(sums[i][r]);
#endif
    }
    for (; k < size; k++)
        for (int i = 0; i < M; i++)
            for (int r = 0; r < ROWS; r++) out[i * ROWS + r] += widen(w[r][k]) * widen(x[i][k]);
}

template <class W, int M = MOST_TOKENS_AT_ONCE>
inline void dots_of(int m, const W *const *w, const W *const *x, int size, float *out, int ahead) {
    if constexpr (M > 1) {
        if (m < M) return dots_of<W, M - 1>(m, w, x, size, out, ahead);
    }
    dots<W, M>(w, x, size, out, ahead);
}

// Every token with the weight rows that `place` names for first, first + step, … below last; emit(token, n, four numbers).
template <class W, class Place, class Emit>
void product(int first, int last, int step, Place place, const W *const *x, int tokens, int size, Emit emit) {
    for (int near = 0; near < tokens; near += TOKENS_IN_CACHE) {
        int end = std::min(tokens, near + TOKENS_IN_CACHE);
        for (int n = first; n < last; n += step) {
            const W *w[ROWS];
            place(n, w);
            int ahead = near == 0 ? step * size : 0;
            for (int t = near; t < end; t += MOST_TOKENS_AT_ONCE) {
                float out[MOST_TOKENS_AT_ONCE * ROWS];
                int m = std::min(MOST_TOKENS_AT_ONCE, end - t);
                dots_of<W>(m, w, x + t, size, out, ahead);
                ahead = 0;
                for (int i = 0; i < m; i++) emit(t + i, n, out + i * ROWS);
            }
        }
    }
}

// ---- threads: all go through the same stages and take task after task of each. A stage is over when its tasks are done, whoever did
// them: a thread that another program keeps from running holds up nobody, unless it is in the middle of a task.

class Crew {
  public:
    explicit Crew(int stages) : stages_(stages) {}

    template <class Work>
    void stage(int &at, int tasks, Work work) {  // every thread calls it with its own `at`, which counts the stages
        Stage &here = stages_[at++];
        for (int task; (task = here.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            work(task);
            here.done.fetch_add(1, std::memory_order_release);
        }
        // Look for some 50 µs, longer than a task; then let others run: the thread waited for may need this very core.
        for (int looks = 0; here.done.load(std::memory_order_acquire) < tasks; looks++) {
            if (looks < 1000) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            } else {
                std::this_thread::yield();
            }
        }
    }

  private:
    struct alignas(64) Stage {
        std::atomic<int> next{0}, done{0};
    };
    std::vector<Stage> stages_;
};

// ---- the layers

template <class W>
class Forward {
  public:
    Forward(const Model &model, const Step &step) : m(model), s(step) {
        kv_size = size_t(m.n_blocks) * m.block_size * m.head_dim;  // numbers of one head, keys or values
        qkv_size = (m.n_heads + 2 * m.n_kv_heads) * m.head_dim;
        pairs = s.tokens * m.experts_per_token;
        char *at = static_cast<char *>(s.scratch);
        auto take = [&at](auto *&place, size_t count) {
            place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(at);
            at += (count * sizeof *place + 63) & ~size_t(63);
        };
        take(normed, size_t(s.tokens) * m.dim);
        take(qkv, size_t(s.tokens) * qkv_size);
        take(queries, size_t(s.tokens) * m.n_heads * m.head_dim);
        take(mixed, size_t(s.tokens) * m.n_heads * m.head_dim);
        take(active, size_t(pairs) * m.hidden);
        take(chosen, pairs);
        take(weights, pairs);
        take(order, pairs);
        take(starts, m.n_experts + 1);
        bytes = at - static_cast<char *>(s.scratch);
    }

    void attend_half(int layer, Crew &crew, int &at) {
        const LayerWeights &w = m.layers[layer];
        auto *wqkv = static_cast<const W *>(w.wqkv), *wo = static_cast<const W *>(w.wo);
        bool first = layer == 0;
        crew.stage(at, s.tokens, [&](int t) {
            if (first) embed(t);
            normalise(t, w.attention_norm, normed + size_t(t) * m.dim, !first);
        });
        multiply(crew, at, wqkv, normed, m.dim, qkv_size, qkv);
        crew.stage(at, s.tokens, [&](int t) { turn_and_keep(layer, t); });
        crew.stage(at, s.tokens * m.n_kv_heads, [&](int task) { attend(layer, task / m.n_kv_heads, task % m.n_kv_heads); });
        multiply(crew, at, wo, mixed, m.n_heads * m.head_dim, m.dim, s.delta);
    }

    void ffn_half(int layer, Crew &crew, int &at) {
        const LayerWeights &w = m.layers[layer];
        auto *w13 = static_cast<const W *>(w.w13), *w2 = static_cast<const W *>(w.w2);
        crew.stage(at, s.tokens, [&](int t) {
            normalise(t, w.ffn_norm, normed + size_t(t) * m.dim, true);
            route(static_cast<const W *>(w.gate), t);
        });
        crew.stage(at, 1, [&](int) { group(layer); });
        const int many = rows_at_once(s.tokens), up_tasks = (m.hidden + many - 1) / many;
        crew.stage(at, m.local_experts * up_tasks, [&](int task) {
            int local = task / up_tasks, begin = task % up_tasks * many, end = std::min(m.hidden, begin + many);
            int from = starts[m.first_expert + local], to = starts[m.first_expert + local + 1];
            const W *base = w13 + size_t(local) * 2 * m.hidden * m.dim;
            auto place = [&](int f, const W **rows) {
                int g = std::min(f + 1, m.hidden - 1);
                rows[0] = base + size_t(f) * m.dim, rows[1] = base + size_t(g) * m.dim;
                rows[2] = rows[0] + size_t(m.hidden) * m.dim, rows[3] = rows[1] + size_t(m.hidden) * m.dim;
            };
            auto rows = row_pointers(to - from, [&](int i) { return normed + size_t(order[from + i] / m.experts_per_token) * m.dim; });
            static thread_local std::vector<float> both;  // [pairs, 2, many] gated and linear, before they meet
            both.resize(size_t(to - from) * 2 * many);
            product<W>(begin, end, 2, place, rows, to - from, m.dim, [&](int i, int f, const float *v) {
                float *out = both.data() + size_t(i) * 2 * many + (f - begin);
                out[0] = v[0], out[1] = v[1], out[many] = v[2], out[many + 1] = v[3];
            });
            for (int i = 0; i < to - from; i++)
                for (int f = begin; f < end; f += LANES) {
                    const float *in = both.data() + size_t(i) * 2 * many + (f - begin);
                    Floats met = silu(load(in)) * load(in + many);
                    for (int lane = 0; lane < std::min(LANES, end - f); lane++)
                        narrow(met[lane], active[size_t(from + i) * m.hidden + f + lane]);
                }
        });
        // Each task owns some columns of the result and adds every expert's share to them, so nobody waits for anybody's sum.
        const int few = rows_at_once(s.tokens) / 2;
        crew.stage(at, (m.dim + few - 1) / few, [&](int task) {
            int begin = task * few, end = std::min(m.dim, begin + few);
            for (int t = 0; t < s.tokens; t++) std::fill(s.delta + size_t(t) * m.dim + begin, s.delta + size_t(t) * m.dim + end, 0.0f);
            for (int local = 0; local < m.local_experts; local++) {
                int from = starts[m.first_expert + local], to = starts[m.first_expert + local + 1];
                if (from == to) continue;
                auto rows = row_pointers(to - from, [&](int i) { return active + size_t(from + i) * m.hidden; });
                auto place = consecutive(w2 + size_t(local) * m.dim * m.hidden, m.hidden, m.dim);
                product<W>(begin, end, ROWS, place, rows, to - from, m.hidden, [&](int i, int n, const float *v) {
                    float *out = s.delta + size_t(order[from + i] / m.experts_per_token) * m.dim;
                    float weight = weights[order[from + i]];
                    for (int r = 0; r < ROWS && n + r < end; r++) out[n + r] += weight * v[r];
                });
            }
        });
    }

    void head(Crew &crew, int &at) {
        crew.stage(at, s.wanted, [&](int i) { normalise(s.wanted_places[i], m.norm, normed + size_t(i) * m.dim, true); });
        multiply(crew, at, static_cast<const W *>(m.head), normed, m.dim, m.vocab, s.logits, s.wanted);
    }

    size_t bytes;  // of scratch

  private:
    static int rows_at_once(int tokens) { return tokens > 16 ? 64 : 32; }

    static auto consecutive(const W *w, int size, int rows) {
        return [=](int n, const W **out) {
            for (int r = 0; r < ROWS; r++) out[r] = w + size_t(std::min(n + r, rows - 1)) * size;
        };
    }

    template <class At>
    static const W *const *row_pointers(int count, At at) {
        static thread_local std::vector<const W *> rows;
        rows.resize(count);
        for (int i = 0; i < count; i++) rows[i] = at(i);
        return rows.data();
    }

    // out [tokens, n] = x [tokens, size] with w [n, size]
    void multiply(Crew &crew, int &at, const W *w, const W *x, int size, int n, float *out, int tokens = -1) {
        if (tokens < 0) tokens = s.tokens;
        const int many = rows_at_once(tokens);
        crew.stage(at, (n + many - 1) / many, [&](int task) {
            auto rows = row_pointers(tokens, [&](int t) { return x + size_t(t) * size; });
            int end = std::min(n, (task + 1) * many);
            product<W>(task * many, end, ROWS, consecutive(w, size, n), rows, tokens, size, [&](int t, int row, const float *v) {
                for (int r = 0; r < ROWS && row + r < end; r++) out[size_t(t) * n + row + r] = v[r];
            });
        });
    }

    void embed(int t) {
        const W *from = static_cast<const W *>(m.embedding) + s.ids[t] * m.dim;
        for (int i = 0; i < m.dim; i++) s.x[size_t(t) * m.dim + i] = widen(from[i]);
    }

    void normalise(int t, const void *norm, W *out, bool add) {
        const W *scale = static_cast<const W *>(norm);
        float *x = s.x + size_t(t) * m.dim;
        const float *delta = s.delta + size_t(t) * m.dim;
        Floats squares = {};
        int i = 0;
        for (; i + LANES <= m.dim; i += LANES) {
            Floats now = load(x + i);
            if (add) store(x + i, now += load(delta + i));
            squares += now * now;
        }
        float total = sum(squares);
        for (; i < m.dim; i++) {
            if (add) x[i] += delta[i];
            total += x[i] * x[i];
        }
        float factor = 1.0f / std::sqrt(total / m.dim + m.eps);
        for (i = 0; i < m.dim; i++) narrow(x[i] * factor * widen(scale[i]), out[i]);
    }

    W *key_or_value(int layer, int kind, int head, int row, int position) const {
        int block = s.tables[size_t(row) * s.table_width + position / m.block_size];
        size_t place = (size_t(block) * m.block_size + position % m.block_size) * m.head_dim;
        return static_cast<W *>(m.kv) + ((size_t(layer) * 2 + kind) * m.n_kv_heads + head) * kv_size + place;
    }

    void turn_and_keep(int layer, int t) {
        const float *from = qkv + size_t(t) * qkv_size;
        const int position = s.positions[t], row = s.rows[t], D = m.head_dim;
        for (int h = 0; h < m.n_heads; h++) turn(from + h * D, position, queries + (size_t(t) * m.n_heads + h) * D);
        from += m.n_heads * D;
        for (int h = 0; h < m.n_kv_heads; h++) {
            turn(from + h * D, position, key_or_value(layer, 0, h, row, position));
            W *value = key_or_value(layer, 1, h, row, position);
            for (int d = 0; d < D; d++) narrow(from[(m.n_kv_heads + h) * D + d], value[d]);
        }
    }

    void turn(const float *from, int position, W *out) const {  // neighbouring numbers are a pair
        const float *rotation = m.rotation + size_t(position) * m.head_dim;
        for (int d = 0; d < m.head_dim; d += 2) {
            float c = rotation[d], i = rotation[d + 1];
            narrow(from[d] * c - from[d + 1] * i, out[d]);
            narrow(from[d] * i + from[d + 1] * c, out[d + 1]);
        }
    }

    // All queries of one kv head at once, so that its keys and values are read once.
    void attend(int layer, int t, int head) {
        const int D = m.head_dim, group = m.n_heads / m.n_kv_heads, position = s.positions[t];
        const int begin = m.window ? std::max(0, position + 1 - m.window) : 0, count = position + 1 - begin;
        const int padded = (count + LANES - 1) / LANES * LANES;
        static thread_local std::vector<const W *> keys;
        static thread_local std::vector<float> scores;
        keys.resize(count + ROWS), scores.resize(size_t(group) * padded);
        for (int p = 0; p < count;) {
            const W *key = key_or_value(layer, 0, head, s.rows[t], begin + p);
            int in_block = std::min(count - p, m.block_size - (begin + p) % m.block_size);
            for (int i = 0; i < in_block; i++) keys[p++] = key + size_t(i) * D;
        }
        std::fill(keys.begin() + count, keys.end(), keys[count - 1]);
        const float scale = 1.0f / std::sqrt(float(D));
        const size_t first = (size_t(t) * m.n_heads + head * group) * D;
        auto rows = row_pointers(group, [&](int g) { return queries + first + size_t(g) * D; });
        auto place = [&](int p, const W **four) { std::copy_n(keys.begin() + p, ROWS, four); };
        product<W>(0, count, ROWS, place, rows, group, D, [&](int g, int p, const float *v) {
            for (int r = 0; r < ROWS && p + r < count; r++) scores[size_t(g) * padded + p + r] = v[r] * scale;
        });
        const size_t to_values = size_t(m.n_kv_heads) * kv_size;
        for (int g = 0; g < group; g += MOST_BLENDED) {
            float totals[MOST_BLENDED];
            int some = std::min(MOST_BLENDED, group - g);
            for (int i = 0; i < some; i++) totals[i] = soften(scores.data() + size_t(g + i) * padded, count, padded);
            blend_of(some, keys.data(), to_values, scores.data() + size_t(g) * padded, padded, count, totals, mixed + first + size_t(g) * D);
        }
    }

    static constexpr int MOST_BLENDED = 4;

    template <int G = MOST_BLENDED>
    void blend_of(int some, const W *const *keys, size_t to_values, const float *scores, int padded, int count, const float *totals, W *out) {
        if constexpr (G > 1) {
            if (some < G) return blend_of<G - 1>(some, keys, to_values, scores, padded, count, totals, out);
        }
        blend<G>(keys, to_values, scores, padded, count, totals, out);
    }

    // The values of all positions, weighed by the scores of G queries: out [G, D].
    template <int G>
    void blend(const W *const *keys, size_t to_values, const float *scores, int padded, int count, const float *totals, W *out) const {
        const int D = m.head_dim;
        int d = 0;
        for (; d + 2 * LANES <= D; d += 2 * LANES) {
            Floats sums[G][2] = {};
            for (int p = 0; p < count; p++) {
                const W *value = keys[p] + to_values + d;
                Floats low = load(value), high = load(value + LANES);
                for (int g = 0; g < G; g++) {
                    sums[g][0] += scores[g * padded + p] * low;
                    sums[g][1] += scores[g * padded + p] * high;
                }
            }
            for (int g = 0; g < G; g++)
                for (int i = 0; i < 2 * LANES; i++) narrow(sums[g][i / LANES][i % LANES] / totals[g], out[g * D + d + i]);
        }
        for (; d < D; d++)
            for (int g = 0; g < G; g++) {
                float sum = 0;
                for (int p = 0; p < count; p++) sum += scores[g * padded + p] * widen(keys[p][to_values + d]);
                narrow(sum / totals[g], out[g * D + d]);
            }
    }

    // Scores to e^(score - best), in place; returns their sum.
    static float soften(float *scores, int count, int padded) {
        for (int p = count; p < padded; p++) scores[p] = -std::numeric_limits<float>::infinity();  // adds 1e-38 to a sum of at least 1
        Floats bests = load(scores);
        for (int p = LANES; p < padded; p += LANES) {
            Floats some = load(scores + p);
            bests = some > bests ? some : bests;
        }
        float best = bests[0];
        for (int i = 1; i < LANES; i++) best = std::max(best, bests[i]);
        Floats totals = {};
        for (int p = 0; p < padded; p += LANES) {
            Floats e = exponential(load(scores + p) - best);
            store(scores + p, e);
            totals += e;
        }
        return sum(totals);
    }

    // Choose a token's experts: the best, the lower index of equals; their weights as moe.py's route gives them.
    void route(const W *gate, int t) {
        int32_t *chosen_here = chosen + size_t(t) * m.experts_per_token;
        float *weights_here = weights + size_t(t) * m.experts_per_token;
        if (m.n_experts == 1) {
            chosen_here[0] = 0, weights_here[0] = 1;
            return;
        }
        static thread_local std::vector<float> logits;
        logits.resize(m.n_experts + ROWS);
        const W *x = normed + size_t(t) * m.dim;
        product<W>(0, m.n_experts, ROWS, consecutive(gate, m.dim, m.n_experts), &x, 1, m.dim, [&](int, int n, const float *v) {
            for (int r = 0; r < ROWS; r++) logits[n + r] = v[r];
        });
        float whole = 0, best = logits[0];
        for (int e = 1; e < m.n_experts; e++) best = std::max(best, logits[e]);
        for (int e = 0; e < m.n_experts; e++) whole += std::exp(logits[e] - best);
        float total = 0;
        for (int k = 0; k < m.experts_per_token; k++) {
            int expert = -1;
            for (int e = 0; e < m.n_experts; e++) {
                bool taken = std::find(chosen_here, chosen_here + k, e) != chosen_here + k;
                if (!taken && (expert < 0 || logits[e] > logits[expert])) expert = e;  // where all are NaN: some experts all the same
            }
            chosen_here[k] = expert;
            total += weights_here[k] = std::exp(logits[expert] - best);
        }
        for (int k = 0; k < m.experts_per_token; k++) weights_here[k] /= m.renormalise ? total : whole;
    }

    // Pairs of token and expert, sorted by expert: starts [E + 1] in order [T · experts_per_token].
    void group(int layer) {
        std::fill(starts, starts + m.n_experts + 1, 0);
        for (int pair = 0; pair < pairs; pair++) starts[chosen[pair] + 1]++;
        for (int e = 0; e < m.n_experts; e++) {
            s.expert_tokens[size_t(layer) * m.n_experts + e] += starts[e + 1];
            starts[e + 1] += starts[e];
        }
        std::vector<int32_t> next(starts, starts + m.n_experts);
        for (int pair = 0; pair < pairs; pair++) order[next[chosen[pair]]++] = pair;
    }

    const Model &m;
    const Step &s;
    size_t kv_size;
    int qkv_size, pairs;
    W *normed, *queries, *mixed, *active;
    float *qkv, *weights;
    int32_t *chosen, *order, *starts;
};

constexpr int MOST_STAGES_OF_A_HALF = 5;

template <class W>
void run(const Model &model, const Step &step, int first_half, int last_half) {
    Forward<W> forward(model, step);
    auto work = [&](Crew &crew) {
        int at = 0;
        for (int half = first_half; half < last_half; half++) {
            if (half == 2 * model.n_layers)
                forward.head(crew, at);
            else if (half % 2 == 0)
                forward.attend_half(half / 2, crew, at);
            else
                forward.ffn_half(half / 2, crew, at);
        }
    };
    Crew crew((last_half - first_half) * MOST_STAGES_OF_A_HALF);
#ifdef _OPENMP
#pragma omp parallel num_threads(step.n_threads) if (step.n_threads > 1)
#endif
    work(crew);
}

}  // namespace

extern "C" {

size_t scratch_bytes(const Model *model, int tokens) {
    Step step{};
    step.tokens = tokens;
    return model->is_bf16 ? Forward<bf16>(*model, step).bytes : Forward<float>(*model, step).bytes;
}

// Halves of layers from first_half on, below last_half: attention of layer l is half 2l, its experts 2l + 1; half 2L is the head.
void run_halves(const Model *model, const Step *step, int first_half, int last_half) {
    if (model->is_bf16)
        run<bf16>(*model, *step, first_half, last_half);
    else
        run<float>(*model, *step, first_half, last_half);
}

}  // extern "C"
