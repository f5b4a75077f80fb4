// Activations (M, K) in bf16 or fp16 to 8-bit codes, or to their levels in bf16, and fp32 scales, in one pass: numbers
// stay in registers until their scale is known. Every step is the definition's own arithmetic in fp32.
//
// A thread holds CHUNKS pieces of 8 numbers. Rows have a block each, or PARTS blocks for few tokens: each of them reads
// all of the row, finds the same scale and converts its own part. Groups, and numbers under a given scale, are one run of
// pieces through all rows, which blocks cut anywhere between groups.
//
// Compiled with -D FP16 (the input), KIND, BITS (of integers), ZERO (asymmetric), LEVELS (bf16 comes out), STATIC (the
// scale is given), SCALE_TYPE, GROUP (numbers per scale along K; 0: a row), WHOLE (groups fill rows), CHUNKS, PARTS.

#define INT 0
#define E4M3 1
#define E5M2 2

#define SCALE_FP32 0
#define SCALE_BF16 1
#define SCALE_FP16 2

typedef unsigned int u32;
typedef unsigned short u16;

#include "early.cuh"

constexpr bool BY_ROW = GROUP == 0 && !STATIC;
constexpr int THREADS = BY_ROW ? 1024 : 128;  // of a block: at most; exactly
constexpr int LANES = GROUP ? GROUP / 8 : 1;  // that share a scale
constexpr int OWN = CHUNKS / PARTS;           // pieces that a thread converts
constexpr float LOW = ZERO ? 0 : -(1 << (BITS - 1)), HIGH = ZERO ? (1 << BITS) - 1 : (1 << (BITS - 1)) - 1;
// What the largest magnitude is divided by.
constexpr float TOP = KIND == E4M3 ? 448 : KIND == E5M2 ? 57344 : ZERO ? HIGH : HIGH + 0.5f;
constexpr float SCALE_MIN = SCALE_TYPE == SCALE_FP16 ? 0x1p-14f : 0x1p-126f;
constexpr float SCALE_MAX = SCALE_TYPE == SCALE_FP16 ? 65504 : SCALE_TYPE == SCALE_BF16 ? 0x1.fep127f : 0x1.fffffep127f;
constexpr u32 INFINITE = 0x7f800000, LARGEST = 0x7e800000;  // 2^126: formats.base.LARGEST_WEIGHT

#if FP16
#define PAIR "f16x2"
#else
#define PAIR "bf16x2"
#endif

struct Arguments {
    const uint4 *x;
    void *operand;
    float *scales;
    const float *given;  // the scale, if STATIC
    int m, k;
};

// What numbers are divided by, its reciprocal, and the zero point.
struct Scale {
    float by, inverse, zero;
};

// Of each of two numbers; a NaN stays.
__device__ __forceinline__ u32 max2(u32 a, u32 b) {
    u32 d;
    asm("max.NaN." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ float fp16_value(u16 h) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
    return v;
}

__device__ __forceinline__ float low_half(u32 w) { return FP16 ? fp16_value(w) : __uint_as_float(w << 16); }
__device__ __forceinline__ float high_half(u32 w) { return FP16 ? fp16_value(w >> 16) : __uint_as_float(w & 0xffff0000); }

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// Magnitudes of eight numbers, two and two; of their negatives alone or of themselves alone where SIGN is -1 or 1.
template <int SIGN>
__device__ __forceinline__ u32 largest2(uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        most = max2(most, SIGN == 0 ? words[i] & 0x7fff7fff : SIGN < 0 ? words[i] ^ 0x80008000 : words[i]);
    return most;
}

// The larger of two numbers that are not negative, as bits of fp32: ordered like them, with Inf and then NaN on top.
__device__ __forceinline__ u32 larger(u32 pair) {
    const u32 high = pair >> 16, low = pair & 0xffff;
    return __float_as_uint(low_half(high > low ? high : low));
}

__device__ __forceinline__ float bounded(u32 bits) { return __uint_as_float(bits < INFINITE ? min(bits, LARGEST) : bits); }

// formats.base.safe_scale, and the rounding to the stored dtype.
__device__ __forceinline__ float safe(float scale) {
    float kept = scale < SCALE_MIN ? SCALE_MIN : scale;
    kept = kept > SCALE_MAX ? SCALE_MAX : kept;
    if (scale == __uint_as_float(INFINITE)) kept = scale;
    if (scale == 0) kept = 1;
#if SCALE_TYPE == SCALE_BF16
    kept = __uint_as_float(bf16_pair(kept, 0) << 16);
#elif SCALE_TYPE == SCALE_FP16
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(kept));
    kept = fp16_value(half);
#endif
    return kept;
}

