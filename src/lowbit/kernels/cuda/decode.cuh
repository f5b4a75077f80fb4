// From packed codes to bf16 operands of the tensor cores: what the CUDA C++ kernels share.
//
// A lane takes 16 consecutive bytes of a row's main plane (a chunk) and decodes them eight codes at a time (an octet)
// into four bf16 pairs of neighbours, (0, 1), (2, 3), (4, 5), (6, 7).
//
// Compiled with -D, which small_m.py derives from a format's declarations: BITS per code, KIND, MANTISSA, RESCALE,
// TABLE_FP32; SCALE_MODE, SCALE_TYPE, GROUP (weights per scale along K), SCALE_N (along N), ZERO, OUTER_K (-1: no outer
// scale, 0: one for the tensor, else weights per outer scale), OFFSET.

#define INT 0     // level = code - offset
#define FLOAT 1   // small float: MANTISSA bits of fraction, value = bits * 2^RESCALE as a bf16
#define TABLE 2   // 16-bit entries, up to 16 of them, looked up in pairs
#define VECTOR 3  // 256 entries of two weights

#define PER_ROW 0    // one scale per row or tensor, applied at the end
#define PER_STEP 1   // groups of whole steps: applied to fp32 sums, exact
#define PER_CHUNK 2  // finer groups: applied to the decoded pair in bf16

#define FP32 0
#define BF16 1
#define E4M3 2
#define E8M0 3
#define INT8 4

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int COPIES = 8;  // of a table in shared memory: an entry's copies fill 32 bytes, which `look_up` relies on
constexpr int VECTOR_SIZE = KIND == VECTOR ? 2 : 1;
// Width of the plane that is read 16 bytes at a time; the others follow it.
constexpr int MAIN = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
constexpr int CHUNK = 128 / MAIN * VECTOR_SIZE;  // weights a lane takes at once
constexpr int OCTETS = CHUNK / 8;
constexpr int STEP = 4 * CHUNK;        // weights of one row that a warp takes at once
// Tables of 4-bit codes and of pairs are indexed by a whole byte.
constexpr bool BYTES = KIND == VECTOR || (KIND == TABLE && BITS == 4);
// 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1
constexpr bool HAS_2 = BITS == 6 || BITS == 7;
constexpr bool HAS_1 = BITS == 3 || BITS == 5 || BITS == 7;
// E4M3 block scales are at most 448: times 2^118 they fit bf16, and one product undoes the exponent of the bits. What
// is left of 2^RESCALE waits for the end.
constexpr bool FOLDED = KIND == FLOAT && SCALE_MODE == PER_CHUNK && SCALE_TYPE == E4M3;
constexpr float FOLD = FOLDED ? 0x1p118f : 1.f;
// Scales of one chunk.
constexpr int SCALES = SCALE_MODE == PER_CHUNK && GROUP < CHUNK ? CHUNK / GROUP : 1;

struct Arguments {
    const u8 *codes, *codes2, *codes1;          // main plane, 2-bit plane, 1-bit plane
    long long stride, stride2, stride1;         // bytes per row
    const void *scale;
    const u8 *zero;
    const float *outer, *offset;
    const void *table;
    const u16 *x;
    const void *bias;
    const float *row_scale;
    u16 *y;
    int m, n, k, scale_columns, scale_rows, outer_columns, row_scales, bias_fp32;
};

// Pairs of bf16. Below sm_90 only the fused form exists; times 1 and plus -0 change nothing.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 sub2(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    u32 d;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    return fma2(a, 0x3f803f80, b ^ 0x80008000);
#endif
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    u32 d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    return fma2(a, b, 0x80008000);
#endif
}

// (v & mask) | bits in one instruction, which the compiler does not find by itself for two constants.
__device__ __forceinline__ u32 mask_or(u32 v, u32 mask, u32 bits) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(v), "r"(mask), "r"(bits));
    return d;
}

// bf16 without the toolkit's headers, which a user of the PyTorch wheels need not have.
__device__ __forceinline__ float wide(u16 h) { return __uint_as_float((u32)h << 16); }

__device__ __forceinline__ u16 narrow(float v) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}

__device__ __forceinline__ u32 pair(float v) { return narrow(v) * 0x00010001u; }

// One chunk of one row: the bytes of every plane.
struct Chunk {
    u32 main[4];
    u32 two[2], one[2];
};

