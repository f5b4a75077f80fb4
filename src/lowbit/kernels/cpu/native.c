/* Weights of any format, decoded and multiplied while they are in registers and L1.

   A row of codes becomes fp32 levels through a table (one entry per byte of codes where a byte holds whole codes, one
   per code otherwise), is scaled group by group, and meets the activations. Nothing here knows a format's name: the
   caller describes planes, table and scales with `struct weight`.

   Compiled once per machine by the C compiler found there; without one, lowbit uses PyTorch ops instead. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define MAX_PLANES 3

struct weight {
    int64_t n, k;                 /* rows and columns of the weight */
    int64_t planes;               /* code planes, low bits first */
    const uint8_t *codes[MAX_PLANES];
    int64_t width[MAX_PLANES];    /* bits per code in each plane */
    int64_t stride[MAX_PLANES];   /* bytes per row */
    int64_t vector;               /* weights per code */
    int64_t by_byte;              /* 1: `table` has 256 entries of one byte's weights; 0: one entry per code */
    const float *table;           /* null: codes are signed bytes */
    int64_t float_shift;          /* 8-bit floats: a code's magnitude shifted by this is an fp16 ... */
    float float_scale;            /* ... which times this is the level; 0 where codes are no floats */
    const float *levels;          /* the level of each code, at least 16 entries, whether `table` is by byte or not */
    const void *scale;            /* (rows of tiles, columns of tiles) */
    int64_t scale_kind;           /* 0: fp32, 1: bf16, 2: one byte through scale_table */
    const float *scale_table;
    int64_t scale_n, scale_k;     /* weights per scale along each axis; 0: all of them */
    int64_t scale_columns;
    const float *outer;           /* multiplies the scale, or null */
    int64_t outer_k, outer_columns;
    const float *offset;          /* added to the scale, or null */
    const uint8_t *zero;          /* zero points, tiled like the scale, or null */
};

static inline float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Scale and zero point of each group of one row. */
static void row_scales(const struct weight *w, int64_t row, float *restrict scale, float *restrict zero) {
    int64_t columns = w->scale_columns, at = (w->scale_n ? row / w->scale_n : 0) * columns;
    for (int64_t c = 0; c < columns; c++)
        scale[c] = w->scale_kind == 0   ? ((const float *)w->scale)[at + c]
                   : w->scale_kind == 1 ? from_bf16(((const uint16_t *)w->scale)[at + c])
                                        : w->scale_table[((const uint8_t *)w->scale)[at + c]];
    if (w->outer && !w->outer_k)
        for (int64_t c = 0; c < columns; c++) scale[c] *= w->outer[0];
    if (w->outer && w->outer_k)
        for (int64_t c = 0, per = w->outer_k / w->scale_k; c < columns; c++)
            scale[c] *= w->outer[row * w->outer_columns + c / per];
    if (w->offset)
        for (int64_t c = 0; c < columns; c++) scale[c] += w->offset[0];
    for (int64_t c = 0; c < columns; c++) zero[c] = w->zero ? w->zero[at + c] : 0;
}

/* spread[width / 2][byte]: the 8 / width codes of a byte, one per byte of the word. */
static uint64_t spread[3][256];

__attribute__((constructor)) static void fill_spread(void) {
    for (int width = 1; width <= 4; width *= 2)
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0; i < 8 / width; i++)
                spread[width / 2][byte] |= (uint64_t)(byte >> (i * width) & ((1 << width) - 1)) << (8 * i);
}

/* Eight codes of `width` bits, one per byte of the result. */
static inline uint64_t eight_codes(const uint8_t *bytes, int width) {
    uint64_t eight = 0;
    for (int i = 0; i < width; i++) eight |= spread[width / 2][bytes[i]] << (i * 64 / width);
    return eight;
}

