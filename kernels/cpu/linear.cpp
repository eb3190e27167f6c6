// y = x @ W^T + b with W packed in panels of PW output features.
//
// Packed layout: [panel][k][PW] of float32, float16 or float8_e4m3fn, or bfloat16 pairs: the 32-bit word i of a row of a
// panel holds feature i in its low half and feature VL + i in its high half, so that one load and two cheap operations
// give two vectors. float8 has a scale for each group of k of an output, times 2^8, [panel][group][PW] float32.
// Each output element is one chain of fused multiply-adds over k = 0 .. K-1, begun at the bias, wherever the tiles,
// blocks and threads fall: a row's result has the same bits for every number of rows in the batch.

#include "convert.h"
#include "kernels.h"

#include <type_traits>

namespace {

constexpr int PW = 2 * VL;             // output features per panel
// A block of a panel (128 KiB) and a block of x (768 KiB) stay in L2 together. Longer blocks of k write partial sums
// less often, and more rows share the widening of a bfloat16 block.
constexpr long BLOCK_K = 1024;         // k per block
constexpr long BLOCK_M = 192;          // rows of x per block
constexpr long SUPER_M = 768;          // rows of x packed at a time, which bounds the scratch
constexpr long PACKED_K = 256;   // k that a thread packs at a time
constexpr int WIDEN_TILES = 8;         // from so many tiles on, widening a bfloat16 block once pays
constexpr long STREAM_AHEAD = 4096;    // bytes fetched ahead in the weight stream

struct Pair {
    vf low, high;
};

struct Problem {
    const float* x;       // [m][k]
    const char* w;        // packed
    const float* scales;  // of float8
    const float* bias;    // [panels * PW]
    float* y;             // [m][n]
    long m, n, k, group_bits;
};

// Weights of a panel from some k on, one kind of storage each: a row of PW as two vectors of float32.
struct Float {
    static constexpr long size = 4;
    const char* w;
    Float(const Problem&, const char* w, long, long) : w(w) {}
    explicit Float(const float* wide) : w((const char*)wide) {}
    INLINE Pair row(long k) const { return {load((const float*)w + k * PW), load((const float*)w + k * PW + VL)}; }
};
struct Bfloat {
    static constexpr long size = 2;
    const char* w;
    Bfloat(const Problem&, const char* w, long, long) : w(w) {}
    INLINE Pair row(long k) const {
        vu word = *(const vu_any*)(w + k * PW * 2);
        return {(vf)(word << 16), (vf)(word & 0xffff0000u)};
    }
};
struct Half {
    static constexpr long size = 2;
    const char* w;
    Half(const Problem&, const char* w, long, long) : w(w) {}
    INLINE Pair row(long k) const { return {widen_halves(w + k * PW * 2), widen_halves(w + k * PW * 2 + VL * 2)}; }
};
struct Float8 {
    static constexpr long size = 1;
    const char* w;
    const float* scales;  // with the factor that widened codes lack
    long first, group_bits;
    Float8(const Problem& p, const char* w, long panel, long k0)
        : w(w), scales(p.scales + panel * (((p.k - 1) >> p.group_bits) + 1) * PW), first(k0), group_bits(p.group_bits) {}
    INLINE Pair row(long k) const {
        const int8_t* codes = (const int8_t*)w + k * PW;
        const float* scale = scales + ((first + k) >> group_bits) * PW;
        return {widen_e4m3(codes) * load(scale), widen_e4m3(codes + VL) * load(scale + VL)};
    }
};

// What to fetch while a tile computes: `step` bytes of the weight stream for each k, from `from` on.
struct Ahead {
    const char* from;
    long step;
};

// One register tile: c[R][PW] = start + a[k][R]^T w[k][PW]. start is c itself, or the bias with stride 0.
template <int R, class W>
void tile(const float* a, W w, long k, Ahead ahead, const float* start, long start_stride, float* c,
          long c_stride) {
    vf low[R], high[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        low[r] = load(start + r * start_stride);
        high[r] = load(start + r * start_stride + VL);
    }
    auto run = [&](auto lines) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (long i = 0; i < k; i++) {
            for (int line = 0; line < lines; line++) __builtin_prefetch(ahead.from + line * 64, 0, 2);
            ahead.from += ahead.step;
            Pair weights = w.row(i);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                vf x = splat(a[i * R + r]);
                low[r] += x * weights.low;
                high[r] += x * weights.high;
            }
        }
    };
    if (ahead.step > 64)
        run(std::integral_constant<int, 2>());
    else
        run(std::integral_constant<int, 1>());
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store(c + r * c_stride, low[r]);
        store(c + r * c_stride + VL, high[r]);
    }
}