// Codes (2 j, 2 j + 1), j = 0..3, of octet o in the two halves of four words. Plain 4-bit codes have other bits above
// them; everything else is clean.
__device__ __forceinline__ void octet_codes(const Chunk &c, int o, u32 (&out)[4]) {
    if constexpr (MAIN == 8) {
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = __byte_perm(c.main[2 * o + j / 2], 0, j % 2 ? 0x4342 : 0x4140);
    } else {
        const u32 odd = MAIN == 4 ? c.main[o] >> 4 : 0;
        u32 two = 0, one = 0;
        if constexpr (MAIN == 2) two = o % 2 ? c.main[o / 2] >> 16 : c.main[o / 2] & 0xffff;
        if constexpr (HAS_2) two = o % 2 ? c.two[o / 2] >> 16 : c.two[o / 2] & 0xffff;
        if constexpr (MAIN == 2 || HAS_2) two |= two << 14;
        if constexpr (MAIN == 1) one = c.main[o / 4] >> (o % 4 * 8) & 0xff;
        if constexpr (HAS_1) one = c.one[o / 4] >> (o % 4 * 8) & 0xff;
        if constexpr (MAIN == 1 || HAS_1) one |= one << 15;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 v = 0;
            if constexpr (MAIN == 4) {
                v = __byte_perm(c.main[o], odd, 0x4400 + 0x1111 * j);
                if constexpr (BITS != 4 || KIND != INT) v &= 0x000f000f;
            }
            if constexpr (MAIN == 2) v = two >> 4 * j & 0x00030003;
            if constexpr (HAS_2) v |= (j == 0 ? two << 4 : two >> (4 * j - 4)) & 0x00300030;
            constexpr int high = BITS - 1;
            if constexpr (MAIN == 1) v = one >> 2 * j & 0x00010001;
            if constexpr (HAS_1) v |= (one >> 2 * j & 0x00010001) << high;
            out[j] = v;
        }
    }
}

constexpr bool HAS_TABLE = KIND == TABLE || KIND == VECTOR;
constexpr int TABLE_WORDS = HAS_TABLE ? 256 * COPIES : 1;

// Copies of the table, interleaved, so that the lanes of a warp mostly find different banks. Returns the shared-memory
// address of this lane's copy; every thread of the block calls it and waits for the others before it looks anything up.
__device__ __forceinline__ u32 fill_table(u32 *tables, const Arguments &a) {
    if constexpr (!HAS_TABLE) return 0;
    for (int i = threadIdx.x; i < TABLE_WORDS; i += blockDim.x) {
        const int e = i / COPIES, low = KIND == VECTOR ? 2 * e : e & ((1 << BITS) - 1);
        const int high = KIND == VECTOR ? 2 * e + 1 : e >> 4 & ((1 << BITS) - 1);
        if constexpr (TABLE_FP32) {
            const float *t = (const float *)a.table;
            tables[i] = narrow(t[low]) | (u32)narrow(t[high]) << 16;
        } else {
            const u16 *t = (const u16 *)a.table;
            tables[i] = t[low] | (u32)t[high] << 16;
        }
    }
    return (u32)__cvta_generic_to_shared(tables) + threadIdx.x % COPIES * 4;
}

// Entry (index >> 5) & 255 of this lane's copy of the table, which starts at the shared-memory address `table`.
__device__ __forceinline__ u32 look_up(u32 table, u32 index) {
    u32 entry;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"((index & 0x1fe0) + table));
    return entry;
}

// The four bf16 pairs of one octet before scaling. `base` is 128 + zero point (or offset) for integers.
__device__ __forceinline__ void decode(const Chunk &c, int o, u32 base, u32 table, u32 (&w)[4]) {
    if constexpr (BYTES) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = look_up(table, i == 0 ? c.main[o] << 5 : c.main[o] >> (8 * i - 5));
        return;
    }
    u32 v[4];
    octet_codes(c, o, v);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if constexpr (KIND == INT && BITS == 8) {
            // int8: (128 + low 7 bits) - (128 + 128 * top bit); unsigned codes have their top bit flipped first.
            u32 t = ZERO ? v[j] ^ 0x00800080 : v[j];
            w[j] = sub2(mask_or(t, 0x007f007f, 0x43004300), mask_or(t, 0x00800080, 0x43004300));
            if constexpr (ZERO) w[j] = sub2(w[j], base);
        } else if constexpr (KIND == INT) {
            // 128 + code, less 128 + zero point. The mask is idle for clean codes and free.
            w[j] = sub2(mask_or(v[j], 0x00010001u * ((1 << BITS) - 1), 0x43004300), base);
            if constexpr (BITS == 1 && !ZERO) w[j] = sub2(mul2(w[j], 0x40004000), 0x3f803f80);  // 2 code - 1
        } else if constexpr (KIND == FLOAT) {
            constexpr u32 sign = 0x00010001u << (BITS - 1), magnitude = 0x00010001u * ((1u << (BITS - 1)) - 1);
            u32 bits = (v[j] & sign) << (16 - BITS) | (v[j] & magnitude) << (7 - MANTISSA);
            // Where a scale in bf16 follows, it carries the power of two.
            w[j] = FOLDED ? bits : mul2(bits, 0x00010001u * ((127 + RESCALE) << 7));
        } else {
            w[j] = look_up(table, (v[j] | v[j] >> 12) << 5);
        }
    }
}