#ifdef __AVX512F__
/* Sixteen codes below 16, one per byte, to their entries of a 16-entry table. */
static inline void lookup16(__m128i codes, __m512 table, float *level) {
    _mm512_storeu_ps(level, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table));
}
typedef __m512 table16;
static inline table16 load_table16(const float *t) { return _mm512_loadu_ps(t); }
#elif defined(__AVX2__)
typedef struct { __m256 low, high; } table16;
static inline table16 load_table16(const float *t) { return (table16){_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)}; }
static inline void lookup16(__m128i codes, table16 table, float *level) {
    for (int half = 0; half < 2; half++, codes = _mm_srli_si128(codes, 8)) {
        __m256i i = _mm256_cvtepu8_epi32(codes);
        __m256 low = _mm256_permutevar8x32_ps(table.low, i), high = _mm256_permutevar8x32_ps(table.high, i);
        /* Bit 3 of the code picks the half of the table; blendv looks at the sign bit. */
        __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
        _mm256_storeu_ps(level + 8 * half, _mm256_blendv_ps(low, high, pick));
    }
}
#endif

#ifdef __AVX2__
/* 4-bit codes, 32 at a time; returns how many bytes were done. */
static int64_t nibbles(const uint8_t *p, int64_t bytes, const float *table, float *restrict level) {
    table16 t = load_table16(table);
    __m128i mask = _mm_set1_epi8(15);
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16) {
        __m128i b = _mm_loadu_si128((const __m128i *)(p + i));
        __m128i low = _mm_and_si128(b, mask), high = _mm_and_si128(_mm_srli_epi16(b, 4), mask);
        lookup16(_mm_unpacklo_epi8(low, high), t, level + 2 * i);
        lookup16(_mm_unpackhi_epi8(low, high), t, level + 2 * i + 16);
    }
    return i;
}
#endif

#ifdef __F16C__
/* 8-bit floats; an fp16 holds each of them up to a power of two, subnormals included. Writes up to 7 levels more. */
static void floats(const uint8_t *p, int64_t bytes, int shift, float scale, float *restrict level) {
    __m128i sign = _mm_set1_epi16(0x80), magnitude = _mm_set1_epi16(0x7f);
    __m256 power = _mm256_set1_ps(scale);
    for (int64_t i = 0; i < bytes; i += 8) {
        uint64_t eight = 0;
        if (i + 8 <= bytes) memcpy(&eight, p + i, 8);
        else for (int64_t j = i; j < bytes; j++) eight |= (uint64_t)p[j] << (8 * (j - i));
        __m128i c = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)eight));
        __m128i half = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(c, sign), 8),
                                    _mm_slli_epi16(_mm_and_si128(c, magnitude), shift));
        _mm256_storeu_ps(level + i, _mm256_mul_ps(_mm256_cvtph_ps(half), power));
    }
}
#endif

/* Codes whose bits lie in planes of `a`, `b` and `c` bits (0: no such plane), low bits first, eight at a time. */
static inline __attribute__((always_inline)) void split(int a, int b, int c, const uint8_t **p, int64_t eights,
                                                        int64_t vector, const float *t, float *restrict level) {
    for (int64_t e = 0; e < eights; e++) {
        uint64_t eight = eight_codes(p[0] + e * a, a) | eight_codes(p[1] + e * b, b) << a;
        if (c) eight |= eight_codes(p[2] + e * c, c) << (a + b);
        if (vector > 1) {
            for (int i = 0; i < 8; i++)
                for (int64_t v = 0; v < vector; v++) level[(e * 8 + i) * vector + v] = t[(uint8_t)(eight >> 8 * i) * vector + v];
            continue;
        }
#ifdef __AVX2__
        __m256i i = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)eight));
        __m256 v = a + b + c == 3 ? _mm256_permutevar8x32_ps(_mm256_loadu_ps(t), i) : _mm256_i32gather_ps(t, i, 4);
        _mm256_storeu_ps(level + 8 * e, v);
#else
        for (int i = 0; i < 8; i++) level[8 * e + i] = t[(uint8_t)(eight >> 8 * i)];
#endif
    }
}

