// y = x @ W^T + b with W in 8 or 4 bits: w = scale * (q - zero), one scale and zero for each group of inputs of an
// output. x is quantised on the way, row by row and part by part, to 8 bits with a scale of its own, so that the sums
// are integers: q is unsigned and x signed, which is what the processors' dot products of bytes take. A part is a
// group, or a piece of a long one: with one scale for all inputs, a single large one would leave the others no bits.
//
//   y[r][j] = b[j] + sum over groups g of scale[j][g] * sum over parts of x_scale[r] * (sum q x - zero[j][g] * sum x)
//
// Packed layout: [panel][group]: PW scales (float16), PW zeros (float16), then for each four inputs 8 bits: [2][VL][4]
// bytes, 4 bits: [VL][4] bytes whose low nibbles are the panel's first VL outputs and whose high nibbles the others.
// With a codebook a nibble stands for one of its 16 bytes, all moved up by 128, as the zeros are.
// Sums over a group are exact and groups are added in order: a row's result has the same bits in every batch.

#include "convert.h"
#include "kernels.h"

#include <cmath>

namespace {

constexpr int PW = 2 * VL;               // outputs per panel
constexpr long HEADER = PW * 4;          // bytes of scales and zeros of a panel's group
constexpr long BLOCK_BYTES = 512 << 10;  // quantised rows that stay in L2 beside a panel
constexpr long UNPACK_TILES = 3;         // row tiles from which it pays to widen 4-bit weights once for all
constexpr long LONGEST_PART = 128;       // inputs that share a scale of x, at most
constexpr float LEVELS = 127.0f;         // x lies in -127 .. 127

typedef uint8_t bytes_any __attribute__((vector_size(VL * 4), aligned(1), may_alias));


// sum + the dot products of four unsigned bytes of w with four signed bytes of x, in each 32-bit lane.
INLINE vi dot(vi sum, vi w, vi x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif defined(__AVX512BW__)
    // Products of bytes are summed as 16 x 16 bits, even and odd ones apart: nothing saturates.
    __m512i even = _mm512_madd_epi16(_mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)),
                                     _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), _mm512_srai_epi16((__m512i)x, 8));
    return sum + (vi)even + (vi)odd;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)w, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), _mm256_srai_epi16((__m256i)x, 8));
    return sum + (vi)even + (vi)odd;
#else
    for (int shift = 0; shift < 32; shift += 8) sum += (vi)((vu)w >> shift & 255) * ((vi)((vu)x << (24 - shift)) >> 24);
    return sum;
#endif
}

struct Problem {
    const float* x;       // [m][k]
    const uint8_t* w;     // packed
    const uint8_t* codebook;  // [16], or null
    const int64_t* order;     // [k], the input that a column multiplies, or null
    const float* bias;    // [panels * PW]
    float* y;             // [m][n]
    long m, n, k, group;  // group divides k
    int bits;
    long part;  // divides group
    long groups() const { return k / group; }
    long group_bytes() const { return HEADER + group * PW * bits / 8; }
};

// The longest part that divides a group; the whole group where none of a useful length does.
long part_of(long group) {
    for (long part = least(group, LONGEST_PART) / 4 * 4; part >= 32; part -= 4)
        if (group % part == 0) return part;
    return group;
}

// Quantised rows: tile t of R rows has its values [part][part / 4][R][4], and for each part R scales and R sums of the
// values that were quantised.
struct Rows {
    long tiles, base, extra;
    explicit Rows(long m) : tiles(ceil_div(m, MR)), base(m / tiles), extra(m % tiles) {}
    long begin(long t) const { return t * base + least(t, extra); }
};