// Format.choose_params of the largest magnitude; of the lowest number's and the highest's, if ZERO.
__device__ __forceinline__ Scale scale_of(u32 most, u32 lowest) {
    Scale s = {};
    if (ZERO) {
        s.by = safe(__fadd_rn(__fdiv_rn(bounded(most), TOP), __fdiv_rn(bounded(lowest), TOP)));
        s.zero = fminf(fmaxf(rintf(__fdiv_rn(bounded(lowest), s.by)), 0), HIGH);
    } else {
        s.by = safe(__fdiv_rn(bounded(most), TOP));
    }
    s.inverse = __frcp_rn(s.by);
    return s;
}

// Whether quotients need no division, and codes of integers no clamp: `act_rules.divided` says why.
__device__ __forceinline__ bool is_ordinary(Scale s) {
    return !STATIC && SCALE_TYPE != SCALE_FP16 && s.by > 0x1p-80f && s.by < 0x1p90f;
}

template <bool ORDINARY>
__device__ __forceinline__ float quotient(float v, Scale s) {
    if (!ORDINARY) return __fdiv_rn(v, s.by);
    float q = __fmul_rn(v, s.inverse);
    q = __fmaf_rn(__fmaf_rn(-q, s.by, v), s.inverse, q);
    return __fmaf_rn(__fmaf_rn(-q, s.by, v), s.inverse, q);
}

// A NaN stays in levels; codes of integers have none, and it becomes the lowest.
__device__ __forceinline__ float clamp(float v, float low, float high) {
#if LEVELS
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
    return v;
#else
    return fminf(fmaxf(v, low), high);
#endif
}

// Beside the nearest integer, ties to even, these bits are the integer's.
constexpr float MAGIC = 12582912;
constexpr int MAGIC_BITS = 0x4b400000;

__device__ __forceinline__ float level(float q, float zero) {
    // Rounded, moved, clamped: in this order, as in the definition. 2^21 is beyond every code.
    q = ZERO ? clamp(q, -0x1p21f, 0x1p21f) : clamp(q, LOW, HIGH);
    q = __fsub_rn(__fadd_rn(q, MAGIC), MAGIC);
    return ZERO ? __fsub_rn(clamp(__fadd_rn(q, zero), LOW, HIGH), zero) : q;
}

#if KIND != INT
// Rounded to nearest even; what is too large becomes the largest.
__device__ __forceinline__ u32 codes2(float low, float high) {
    u16 d;
#if KIND == E4M3
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
#else
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
#endif
    return d;
}

__device__ __forceinline__ u32 levels2(u16 codes) {
    u32 d;
#if KIND == E4M3
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(codes));
#else
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(d) : "h"(codes));
#endif
    return bf16_pair(fp16_value(d), fp16_value(d >> 16));
}
#else
__device__ __forceinline__ u32 codes2(float low, float high) {
    const int a = __float_as_int(__fadd_rn(low, MAGIC)) - MAGIC_BITS;
    const int b = __float_as_int(__fadd_rn(high, MAGIC)) - MAGIC_BITS;
    u32 d;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(d) : "r"(b), "r"(a));
    return d;
}
#endif

// Two numbers to two operands.
template <bool ORDINARY>
__device__ __forceinline__ u32 operands2(u32 word, Scale s) {
    float a = quotient<ORDINARY>(low_half(word), s), b = quotient<ORDINARY>(high_half(word), s);
#if KIND == INT && LEVELS
    return bf16_pair(level(a, s.zero), level(b, s.zero));
#elif LEVELS
    return levels2(codes2(a, b)) | word & 0x80008000;  // the sign of a zero, which corrections lose
#else
    if (KIND == INT && !ORDINARY) a = clamp(a, LOW, HIGH), b = clamp(b, LOW, HIGH);
    return codes2(a, b);
#endif
}

// Bits 15 and 31 of two words as the signs of four codes.
__device__ __forceinline__ u32 signs(u32 a, u32 b) { return __byte_perm(a, b, 0x7531) & 0x80808080; }

template <bool ORDINARY>
__device__ __forceinline__ void write(const Arguments &a, int at, uint4 v, Scale s) {
    const u32 x = operands2<ORDINARY>(v.x, s), y = operands2<ORDINARY>(v.y, s);
    const u32 z = operands2<ORDINARY>(v.z, s), w = operands2<ORDINARY>(v.w, s);
    if (LEVELS) {
        ((uint4 *)a.operand)[at] = make_uint4(x, y, z, w);
    } else {
        uint2 codes = make_uint2(x | y << 16, z | w << 16);
        // Corrections lose the sign of a zero.
        if (KIND != INT) codes.x |= signs(v.x, v.y), codes.y |= signs(v.z, v.w);
        ((uint2 *)a.operand)[at] = codes;
    }
}