static void split_codes(const struct weight *w, const uint8_t **p, int64_t eights, const float *t, float *level) {
    if (w->planes == 3) split(4, 2, 1, p, eights, w->vector, t, level);
    else if (w->width[0] == 2) split(2, 1, 0, p, eights, w->vector, t, level);
    else if (w->width[1] == 1) split(4, 1, 0, p, eights, w->vector, t, level);
    else split(4, 2, 0, p, eights, w->vector, t, level);
}

/* Levels of one row; `level` has room for k rounded up to 16. */
static void row_levels(const struct weight *w, int64_t row, float *restrict level) {
    const uint8_t *p = w->codes[0] + row * w->stride[0];
    const float *t = w->table;
    if (w->by_byte) {
        int64_t bytes = w->stride[0];
        switch (8 / w->width[0] * w->vector) {
        case 1:
#ifdef __F16C__
            if (w->float_scale != 0) {
                floats(p, bytes, (int)w->float_shift, w->float_scale, level);
                return;
            }
#endif
            if (t) for (int64_t i = 0; i < bytes; i++) level[i] = t[p[i]];
            else for (int64_t i = 0; i < bytes; i++) level[i] = (int8_t)p[i];
            return;
        case 2: {
            int64_t i = 0;
#ifdef __AVX2__
            if (w->width[0] == 4) i = nibbles(p, bytes, w->levels, level);
#endif
            for (; i < bytes; i++) memcpy(level + 2 * i, t + 2 * p[i], 8);
            return;
        }
        case 4:
            for (int64_t i = 0; i < bytes; i++) memcpy(level + 4 * i, t + 4 * p[i], 16);
            return;
        default:
            for (int64_t i = 0; i < bytes; i++) memcpy(level + 8 * i, t + 8 * p[i], 32);
            return;
        }
    }
    const uint8_t *planes[MAX_PLANES];
    for (int64_t q = 0; q < w->planes; q++) planes[q] = w->codes[q] + row * w->stride[q];
    int64_t codes = (w->k + w->vector - 1) / w->vector, whole = codes / 8;
    split_codes(w, planes, whole, t, level);
    if (codes % 8) { /* the last bytes of the row, with zeros after them */
        uint8_t rest[MAX_PLANES][8] = {{0}};
        float last[8 * 8];
        for (int64_t q = 0; q < w->planes; q++)
            for (int64_t i = whole * w->width[q]; i < w->stride[q]; i++) rest[q][i - whole * w->width[q]] = planes[q][i];
        for (int64_t q = 0; q < w->planes; q++) planes[q] = rest[q];
        split_codes(w, planes, 1, t, last);
        for (int64_t i = whole * 8 * w->vector; i < w->k; i++) level[i] = last[i - whole * 8 * w->vector];
    }
}

/* Scratch of one thread: levels, scales and zero points of a row, then sums of the activations. */
static inline float *scales_of(const struct weight *w, float *scratch) { return scratch + w->k + 16; }

static inline int64_t group_of(const struct weight *w) { return w->scale_k ? w->scale_k : w->k; }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* One row of weights into the start of `scratch`. */
static void decode_row(const struct weight *w, int64_t row, float *scratch) {
    float *restrict level = scratch, *scale = scales_of(w, scratch), *zero = scale + w->scale_columns;
    row_levels(w, row, level);
    row_scales(w, row, scale, zero);
    int64_t group = group_of(w);
    for (int64_t c = 0, a = 0; a < w->k; c++, a += group) {
        float s = scale[c], z = zero[c];
        for (int64_t i = a; i < least(a + group, w->k); i++) level[i] = (level[i] - z) * s;
    }
}

typedef float v16 __attribute__((vector_size(64)));

static inline v16 load16(const float *p) {
    v16 v;
    memcpy(&v, p, 64);
    return v;
}

/* What decodes sixteen codes into registers. */
enum fused { NOT_FUSED, BITS_1, BITS_2, BITS_3, BITS_4, SIGNED_BYTES, FLOAT_BYTES };

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
static enum fused fused_kind(const struct weight *w) {
    if (w->vector != 1 || (group_of(w) % 16 && w->scale_k)) return NOT_FUSED;
    if (!w->table) return SIGNED_BYTES;
    if (w->float_scale != 0) return FLOAT_BYTES;
    if (w->planes == 1) return w->width[0] == 1 ? BITS_1 : w->width[0] == 2 ? BITS_2 : w->width[0] == 4 ? BITS_4 : NOT_FUSED;
    return w->planes == 2 && w->width[0] == 2 ? BITS_3 : NOT_FUSED;
}