// A scale as it lies in memory; loading and converting are apart so that a kernel can load early.
struct RawScale {
    u32 bits;
    float outer;
};

__device__ __forceinline__ RawScale load_scale(const Arguments &a, long long row, int column) {
    long long i = (a.scale_rows == 1 ? 0 : row / SCALE_N) * a.scale_columns + column;
    RawScale s;
    if constexpr (SCALE_TYPE == FP32) s.bits = __ldg((const u32 *)a.scale + i);
    else if constexpr (SCALE_TYPE == BF16) s.bits = __ldg((const u16 *)a.scale + i);
    else s.bits = __ldg((const u8 *)a.scale + i);
    if constexpr (OUTER_K > 0) s.outer = __ldg(a.outer + row * a.outer_columns + column / (OUTER_K > 0 ? OUTER_K / GROUP : 1));
    return s;
}

__device__ __forceinline__ float scale_value(const Arguments &a, RawScale raw) {
    float s;
    if constexpr (SCALE_TYPE == FP32) s = __uint_as_float(raw.bits);
    if constexpr (SCALE_TYPE == BF16) s = wide(raw.bits);
    if constexpr (SCALE_TYPE == INT8) s = (float)(signed char)raw.bits;
    if constexpr (SCALE_TYPE == E8M0) {
        const u32 e = raw.bits;
        s = __uint_as_float(e == 0 ? 0x00400000u : e == 255 ? 0x7fffffffu : e << 23);
    }
    if constexpr (SCALE_TYPE == E4M3) s = __uint_as_float((raw.bits & 0x80) << 24 | (raw.bits & 0x7f) << 20) * 0x1p120f;
    if constexpr (OUTER_K > 0) s *= raw.outer;
    if constexpr (OFFSET) s += __ldg(a.offset);
    return s;
}

__device__ __forceinline__ float scale_at(const Arguments &a, long long row, int column) {
    return scale_value(a, load_scale(a, row, column));
}

// What is left after the sum over K, of output `v` at row n of W and the given token.
__device__ __forceinline__ float finish(const Arguments &a, float v, int n, int token) {
    if constexpr (SCALE_MODE == PER_ROW) v *= scale_at(a, n, 0);
    if constexpr (FOLDED) v *= (float)(1 << (RESCALE > 118 ? RESCALE - 118 : 0));
    if constexpr (OUTER_K == 0) v *= __ldg(a.outer);
    if (a.row_scale) v *= __ldg(a.row_scale + (a.row_scales == 1 ? 0 : token));
    if (a.bias) v += a.bias_fp32 ? ((const float *)a.bias)[n] : wide(((const u16 *)a.bias)[n]);
    return v;
}

__device__ __forceinline__ u32 load_zero(const Arguments &a, long long row, int column) {
    if constexpr (!ZERO) return 0;
    return __ldg(a.zero + (a.scale_rows == 1 ? 0 : row / SCALE_N) * a.scale_columns + column);
}

// What `decode` takes off integers, as a pair.
__device__ __forceinline__ u32 base_value(u32 zero) {
    if constexpr (KIND != INT) return 0;
    const float bias = BITS == 8 ? -128.f : 128.f;
    if constexpr (!ZERO) return pair(BITS == 1 ? bias : bias + (1 << (BITS - 1)));
    return pair(bias + zero);
}

__device__ __forceinline__ u32 base_at(const Arguments &a, long long row, int column) {
    return base_value(load_zero(a, row, column));
}