// One part of one row; `to` is where its first four values go, `height` the tile's.
void quantise_part(const Problem& p, long row, long part, long height, int8_t* to, float* scale_, float* sum_) {
    static thread_local Scratch ordered_space;
    const float* from = p.x + row * p.k + part * p.part;
    if (p.order) {
        float* ordered = ordered_space.get(p.part);
        for (long i = 0; i < p.part; i++) ordered[i] = p.x[row * p.k + p.order[part * p.part + i]];
        from = ordered;
    }
    vf top{}, broken{};  // a NaN or an infinity, which a maximum may pass by, must come out again
    long i = 0;
    for (; i + VL <= p.part; i += VL) {
        vf v = load(from + i);
        top = vmax(top, vmax(v, -v));
        broken += v * 0.0f;
    }
    float largest = hmax(top), scale = hsum(broken);
    for (; i < p.part; i++) {
        largest = fmaxf(largest, fabsf(from[i]));
        scale += from[i] * 0.0f;
    }
    scale += largest / LEVELS;
    const float inverse = largest > 0 && std::isfinite(scale) ? 1 / scale : 0;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
    vi vector_sum{};
    for (i = 0; i + VL <= p.part; i += VL) {
        vi q = (vi)(load(from + i) * inverse + magic) - (vi)splat(magic);
        vector_sum += q;
        const bytes_of_lanes narrow = narrow_to_bytes(q);
        for (int j = 0; j < VL; j += 4) memcpy(to + (i + j) * height, (const char*)&narrow + j, 4);
    }
    int32_t sum = 0, lanes[VL];
    memcpy(lanes, &vector_sum, sizeof lanes);
    for (int32_t lane : lanes) sum += lane;
    for (; i < p.part; i++) {
        const int32_t q = (int32_t)rintf(from[i] * inverse);
        to[i / 4 * height * 4 + i % 4] = (int8_t)q;
        sum += q;
    }
    *scale_ = scale;
    *sum_ = scale * (float)sum;
}

// Bytes 0 .. 15 of `indices` replaced by those of the codebook, which is there VL / 4 times over.
INLINE vi look_up(vi codebook, vi indices) {
#if defined(__AVX512BW__)
    return (vi)_mm512_shuffle_epi8((__m512i)codebook, (__m512i)indices);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (vi)_mm256_shuffle_epi8((__m256i)codebook, (__m256i)indices);
#else
    uint8_t book[VL * 4], bytes[VL * 4];
    memcpy(book, &codebook, sizeof book);
    memcpy(bytes, &indices, sizeof bytes);
    for (uint8_t& byte : bytes) byte = book[byte];
    memcpy(&indices, bytes, sizeof bytes);
    return indices;
#endif
}

template <int BITS>
INLINE void load_bytes(const uint8_t* from, vi* low, vi* high) {
    vi word = (vi)(*(const bytes_any*)from);
    if constexpr (BITS == 4) {
        *low = word & 0x0f0f0f0f;
        *high = (vi)((vu)word >> 4) & 0x0f0f0f0f;
    } else {
        *low = word;
        *high = (vi)(*(const bytes_any*)(from + VL * 4));
    }
}

INLINE vi splat_bytes(const int8_t* from) {
    int32_t word;
    memcpy(&word, from, 4);
    return word - vi{};
}

// What is multiplied next, to be fetched meanwhile: `step` bytes for each four inputs.
struct Ahead {
    const uint8_t* from;
    long step;
};