#ifdef __AVX512F__
typedef __m512 sixteen;
static inline sixteen none(void) { return _mm512_setzero_ps(); }
static inline sixteen looked_up(__m128i codes, table16 t) { return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), t); }
static inline sixteen from_halves(__m256i halves) { return _mm512_cvtph_ps(halves); }
static inline sixteen from_bytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
static inline sixteen add_product(sixteen sum, sixteen v, const float *x) { return _mm512_fmadd_ps(v, _mm512_loadu_ps(x), sum); }
static inline sixteen add_scaled(sixteen total, sixteen sum, float s) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(s), total); }
static inline float added(sixteen v) { return _mm512_reduce_add_ps(v); }
#else
typedef struct { __m256 a, b; } sixteen;
static inline sixteen none(void) { return (sixteen){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline __m256 eight_looked_up(__m128i codes, table16 t) {
    __m256i i = _mm256_cvtepu8_epi32(codes);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
static inline sixteen looked_up(__m128i codes, table16 t) {
    return (sixteen){eight_looked_up(codes, t), eight_looked_up(_mm_srli_si128(codes, 8), t)};
}
static inline sixteen from_halves(__m256i halves) {
    return (sixteen){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
static inline sixteen from_bytes(__m128i b) {
    return (sixteen){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
                     _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
static inline sixteen add_product(sixteen sum, sixteen v, const float *x) {
    return (sixteen){_mm256_fmadd_ps(v.a, _mm256_loadu_ps(x), sum.a), _mm256_fmadd_ps(v.b, _mm256_loadu_ps(x + 8), sum.b)};
}
static inline sixteen add_scaled(sixteen total, sixteen sum, float s) {
    __m256 v = _mm256_set1_ps(s);
    return (sixteen){_mm256_fmadd_ps(sum.a, v, total.a), _mm256_fmadd_ps(sum.b, v, total.b)};
}
static inline float added(sixteen v) {
    float all[8], sum = 0;
    _mm256_storeu_ps(all, _mm256_add_ps(v.a, v.b));
    for (int i = 0; i < 8; i++) sum += all[i];
    return sum;
}
#endif

/* A row that is decoded in registers: where its codes lie, what makes levels of them, and its scales and zeros. From
   `whole` on, where there are no sixteen any more, its levels are in `level`. */
struct reading {
    const uint8_t *p[2];
    table16 table;
    __m128i shift;
    int64_t group, whole;
    float *level, *scale, *zero;
};

static inline __attribute__((always_inline)) struct reading begin_row(enum fused kind, const struct weight *w, int64_t row,
                                                                      float *scratch) {
    float *scale = scales_of(w, scratch);
    struct reading r = {
        .p = {w->codes[0] + row * w->stride[0], w->planes > 1 ? w->codes[1] + row * w->stride[1] : 0},
        /* without tables never used, but 16 floats are read */
        .table = load_table16(kind != SIGNED_BYTES && kind != FLOAT_BYTES ? w->levels : scratch),
        .shift = _mm_cvtsi64_si128(w->float_shift),
        .group = group_of(w), .whole = w->k / 16 * 16,
        .level = scratch, .scale = scale, .zero = scale + w->scale_columns,
    };
    if (r.whole < w->k) row_levels(w, row, r.level);
    row_scales(w, row, r.scale, r.zero);
    return r;
}

/* Levels of the codes i to i + 15; those of floats lack the factor float_scale. */
static inline __attribute__((always_inline)) sixteen sixteen_levels(enum fused kind, const struct reading *r, int64_t i) {
    const uint8_t *const *p = r->p;
    if (kind == BITS_4) {
        __m128i b = _mm_loadl_epi64((const __m128i *)(p[0] + i / 2)), mask = _mm_set1_epi8(15);
        return looked_up(_mm_unpacklo_epi8(_mm_and_si128(b, mask), _mm_and_si128(_mm_srli_epi16(b, 4), mask)), r->table);
    }
    if (kind == SIGNED_BYTES) return from_bytes(_mm_loadu_si128((const __m128i *)(p[0] + i)));
    if (kind == FLOAT_BYTES) {
        __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(p[0] + i)));
        __m256i sign = _mm256_slli_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0x80)), 8);
        return from_halves(_mm256_or_si256(sign, _mm256_sll_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0x7f)), r->shift)));
    }
    int width = kind == BITS_1 ? 1 : 2;
    uint64_t low = eight_codes(p[0] + i * width / 8, width), high = eight_codes(p[0] + i * width / 8 + width, width);
    if (kind == BITS_3) {
        low |= eight_codes(p[1] + i / 8, 1) << 2;
        high |= eight_codes(p[1] + i / 8 + 1, 1) << 2;
    }
    return looked_up(_mm_set_epi64x((long long)high, (long long)low), r->table);
}