template <class W>
using Tile = void (*)(const float*, W, long, Ahead, const float*, long, float*, long);

template <class W, int... R>
struct Tiles {
    static constexpr Tile<W> table[] = {nullptr, tile<R, W>...};
};
#if defined(__AVX512F__) || defined(__aarch64__)
template <class W>
using AllTiles = Tiles<W, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>;
#else
template <class W>
using AllTiles = Tiles<W, 1, 2, 3, 4, 5, 6>;
#endif

// How M rows fall into tiles of nearly equal height; tile t has rows [begin(t), begin(t + 1)).
struct Rows {
    long tiles, base, extra;
    explicit Rows(long m) : tiles(ceil_div(m, MR)), base(m / tiles), extra(m % tiles) {}
    long begin(long t) const { return t * base + least(t, extra); }
};

// x as [k block][tile][k][R], the order in which tiles read it. Units are pieces of a block of a tile.
void pack_rows(const Problem& p, const Rows& rows, long block_k, float* out, long begin, long end) {
    const long pieces = ceil_div(block_k, PACKED_K);
    for (long unit = begin; unit < end; unit++) {
        const long k0 = unit / pieces / rows.tiles * block_k, t = unit / pieces % rows.tiles;
        const long first_k = unit % pieces * PACKED_K, block = least(block_k, p.k - k0);
        const long kc = least(PACKED_K, block - first_k), r0 = rows.begin(t), height = rows.begin(t + 1) - r0;
        float* to = out + k0 * p.m + r0 * block + first_k * height;
        const float* from = p.x + r0 * p.k + k0 + first_k;
        long i = 0;
        for (; height > 1 && i + VL <= kc; i += VL)
            for (long first = 0; first < height; first += VL) {
                const long lanes = least(VL, height - first);
                vf square[VL];
#pragma GCC unroll 16
                for (int r = 0; r < VL; r++) square[r] = r < lanes ? load(from + (first + r) * p.k + i) : vf{};
                transpose(square);
                // A whole vector may spill into what is written later here, but not into what is written elsewhere.
                for (int j = 0; j < VL; j++) {
                    float* row = to + (i + j) * height + first;
                    if (lanes == VL || (height < VL && row + VL <= to + kc * height))
                        store(row, square[j]);
                    else
                        memcpy(row, &square[j], lanes * sizeof(float));
                }
            }
        for (; i < kc; i++)
            for (long r = 0; r < height; r++) to[i * height + r] = from[r * p.k + i];
    }
}

template <class W>
INLINE const char* weights_at(const Problem& p, long panel) {
    return p.w + panel * p.k * PW * W::size;
}

template <class W>
void widen(W w, long k, float* out) {
    for (long i = 0; i < k; i++) {
        Pair pair = w.row(i);
        store(out + i * PW, pair.low);
        store(out + i * PW + VL, pair.high);
    }
}