template <int BITS, bool BOOK, int R>
void tile(const Problem& p, const int8_t* values, const float* scales, const float* sums, const uint8_t* w,
          const float* bias, float* c, long c_stride, Ahead ahead) {
    constexpr long step = VL * BITS;  // bytes of four inputs: VL * 4 for 4 bits, twice that for 8
    vf low[R], high[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        low[r] = load(bias);
        high[r] = load(bias + VL);
    }
    vi book{};
    if constexpr (BOOK)
        for (long i = 0; i < VL; i += 4) memcpy((char*)&book + i * 4, p.codebook, 16);
    const long parts = p.group / p.part;
    for (long g = 0; g < p.groups(); g++, w += p.group_bytes()) {
        vf group_low[R], group_high[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) group_low[r] = group_high[r] = vf{};
        vf group_sums[(R + VL - 1) / VL] = {};  // of row r in lane r
        const uint8_t* from = w + HEADER;
        __builtin_prefetch(ahead.from + 64, 0, 2);
        for (long part = 0; part < parts; part++, scales += R, sums += R) {
            vi sum_low[R], sum_high[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sum_low[r] = sum_high[r] = vi{};
            for (long i = 0; i < p.part / 4; i++, values += R * 4, from += step, ahead.from += ahead.step) {
                for (long line = 0; line < step; line += 64) __builtin_prefetch(ahead.from + line, 0, 2);
                vi w_low, w_high;
                load_bytes<BITS>(from, &w_low, &w_high);
                if constexpr (BOOK) {
                    w_low = look_up(book, w_low);
                    w_high = look_up(book, w_high);
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    vi x = splat_bytes(values + r * 4);
                    sum_low[r] = dot(sum_low[r], w_low, x);
                    sum_high[r] = dot(sum_high[r], w_high, x);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const vf scale = splat(scales[r]);
                group_low[r] += __builtin_convertvector(sum_low[r], vf) * scale;
                group_high[r] += __builtin_convertvector(sum_high[r], vf) * scale;
            }
#pragma GCC unroll 4
            for (int i = 0; i < (R + VL - 1) / VL; i++) group_sums[i] += load(sums + i * VL);
        }
        const vf scale_low = widen_halves(w), scale_high = widen_halves(w + VL * 2);
        const vf zero_low = widen_halves(w + PW * 2), zero_high = widen_halves(w + PW * 2 + VL * 2);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vf sum = splat(group_sums[r / VL][r % VL]);
            low[r] += (group_low[r] - zero_low * sum) * scale_low;
            high[r] += (group_high[r] - zero_high * sum) * scale_high;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store(c + r * c_stride, low[r]);
        store(c + r * c_stride + VL, high[r]);
    }
}

using Tile = void (*)(const Problem&, const int8_t*, const float*, const float*, const uint8_t*, const float*, float*,
                      long, Ahead);
template <int BITS, bool BOOK, int... R>
struct Tiles {
    static constexpr Tile table[] = {nullptr, tile<BITS, BOOK, R>...};
};
#if defined(__AVX512F__) || defined(__aarch64__)
template <int BITS, bool BOOK>
using AllTiles = Tiles<BITS, BOOK, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>;
#else
template <int BITS, bool BOOK>
using AllTiles = Tiles<BITS, BOOK, 1, 2, 3, 4, 5, 6>;
#endif

// A panel of 4 bits as one of 8.
template <bool BOOK>
void unpack_panel(const Problem& p, const uint8_t* w, uint8_t* to) {
    vi book{};
    if constexpr (BOOK)
        for (long i = 0; i < VL; i += 4) memcpy((char*)&book + i * 4, p.codebook, 16);
    for (long g = 0; g < p.groups(); g++) {
        memcpy(to, w, HEADER);
        to += HEADER;
        w += HEADER;
        for (long i = 0; i < p.group / 4; i++, w += VL * 4, to += VL * 8) {
            vi low, high;
            load_bytes<4>(w, &low, &high);
            if constexpr (BOOK) {
                low = look_up(book, low);
                high = look_up(book, high);
            }
            memcpy(to, &low, VL * 4);
            memcpy(to + VL * 4, &high, VL * 4);
        }
    }
}

template <int BITS, bool BOOK>
void multiply(const Problem& p, float* space, Team& team) {
    const Rows rows(p.m);
    const long parts = p.k / p.part, panels = ceil_div(p.n, PW);
    float *scales = space, *sums = scales + p.m * parts;
    int8_t* values = (int8_t*)(sums + p.m * parts + VL);
    team.share(rows.tiles * parts, [&](long begin, long end) {
        for (long unit = begin; unit < end; unit++) {
            const long t = unit / parts, part = unit % parts, first = rows.begin(t), height = rows.begin(t + 1) - first;
            for (long r = 0; r < height; r++) {
                const long at = first * parts + part * height + r;
                quantise_part(p, first + r, part, height, values + first * p.k + part * p.part * height + r * 4,
                              scales + at, sums + at);
            }
        }
    });
    team.barrier();
    const long block_tiles = most(1, BLOCK_BYTES / (p.k * MR)), row_blocks = ceil_div(rows.tiles, block_tiles);
    const long step = most(1, least(8, panels / (team.size * 8))), steps = ceil_div(panels, step);
    const long tasks = steps * row_blocks, panel_bytes = p.groups() * p.group_bytes();
    Problem eight = p;  // the same with its panels unpacked
    eight.bits = 8;
    static thread_local Scratch unpacked_space;
    alignas(64) float edge[MR * PW];  // a tile of the last panel, which may be narrower than PW
    team.each(tasks, [&](long task, long upcoming) {
        const long t0 = task % row_blocks * block_tiles, t1 = least(t0 + block_tiles, rows.tiles);
        const long n0 = task / row_blocks * step, n1 = least(n0 + step, panels);
        const bool unpacks = BITS == 4 && t1 - t0 >= UNPACK_TILES;
        const Tile* tiles = unpacks ? AllTiles<8, false>::table : AllTiles<BITS, BOOK>::table;
        for (long index = n0; index < n1; index++) {
            const uint8_t* w = p.w + index * panel_bytes;
            // The panel after this one is fetched in equal parts while the tiles of this one are multiplied.
            const long after = index + 1 < n1 ? index + 1 : upcoming < tasks ? upcoming / row_blocks * step : index;
            const long part = panel_bytes / (t1 - t0);
            if (unpacks) {
                uint8_t* wide = (uint8_t*)unpacked_space.get(p.groups() * eight.group_bytes() / 4);
                unpack_panel<BOOK>(p, w, wide);
                w = wide;
            }
            const long columns = least(PW, p.n - index * PW);
            for (long t = t0; t < t1; t++) {
                const long first = rows.begin(t), height = rows.begin(t + 1) - first;
                float* y = p.y + first * p.n + index * PW;
                const bool whole = columns == PW;
                const Ahead ahead{p.w + after * panel_bytes + (t - t0) * part, ceil_div(part * 4, p.k)};
                tiles[height](unpacks ? eight : p, values + first * p.k, scales + first * parts,
                              sums + first * parts, w, p.bias + index * PW, whole ? y : edge, whole ? p.n : PW, ahead);
                for (long r = 0; !whole && r < height; r++) memcpy(y + r * p.n, edge + r * PW, columns * 4);
            }
        }
    });
    team.barrier();
}

}  // namespace

// Bytes of the packed form of [n][k].
EXPORT int64_t mr_quantized_bytes(long n, long k, long group, int bits) {
    return ceil_div(n, PW) * (k / group) * (HEADER + group * PW * bits / 8);
}

// q [n][k] of 0 .. 2^bits - 1, scales and zeros [n][k / group] as the bits of float16 -> packed.
EXPORT void mr_quantized_pack(const uint8_t* q, const uint16_t* scales, const uint16_t* zeros, uint8_t* out, long n,
                              long k, long group, int bits, int threads) {
    const long groups = k / group, group_bytes = HEADER + group * PW * bits / 8;
    ask_for_huge_pages(out, ceil_div(n, PW) * groups * group_bytes);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long index = 0; index < ceil_div(n, PW); index++)
        for (long g = 0; g < groups; g++) {
            uint8_t* to = out + (index * groups + g) * group_bytes;
            memset(to, 0, group_bytes);  // outputs past n: scale 0
            for (long j = 0; j < least(PW, n - index * PW); j++) {
                const long row = index * PW + j;
                memcpy(to + j * 2, scales + row * groups + g, 2);
                memcpy(to + PW * 2 + j * 2, zeros + row * groups + g, 2);
                const uint8_t* from = q + row * k + g * group;
                for (long i = 0; i < group; i++) {
                    if (bits == 8)
                        to[HEADER + (i / 4 * PW + j) * 4 + i % 4] = from[i];
                    else
                        to[HEADER + (i / 4 * VL + j % VL) * 4 + i % 4] |= from[i] << (j / VL * 4);
                }
            }
        }
}