/* The product of a row with one token, as the sum over groups of scale * (sum level * x - zero * sum x), levels never
   leaving the registers; `sums` has sum x. */
static inline __attribute__((always_inline)) float fused_dot(enum fused kind, const struct weight *w, int64_t row,
                                                             const float *restrict x, float *scratch, const float *sums) {
    struct reading r = begin_row(kind, w, row, scratch);
    float factor = kind == FLOAT_BYTES ? w->float_scale : 1, rest = 0;
    sixteen total = none();
    for (int64_t c = 0, a = 0; a < w->k; c++, a += r.group) {
        int64_t i = a, b = least(a + r.group, w->k), end = least(b, r.whole);
        sixteen sum = none();
        if (kind == BITS_4)
            for (; i + 32 <= end; i += 32) { /* two vectors from one load */
                __m128i bytes = _mm_loadu_si128((const __m128i *)(r.p[0] + i / 2)), mask = _mm_set1_epi8(15);
                __m128i even = _mm_and_si128(bytes, mask), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
                sum = add_product(sum, looked_up(_mm_unpacklo_epi8(even, odd), r.table), x + i);
                sum = add_product(sum, looked_up(_mm_unpackhi_epi8(even, odd), r.table), x + i + 16);
            }
        for (; i < end; i += 16) sum = add_product(sum, sixteen_levels(kind, &r, i), x + i);
        total = add_scaled(total, sum, r.scale[c] * factor);
        float tail = 0;
        for (; i < b; i++) tail += r.level[i] * x[i];
        rest += r.scale[c] * (tail - r.zero[c] * sums[c]);
    }
    return added(total) + rest;
}

static float fused_row(enum fused kind, const struct weight *w, int64_t row, const float *x, float *scratch, const float *sums) {
    switch (kind) {
    case BITS_1: return fused_dot(BITS_1, w, row, x, scratch, sums);
    case BITS_2: return fused_dot(BITS_2, w, row, x, scratch, sums);
    case BITS_3: return fused_dot(BITS_3, w, row, x, scratch, sums);
    case BITS_4: return fused_dot(BITS_4, w, row, x, scratch, sums);
    case SIGNED_BYTES: return fused_dot(SIGNED_BYTES, w, row, x, scratch, sums);
    default: return fused_dot(FLOAT_BYTES, w, row, x, scratch, sums);
    }
}
#else
static enum fused fused_kind(const struct weight *w) { return (void)w, NOT_FUSED; }
static float fused_row(enum fused kind, const struct weight *w, int64_t row, const float *x, float *scratch, const float *sums) {
    return (void)kind, (void)w, (void)row, (void)x, (void)scratch, (void)sums, 0;
}
#endif