// The first OWN pieces, where `at` is not negative. There is one branch for all, since almost every scale is ordinary.
__device__ __forceinline__ void write_all(const Arguments &a, const int (&at)[CHUNKS], const uint4 (&v)[CHUNKS],
                                          const Scale (&s)[CHUNKS], bool ordinary) {
    if (ordinary) {
#pragma unroll
        for (int j = 0; j < OWN; j++)
            if (at[j] >= 0) write<true>(a, at[j], v[j], s[j]);
    } else {
#pragma unroll
        for (int j = 0; j < OWN; j++)
            if (at[j] >= 0) write<false>(a, at[j], v[j], s[j]);
    }
}

// Of the numbers of a block, as bits of fp32.
__device__ __forceinline__ u32 largest_of_block(u32 pair, u32 (&of_warps)[32]) {
    const u32 of_warp = __reduce_max_sync(~0u, larger(pair));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) of_warps[warp] = of_warp;
    __syncthreads();
    return __reduce_max_sync(~0u, lane < blockDim.x / 32 ? of_warps[lane] : 0);
}

// Bit i of j where bit 0 is CHUNKS / 2: the lane of a group that finds the scale of piece j, and the reverse.
__device__ __forceinline__ constexpr int turned(int j) { return CHUNKS == 4 ? (j & 1) << 1 | (j & 2) >> 1 : j; }

extern "C" __global__ void __launch_bounds__(THREADS) act_quant(const __grid_constant__ Arguments a) {
    let_the_next_start();
    wait_for_the_kernel_before();
    const int per_row = a.k / 8, lane = threadIdx.x % 32;
    uint4 v[CHUNKS];
    int at[CHUNKS];  // piece of x, or -1
    Scale s[CHUNKS];
#if GROUP == 0 && !STATIC
    __shared__ u32 of_warps[1 + ZERO][32];
    const int row = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        // Its own pieces come first.
        const int piece = (j + part * OWN) % CHUNKS * blockDim.x + threadIdx.x;
        at[j] = piece < per_row ? row * per_row + piece : -1;
    }
#else
    const int first = blockIdx.x * (CHUNKS * THREADS) + threadIdx.x;
    // Rows whose last group is cut off are gone through as if it were whole.
    const int padded = WHOLE ? per_row : (per_row + LANES - 1) / LANES * LANES, pieces = a.m * padded;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        const int i = first + j * THREADS;
        at[j] = i < pieces ? i : -1;
        if (!WHOLE) at[j] = i < pieces && i % padded < per_row ? i / padded * per_row + i % padded : -1;
    }
#endif
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) v[j] = at[j] >= 0 ? a.x[at[j]] : make_uint4(0, 0, 0, 0);
    bool ordinary = false;
#if STATIC
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) s[j] = {*a.given};
    if (first == 0) *a.scales = *a.given;
#elif GROUP == 0
    u32 most = 0, lowest = 0;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        most = max2(most, largest2<ZERO>(v[j]));
        if (ZERO) lowest = max2(lowest, largest2<-1>(v[j]));
    }
    most = largest_of_block(most, of_warps[0]);
    if (ZERO) lowest = largest_of_block(lowest, of_warps[ZERO]);
    const Scale of_row = scale_of(most, lowest);
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) s[j] = of_row;
    ordinary = is_ordinary(of_row);
    if (part == 0 && threadIdx.x == 0) a.scales[row] = of_row.by;
#else
    // Lanes halve the pieces that they are asked about with every step, so that each ends with one of them.
    u32 most[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) most[j] = largest2<0>(v[j]);
    int step = 1;
#pragma unroll
    for (int left = CHUNKS / 2; left > 0; left /= 2, step *= 2)
#pragma unroll
        for (int j = 0; j < left; j++) {
            const bool odd = lane & step;
            const u32 other = __shfl_xor_sync(~0u, odd ? most[j] : most[j + left], step);
            most[j] = max2(odd ? most[j + left] : most[j], other);
        }
#pragma unroll
    for (; step < LANES; step *= 2) most[0] = max2(most[0], __shfl_xor_sync(~0u, most[0], step));
    const Scale mine = scale_of(larger(most[0]), 0);
    ordinary = __all_sync(~0u, is_ordinary(mine));
    const int own = first + turned(lane % CHUNKS) * THREADS;
    if (lane % LANES < CHUNKS && own < pieces) a.scales[own / LANES] = mine.by;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
        s[j] = {__shfl_sync(~0u, mine.by, turned(j), LANES), __shfl_sync(~0u, mine.inverse, turned(j), LANES)};
#endif
    write_all(a, at, v, s, ordinary);
}