// All k of tiles [t0, t1) against panels [n0, n1).
template <class W>
void multiply(const Problem& p, const Rows& rows, long block_k, const float* a, long t0, long t1, long n0, long n1) {
    constexpr bool narrow = !__is_same(W, Float);
    constexpr long row_bytes = PW * W::size;
    alignas(64) float edge[MR * PW];       // a tile of the last panel, which may be narrower than PW
    alignas(64) float wide[BLOCK_K * PW];  // a block of a panel, widened
    const bool widening = narrow && t1 - t0 >= WIDEN_TILES;
    for (long k0 = 0; k0 < p.k; k0 += block_k) {
        long kc = least(block_k, p.k - k0);
        for (long index = n0; index < n1; index++) {
            const W w(p, weights_at<W>(p, index) + k0 * row_bytes, index, k0);
            if constexpr (narrow)
                if (widening) widen(w, kc, wide);
            const char* next = index + 1 < n1 ? weights_at<W>(p, index + 1) + k0 * row_bytes
                                              : weights_at<W>(p, n0) + (k0 + kc) * row_bytes;
            long columns = least(PW, p.n - index * PW);
            const float* bias = p.bias + index * PW;
            for (long t = t0; t < t1; t++) {
                long r0 = rows.begin(t), height = rows.begin(t + 1) - r0;
                const float* from = a + k0 * p.m + r0 * kc;
                float* y = p.y + r0 * p.n + index * PW;
                float* c = columns < PW ? edge : y;
                long stride = columns < PW ? PW : p.n;
                if (columns < PW && k0)
                    for (long r = 0; r < height; r++) memcpy(edge + r * PW, y + r * p.n, columns * 4);
                const float* start = k0 ? c : bias;
                long start_stride = k0 ? stride : 0;
                // One tile streams just ahead of itself; several share out the fetching of the next block.
                long share = ceil_div(row_bytes, t1 - t0);
                Ahead ahead = t1 - t0 == 1 ? Ahead{w.w + STREAM_AHEAD, row_bytes}
                                           : Ahead{next + (t - t0) * share * kc, share};
                if (widening)
                    AllTiles<Float>::table[height](from, Float(wide), kc, ahead, start, start_stride, c, stride);
                else
                    AllTiles<W>::table[height](from, w, kc, ahead, start, start_stride, c, stride);
                if (columns < PW)
                    for (long r = 0; r < height; r++) memcpy(y + r * p.n, edge + r * PW, columns * 4);
            }
        }
    }
}

template <class W>
void linear(const Problem& p, float* packed, Team& team) {
    Rows rows(p.m);
    long panels = ceil_div(p.n, PW);
    // A single tile reads each weight once whatever the blocks; more tiles want the block again from cache.
    long blocks = rows.tiles == 1 ? 1 : ceil_div(p.k, BLOCK_K);
    long block_k = ceil_div(p.k, blocks);
    long row_blocks = ceil_div(p.m, BLOCK_M);
    long group = most(1, least(8, panels * row_blocks / (team.size * 12)));
    long groups = ceil_div(panels, group);
    const float* a = p.x;
    if (p.m > 1) {  // one row is its own packed form
        team.share(rows.tiles * blocks * ceil_div(block_k, PACKED_K),
                   [&](long begin, long end) { pack_rows(p, rows, block_k, packed, begin, end); });
        team.barrier();
        a = packed;
    }
    team.each(groups * row_blocks, [&](long task, long) {
        long n0 = task / row_blocks * group, block = task % row_blocks;
        multiply<W>(p, rows, block_k, a, rows.tiles * block / row_blocks, rows.tiles * (block + 1) / row_blocks, n0,
                    least(n0 + group, panels));
    });
    team.barrier();
}

// Where output j of a panel lies in a row of it.
INLINE long place(int kind, int j) { return kind == BFLOAT16 ? (j % VL) * 2 + j / VL : j; }

}  // namespace

long product_space(const Matrix& matrix, long rows) {
    return matrix.kind <= INT8 ? quantized_space(matrix, rows) : least(rows, SUPER_M) * matrix.in;
}