/* The product of one row with one token, weights scaled on the way. */
static float row_dot(const struct weight *w, int64_t row, const float *restrict x, float *scratch) {
    float *restrict level = scratch, *scale = scales_of(w, scratch), *zero = scale + w->scale_columns, total = 0;
    row_levels(w, row, level);
    row_scales(w, row, scale, zero);
    int64_t group = group_of(w);
    v16 sum = {0};
    for (int64_t c = 0, a = 0; a < w->k; c++, a += group) {
        float s = scale[c], z = zero[c];
        int64_t i = a, b = least(a + group, w->k);
        for (; i + 16 <= b; i += 16) sum += (load16(level + i) - z) * (load16(x + i) * s);
        for (; i < b; i++) total += (level[i] - z) * (x[i] * s);
    }
    for (int i = 0; i < 16; i++) total += sum[i];
    return total;
}

static float dot(const float *restrict a, const float *restrict b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Sum of the activations of each group. */
static void group_sums(const struct weight *w, const float *x, float *sums) {
    int64_t group = group_of(w);
    for (int64_t c = 0, a = 0; a < w->k; c++, a += group) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = a; i < least(a + group, w->k); i++) sum += x[i];
        sums[c] = sum;
    }
}

/* y (m, n) = x (m, k) W^T on `threads` threads, each with `size` floats of scratch. */
void lowbit_linear(const struct weight *w, int64_t m, const float *x, float *y, float *scratch, int64_t size,
                   int64_t threads) {
    int64_t step = (w->n + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t t = 0; t < threads; t++) {
        float *mine = scratch + t * size, *sums = scales_of(w, mine) + 2 * w->scale_columns;
        enum fused kind = m == 1 ? fused_kind(w) : NOT_FUSED;
        if (kind != NOT_FUSED && w->zero) group_sums(w, x, sums);
        if (kind != NOT_FUSED && !w->zero) memset(sums, 0, (size_t)w->scale_columns * 4);
        for (int64_t row = t * step; row < least((t + 1) * step, w->n); row++) {
            if (m == 1) {
                y[row] = kind != NOT_FUSED ? fused_row(kind, w, row, x, mine, sums) : row_dot(w, row, x, mine);
                continue;
            }
            decode_row(w, row, mine);
            for (int64_t i = 0; i < m; i++) y[i * w->n + row] = dot(x + i * w->k, mine, w->k);
        }
    }
}

/* `count` floats rounded to nearest even bf16. */
static void to_bf16(const float *restrict in, uint16_t *restrict out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, in + i, 4);
        out[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

#ifdef __AVX512F__
/* `decode_row` and `to_bf16` with levels in registers. */
static inline __attribute__((always_inline)) void fused_bf16(enum fused kind, const struct weight *w, int64_t row, float *scratch,
                                                             uint16_t *restrict out) {
    struct reading r = begin_row(kind, w, row, scratch);
    __m512 factor = _mm512_set1_ps(w->float_scale);
    __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    for (int64_t c = 0, a = 0; a < w->k; c++, a += r.group) {
        int64_t i = a, b = least(a + r.group, w->k), end = least(b, r.whole);
        __m512 s = _mm512_set1_ps(r.scale[c]), z = _mm512_set1_ps(r.zero[c]);
        for (; i < end; i += 16) {
            __m512 v = sixteen_levels(kind, &r, i);
            if (kind == FLOAT_BYTES) v = _mm512_mul_ps(v, factor);
            __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_sub_ps(v, z), s));
            __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
            bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(half, odd)), 16);
            _mm256_storeu_si256((__m256i *)(out + i), _mm512_cvtepi32_epi16(bits));
        }
        for (; i < b; i++) r.level[i] = (r.level[i] - r.zero[c]) * r.scale[c];
    }
    to_bf16(r.level + r.whole, out + r.whole, w->k - r.whole);
}
#endif