// scale * (q - zero)
void quantized_rows(const Matrix& matrix, const int64_t* tokens, float* y, long count) {
    const long k = matrix.in, group = matrix.group, bits = matrix.kind;
    const long groups = k / group, group_bytes = HEADER + group * PW * bits / 8;
    for (long t = 0; t < count; t++) {
        const long index = tokens[t] / PW, j = tokens[t] % PW;
        for (long g = 0; g < groups; g++) {
            const uint8_t* from = (const uint8_t*)matrix.weight + (index * groups + g) * group_bytes;
            _Float16 scale, zero;
            memcpy(&scale, from + j * 2, 2);
            memcpy(&zero, from + PW * 2 + j * 2, 2);
            for (long i = 0; i < group; i++) {
                int q = bits == 8 ? from[HEADER + (i / 4 * PW + j) * 4 + i % 4]
                                  : from[HEADER + (i / 4 * VL + j % VL) * 4 + i % 4] >> (j / VL * 4) & 15;
                if (matrix.codebook) q = matrix.codebook[q];
                const long column = g * group + i;
                y[t * k + (matrix.order ? matrix.order[column] : column)] = (float)scale * ((float)q - (float)zero);
            }
        }
    }
}

// Scales and sums of parts, and the quantised values.
long quantized_space(const Matrix& matrix, long rows) {
    return 2 * rows * (matrix.in / part_of(matrix.group)) + VL + ceil_div(rows * matrix.in, 4);
}

void quantized_product(const Matrix& matrix, const float* x, float* y, long rows, float* space, Team& team) {
    if (rows == 0) return;
    const int bits = (int)matrix.kind;
    const Problem p{x,    (const uint8_t*)matrix.weight, matrix.codebook, matrix.order, matrix.bias,          y, rows,
                    matrix.out, matrix.in, matrix.group, bits, part_of(matrix.group)};
    if (matrix.codebook)
        multiply<4, true>(p, space, team);
    else if (bits == 4)
        multiply<4, false>(p, space, team);
    else
        multiply<8, false>(p, space, team);
}