void product(const Matrix& matrix, const float* x, float* y, long rows, float* space, Team& team) {
    if (matrix.kind <= INT8) return quantized_product(matrix, x, y, rows, space, team);
    const long n = matrix.out, k = matrix.in;
    for (long m0 = 0; m0 < rows; m0 += SUPER_M) {
        const Problem p{x + m0 * k, (const char*)matrix.weight, matrix.scales, matrix.bias, y + m0 * n,
                        least(SUPER_M, rows - m0), n, k, matrix.group};
        if (matrix.kind == FLOAT)
            linear<Float>(p, space, team);
        else if (matrix.kind == BFLOAT16)
            linear<Bfloat>(p, space, team);
        else if (matrix.kind == FLOAT16)
            linear<Half>(p, space, team);
        else
            linear<Float8>(p, space, team);
    }
}

EXPORT long mr_panel_width() { return PW; }

EXPORT void mr_product(const Matrix* matrix, const float* x, float* y, long rows, int threads) {
    static thread_local Scratch scratch;
    float* space = scratch.get(product_space(*matrix, rows));
    with_team(threads, [&](Team& team) { product(*matrix, x, y, rows, space, team); });
}

// w [n][k] -> out [panels][k][PW] of the same kind; features past n are zero.
EXPORT void mr_pack(const void* w, int kind, void* out, long n, long k, int threads) {
    const long size = kind == FLOAT ? 4 : kind == FLOAT8 ? 1 : 2, panels = ceil_div(n, PW);
    ask_for_huge_pages(out, panels * k * PW * size);
    auto pack = [&]<class T>(const T* from, T* to) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long index = 0; index < panels; index++)
            for (int j = 0; j < PW; j++) {
                const long row = index * PW + j;
                T* column = to + index * k * PW + place(kind, j);
                for (long i = 0; i < k; i++) column[i * PW] = row < n ? from[row * k + i] : T{};
            }
    };
    if (size == 4)
        pack((const float*)w, (float*)out);
    else if (size == 2)
        pack((const uint16_t*)w, (uint16_t*)out);
    else
        pack((const uint8_t*)w, (uint8_t*)out);
}

// The rows of a plain matrix that tokens name.
static void plain_rows(const Matrix& matrix, const int64_t* tokens, float* y, long count) {
    const long k = matrix.in;
    const Problem p{nullptr, (const char*)matrix.weight, matrix.scales, nullptr, nullptr, 0, matrix.out, k,
                    matrix.group};
    auto unpack = [&]<class W>(const W* /* which kind */) {
        for (long t = 0; t < count; t++) {
            const long index = tokens[t] / PW, j = tokens[t] % PW;
            const W panel(p, weights_at<W>(p, index), index, 0);
            for (long i = 0; i < k; i++) {
                const Pair row = panel.row(i);
                y[t * k + i] = j < VL ? row.low[j] : row.high[j - VL];
            }
        }
    };
    if (matrix.kind == FLOAT)
        unpack((const Float*)nullptr);
    else if (matrix.kind == BFLOAT16)
        unpack((const Bfloat*)nullptr);
    else if (matrix.kind == FLOAT16)
        unpack((const Half*)nullptr);
    else
        unpack((const Float8*)nullptr);
}

void matrix_rows(const Matrix& matrix, const int64_t* tokens, float* y, long count) {
    if (matrix.kind <= INT8)
        quantized_rows(matrix, tokens, y, count);
    else
        plain_rows(matrix, tokens, y, count);
}

// Rows of the original matrix: y [count][in] = w[tokens[i]][:]. Returns 0, or 1 + the index of a token that it has not.
EXPORT int64_t mr_matrix_rows(const Matrix* matrix, const int64_t* tokens, float* y, long count) {
    for (long t = 0; t < count; t++)
        if (tokens[t] < 0 || tokens[t] >= matrix->out) return t + 1;
    matrix_rows(*matrix, tokens, y, count);
    return 0;
}