/* One row of weights to `out`. */
static void bf16_row(enum fused kind, const struct weight *w, int64_t row, float *scratch, uint16_t *out) {
#ifdef __AVX512F__
    switch (kind) {
    case BITS_1: fused_bf16(BITS_1, w, row, scratch, out); return;
    case BITS_2: fused_bf16(BITS_2, w, row, scratch, out); return;
    case BITS_3: fused_bf16(BITS_3, w, row, scratch, out); return;
    case BITS_4: fused_bf16(BITS_4, w, row, scratch, out); return;
    case SIGNED_BYTES: fused_bf16(SIGNED_BYTES, w, row, scratch, out); return;
    case FLOAT_BYTES: fused_bf16(FLOAT_BYTES, w, row, scratch, out); return;
    default: break;
    }
#endif
    (void)kind;
    decode_row(w, row, scratch);
    to_bf16(scratch, out, w->k);
}

/* Rows [start, stop) of the weight to `out`, whose rows are k apart, in bf16 or fp32. */
void lowbit_dequantize(const struct weight *w, int64_t start, int64_t stop, void *out, int64_t bf16, float *scratch,
                       int64_t size, int64_t threads) {
    int64_t step = (stop - start + threads - 1) / threads;
    enum fused kind = fused_kind(w);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t t = 0; t < threads; t++) {
        float *mine = scratch + t * size;
        for (int64_t row = start + t * step; row < least(start + (t + 1) * step, stop); row++) {
            int64_t at = (row - start) * w->k;
            if (bf16) {
                bf16_row(kind, w, row, mine, (uint16_t *)out + at);
                continue;
            }
            decode_row(w, row, mine);
            memcpy((float *)out + at, mine, (size_t)w->k * 4);
        }
    }
}

/* Sums and differences of the pairs at distance h of n numbers. */
static inline __attribute__((always_inline)) void butterflies(float *restrict v, int64_t n, int64_t h) {
    for (int64_t i = 0; i < n; i += 2 * h)
        for (int64_t j = i; j < i + h; j++) {
            float a = v[j], b = v[j + h];
            v[j] = a + b;
            v[j + h] = a - b;
        }
}

/* The Hadamard transform of n numbers, a power of two, times sqrt(n). Distances that are shorter than a register are
   constants, so that the compiler makes shuffles of them. */
static void hadamard_row(float *v, int64_t n) {
    if (n > 1) butterflies(v, n, 1);
    if (n > 2) butterflies(v, n, 2);
    if (n > 4) butterflies(v, n, 4);
    if (n > 8) butterflies(v, n, 8);
    for (int64_t h = 16; h < n; h *= 2) butterflies(v, n, h);
}

/* One row of odd * two numbers, in place: the transform of every `two`, then mixing (odd, odd) of these. */
static void hadamard_mixed(float *v, float *restrict mixed, int64_t odd, int64_t two, const float *mixing) {
    for (int64_t i = 0; i < odd; i++) hadamard_row(v + i * two, two);
    if (odd == 1) return;
    memset(mixed, 0, (size_t)(odd * two) * 4);
    for (int64_t i = 0; i < odd; i++)
        for (int64_t j = 0; j < odd; j++)
            for (int64_t c = 0; c < two; c++) mixed[i * two + c] += mixing[i * odd + j] * v[j * two + c];
    memcpy(v, mixed, (size_t)(odd * two) * 4);
}

/* Rows of x (m, odd * two), fp32 or bf16, times signs (or null) before or, inverse, behind the transform. */
void lowbit_hadamard(const void *x, int64_t bf16, int64_t m, int64_t odd, int64_t two, const float *mixing, const int8_t *signs,
                     int64_t inverse, float scale, void *out, float *scratch, int64_t threads) {
    int64_t k = odd * two, step = (m + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (m * k > 16384)
    for (int64_t t = 0; t < threads; t++) {
        float *v = scratch + t * 2 * k;
        for (int64_t row = t * step; row < least((t + 1) * step, m); row++) {
            if (bf16) for (int64_t i = 0; i < k; i++) v[i] = from_bf16(((const uint16_t *)x)[row * k + i]);
            else memcpy(v, (const float *)x + row * k, (size_t)k * 4);
            if (signs && !inverse) for (int64_t i = 0; i < k; i++) v[i] *= signs[i];
            hadamard_mixed(v, v + k, odd, two, mixing);
            for (int64_t i = 0; i < k; i++) v[i] *= scale;
            if (signs && inverse) for (int64_t i = 0; i < k; i++) v[i] *= signs[i];
            if (bf16) to_bf16(v, (uint16_t *)out + row * k, k);
            else memcpy((float *)out + row * k, v, (size_t)k * 4);
        }
    }
}

static inline float element(const void *x, int64_t bf16, int64_t i) {
    return bf16 ? from_bf16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

/* What a number divided by its row's scale becomes. */
enum operand { SIGNED_BYTE, INTEGER_LEVEL, E4M3_LEVEL };

/* To the nearest multiple of `unit`, halves to even, below 2^22 units: a sum with 1.5 * 2^23 units has no room for less. */
static inline float to_multiple(float v, float unit) { return (v + 12582912.0f * unit) - 12582912.0f * unit; }

/* To the nearest float8_e4m3fn, halves to even, magnitudes up to 448: four significant bits, and multiples of 2^-9. */
static inline float to_e4m3(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    bits = (bits + 0x7ffff + (bits >> 20 & 1)) & ~0xfffffu;
    float normal, small = to_multiple(v, 0x1p-9f);
    memcpy(&normal, &bits, 4);
    float level = v < 0x1p-6f && v > -0x1p-6f ? small : normal;
    return level > 448 ? 448 : level < -448 ? -448 : level;
}

/* One row of k numbers with a scale, amax / top; 1 if that would be no ordinary number. */
static inline __attribute__((always_inline)) int64_t quantize_row(enum operand kind, const void *x, int64_t bf16, int64_t k,
                                                                  float top, void *out, float *restrict scale) {
    uint32_t most = 0; /* magnitudes are ordered as integers, NaN and Inf above the rest */
    for (int64_t i = 0; i < k; i++) {
        float v = element(x, bf16, i);
        uint32_t bits;
        memcpy(&bits, &v, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float amax;
    memcpy(&amax, &most, 4);
    float s = most ? amax / top : 1;
    if (most >= 0x7f800000 || !(s > 1e-30f && s < 1e30f)) return 1;
    int8_t *restrict codes = out;
    float *restrict levels = out;
    for (int64_t i = 0; i < k; i++) {
        float v = element(x, bf16, i) / s;
        if (kind == E4M3_LEVEL) {
            levels[i] = to_e4m3(v);
            continue;
        }
        v = to_multiple(v, 1);
        v = v > 127 ? 127 : v < -128 ? -128 : v;
        if (kind == SIGNED_BYTE) codes[i] = (int8_t)(int32_t)v;
        else levels[i] = v;
    }
    *scale = s;
    return 0;
}

static int64_t quantize_any(enum operand kind, const void *x, int64_t bf16, int64_t k, float top, void *out, float *scale) {
    if (kind == SIGNED_BYTE) return bf16 ? quantize_row(SIGNED_BYTE, x, 1, k, top, out, scale) : quantize_row(SIGNED_BYTE, x, 0, k, top, out, scale);
    if (kind == E4M3_LEVEL) return bf16 ? quantize_row(E4M3_LEVEL, x, 1, k, top, out, scale) : quantize_row(E4M3_LEVEL, x, 0, k, top, out, scale);
    return bf16 ? quantize_row(INTEGER_LEVEL, x, 1, k, top, out, scale) : quantize_row(INTEGER_LEVEL, x, 0, k, top, out, scale);
}

/* Rows of x (m, k), fp32 or bf16, to signed bytes or fp32 levels; how many rows are left to somebody else. */
int64_t lowbit_quantize_rows(int64_t kind, const void *x, int64_t bf16, int64_t m, int64_t k, float top, void *out, float *scale,
                             int64_t threads) {
    int64_t left = 0, in_size = bf16 ? 2 : 4, out_size = kind == SIGNED_BYTE ? 1 : 4;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : left) if (m * k > 16384)
    for (int64_t row = 0; row < m; row++)
        left += quantize_any((enum operand)kind, (const char *)x + row * k * in_size, bf16, k, top,
                             (char *)out + row * k * out_size, scale + row);
    return left;
}
