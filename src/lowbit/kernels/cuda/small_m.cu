// y (M, N) = x (M, K) W (N, K)^T for M <= 8 * TOKEN_TILES tokens; W in any format, read once, straight from the
// canonical planes. bf16 activations, mma.sync m16n8k16, fp32 accumulation in a fixed order.
//
// Rows of W are the m16 side of the tensor-core tile, tokens the n8 side. The order of K inside a product is free, so
// each lane loads 16 consecutive bytes of its row (a chunk) and feeds them to consecutive MMAs; the activations are read
// at the same places. No weight is ever shuffled, which is why no packed layout is needed.
//
// Codes are decoded eight at a time (an octet) into four bf16 pairs, always of the codes (j, j + 4): that pairing is
// what one shift and one mask give for 4-bit codes, and every other width is brought to it.
//
// Compiled with -D, which small_m.py derives from a format's declarations: BITS per code, KIND, MANTISSA, RESCALE,
// TABLE_FP32; SCALE_MODE, SCALE_TYPE, GROUP (weights per scale along K), SCALE_N (along N), ZERO, OUTER_K (-1: no outer
// scale, 0: one for the tensor, else weights per outer scale), OFFSET; TOKEN_TILES (of 8), ROW_TILES (of 16), MIN_BLOCKS
// (resident per multiprocessor).

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

constexpr int WARPS = 8;
constexpr int COPIES = 8;  // of a table in shared memory: an entry's copies fill 32 bytes, which `look_up` relies on
constexpr int VECTOR_SIZE = KIND == VECTOR ? 2 : 1;
// Width of the plane that is read 16 bytes at a time; the others follow it.
constexpr int MAIN = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
constexpr int CHUNK = 128 / MAIN * VECTOR_SIZE;  // weights a lane takes at once
constexpr int OCTETS = CHUNK / 8;
constexpr int STEP = 4 * CHUNK;        // weights of one row that a warp takes at once
constexpr int HALVES = 2 * ROW_TILES;  // rows of a lane: lane / 4 + 8 h
constexpr int ROWS = 8 * HALVES;       // of a block
constexpr int UNROLL = (OCTETS >= 8 ? 2 : 4) / ROW_TILES;
// Tables of 4-bit codes and of pairs give the weights (2 i, 2 i + 1) at once; everything else (j, j + 4).
constexpr bool NEIGHBOURS = KIND == VECTOR || (KIND == TABLE && BITS == 4);
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

// Weights are read once: they leave the caches to the activations.
__device__ __forceinline__ void stream(u32 (&v)[4], const u8 *p) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p));
}

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

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One chunk of one row: the bytes of every plane.
struct Chunk {
    u32 main[4];
    u32 two[2], one[2];
};

// 4 or 8 bytes of a secondary plane.
template <int BYTES>
__device__ __forceinline__ void load_few(u32 (&out)[2], const u8 *p) {
    if constexpr (BYTES == 8) {
        uint2 t = __ldg((const uint2 *)p);
        out[0] = t.x, out[1] = t.y;
    } else {
        out[0] = __ldg((const u32 *)p);
    }
}

// The chunk at k; past the end of the row zeros, which meet activations that are zero.
__device__ __forceinline__ void load(Chunk &c, const Arguments &a, long long row, int k) {
    if (k >= a.k) {
        c = Chunk{};
        return;
    }
    stream(c.main, a.codes + row * a.stride + k / VECTOR_SIZE * MAIN / 8);
    if constexpr (HAS_2) load_few<CHUNK / 4>(c.two, a.codes2 + row * a.stride2 + k / 4);
    if constexpr (HAS_1) load_few<CHUNK / 8>(c.one, a.codes1 + row * a.stride1 + k / 8);
}

// Codes (j, j + 4), j = 0..3, of octet o in the two halves of four words. 8-bit codes are left in the low byte of each
// half with other bytes above them; everything narrower is clean.
__device__ __forceinline__ void octet_codes(const Chunk &c, int o, u32 (&out)[4]) {
    if constexpr (MAIN == 8) {
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = __byte_perm(c.main[2 * o], c.main[2 * o + 1], 0x4400 + 0x1111 * j);
    } else {
        u32 two = 0, one = 0;
        if constexpr (MAIN == 2) two = __byte_perm(c.main[o / 2], 0, o % 2 ? 0x4342 : 0x4140);
        if constexpr (HAS_2) two = __byte_perm(c.two[o / 2], 0, o % 2 ? 0x4342 : 0x4140);
        if constexpr (MAIN == 1) one = c.main[o / 4] >> (o % 4 * 8);
        if constexpr (HAS_1) one = c.one[o / 4] >> (o % 4 * 8);
        if constexpr (MAIN == 1 || HAS_1) one = (one & 0xf) | (one & 0xf0) << 12;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 v = 0;
            if constexpr (MAIN == 4) v = BITS == 4 && KIND == INT ? c.main[o] >> 4 * j : c.main[o] >> 4 * j & 0x000f000f;
            if constexpr (MAIN == 2) v = two >> 2 * j & 0x00030003;
            if constexpr (HAS_2) v |= (two << 4 >> 2 * j) & 0x00300030;
            constexpr int high = BITS - 1;
            if constexpr (MAIN == 1) v = one >> j & 0x00010001;
            if constexpr (HAS_1) v |= (one >> j & 0x00010001) << high;
            out[j] = v;
        }
    }
}

// Entry (index >> 5) & 255 of this lane's copy of the table, which starts at the shared-memory address `table`.
__device__ __forceinline__ u32 look_up(u32 table, u32 index) {
    u32 entry;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"((index & 0x1fe0) + table));
    return entry;
}

// The four bf16 pairs of one octet before scaling. `base` is 128 + zero point (or offset) for integers.
__device__ __forceinline__ void decode(const Chunk &c, int o, u32 base, u32 table, u32 (&w)[4]) {
    if constexpr (NEIGHBOURS) {
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

__device__ __forceinline__ float scale_at(const Arguments &a, long long row, int column) {
    long long i = (a.scale_rows == 1 ? 0 : row / SCALE_N) * a.scale_columns + column;
    float s;
    if constexpr (SCALE_TYPE == FP32) s = __ldg((const float *)a.scale + i);
    if constexpr (SCALE_TYPE == BF16) s = wide(__ldg((const u16 *)a.scale + i));
    if constexpr (SCALE_TYPE == INT8) s = (float)__ldg((const signed char *)a.scale + i);
    if constexpr (SCALE_TYPE == E8M0) {
        u32 e = __ldg((const u8 *)a.scale + i);
        s = __uint_as_float(e == 0 ? 0x00400000u : e == 255 ? 0x7fffffffu : e << 23);
    }
    if constexpr (SCALE_TYPE == E4M3) {
        u32 b = __ldg((const u8 *)a.scale + i);
        s = __uint_as_float((b & 0x80) << 24 | (b & 0x7f) << 20) * 0x1p120f;
    }
    if constexpr (OUTER_K > 0) s *= __ldg(a.outer + row * a.outer_columns + column / (OUTER_K > 0 ? OUTER_K / GROUP : 1));
    if constexpr (OFFSET) s += __ldg(a.offset);
    return s;
}

__device__ __forceinline__ u32 base_at(const Arguments &a, long long row, int column) {
    if constexpr (KIND != INT) return 0;
    float bias = BITS == 8 ? -128.f : 128.f;
    if constexpr (!ZERO) return pair(BITS == 1 ? bias : bias + (1 << (BITS - 1)));
    long long i = (a.scale_rows == 1 ? 0 : row / SCALE_N) * a.scale_columns + column;
    return pair(bias + __ldg(a.zero + i));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) small_m(const __grid_constant__ Arguments a) {
    __shared__ float sums[WARPS][ROW_TILES][TOKEN_TILES][32][4];
#if KIND == TABLE || KIND == VECTOR
    // Copies of the table, interleaved, so that the lanes of a warp mostly find different banks.
    __shared__ u32 tables[256 * COPIES];
    for (int i = threadIdx.x; i < 256 * COPIES; i += WARPS * 32) {
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
    __syncthreads();
    const u32 table = (u32)__cvta_generic_to_shared(tables) + threadIdx.x % COPIES * 4;
#else
    const u32 table = 0;
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4, first = blockIdx.x * ROWS;
    int rows[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) rows[h] = min(first + lane / 4 + 8 * h, a.n - 1);
    const int steps = (a.k + STEP - 1) / STEP;
    float acc[ROW_TILES][TOKEN_TILES][4] = {};

    for (int base_step = warp; base_step < steps; base_step += WARPS * UNROLL) {
        // Everything that comes from device memory is asked for before anything is used.
        Chunk chunks[UNROLL][HALVES];
        u32 base[UNROLL][HALVES][SCALES], scale[UNROLL][HALVES][SCALES];
        float sum_scale[UNROLL][HALVES];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int step = base_step + u * WARPS, k = step * STEP + quad * CHUNK;
#pragma unroll
            for (int r = 0; r < HALVES; r++) {
                if (k < a.k) load(chunks[u][r], a, rows[r], k);
                else chunks[u][r] = Chunk{};
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int step = base_step + u * WARPS, k = step * STEP + quad * CHUNK;
#pragma unroll
            for (int r = 0; r < HALVES; r++) {
                if constexpr (SCALE_MODE == PER_STEP) {
                    const int column = min(step * STEP, a.k - 1) / GROUP;
                    sum_scale[u][r] = scale_at(a, rows[r], column);
                    base[u][r][0] = base_at(a, rows[r], column);
                } else if constexpr (SCALE_MODE == PER_CHUNK) {
#pragma unroll
                    for (int s = 0; s < SCALES; s++) {
                        int column = min(k + s * (CHUNK / SCALES), a.k - 1) / GROUP;
                        scale[u][r][s] = pair(scale_at(a, rows[r], column) * FOLD);
                        base[u][r][s] = base_at(a, rows[r], column);
                    }
                } else {
                    base[u][r][0] = base_at(a, rows[r], 0);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int step = base_step + u * WARPS, k = step * STEP + quad * CHUNK;
            if (step >= steps) break;
            const bool inside = k < a.k;
            float part[ROW_TILES][TOKEN_TILES][4] = {};
#pragma unroll
            for (int o = 0; o < OCTETS; o++) {
                u32 w[HALVES][4];
                const int s = o * SCALES / OCTETS;
#pragma unroll
                for (int r = 0; r < HALVES; r++) {
                    decode(chunks[u][r], o, base[u][r][s], table, w[r]);
                    if constexpr (SCALE_MODE == PER_CHUNK)
#pragma unroll
                        for (int j = 0; j < 4; j++) w[r][j] = mul2(w[r][j], scale[u][r][s]);
                }
#pragma unroll
                for (int t = 0; t < TOKEN_TILES; t++) {
                    const int token = t * 8 + lane / 4;
                    uint4 x = {0, 0, 0, 0};
                    if (inside && token < a.m) x = __ldg((const uint4 *)(a.x + (long long)token * a.k + k + o * 8));
                    const u32 b[4] = {NEIGHBOURS ? x.x : __byte_perm(x.x, x.z, 0x5410),
                                      NEIGHBOURS ? x.y : __byte_perm(x.x, x.z, 0x7632),
                                      NEIGHBOURS ? x.z : __byte_perm(x.y, x.w, 0x5410),
                                      NEIGHBOURS ? x.w : __byte_perm(x.y, x.w, 0x7632)};
#pragma unroll
                    for (int i = 0; i < ROW_TILES; i++) {
                        float (&c)[4] = SCALE_MODE == PER_STEP ? part[i][t] : acc[i][t];
                        mma(c, {w[2 * i][0], w[2 * i + 1][0], w[2 * i][1], w[2 * i + 1][1]}, b[0], b[1]);
                        mma(c, {w[2 * i][2], w[2 * i + 1][2], w[2 * i][3], w[2 * i + 1][3]}, b[2], b[3]);
                    }
                }
            }
            if constexpr (SCALE_MODE == PER_STEP)
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                        for (int e = 0; e < 4; e++) acc[i][t][e] += part[i][t][e] * sum_scale[u][2 * i + e / 2];
        }
    }

#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) *(float4 *)sums[warp][i][t][lane] = *(float4 *)acc[i][t];
    __syncthreads();
    // Sums of the warps in their order: the result does not depend on M or on timing.
    for (int e = threadIdx.x; e < TOKEN_TILES * 8 * ROWS; e += WARPS * 32) {
        const int row = e % ROWS, token = e / ROWS, n = first + row;
        if (n >= a.n || token >= a.m) continue;
        const int from = row % 8 * 4 + token % 8 / 2, element = row / 8 % 2 * 2 + token % 2;
        float v = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += sums[w][row / 16][token / 8][from][element];
        if constexpr (SCALE_MODE == PER_ROW) v *= scale_at(a, n, 0);
        if constexpr (FOLDED) v *= (float)(1 << (RESCALE > 118 ? RESCALE - 118 : 0));
        if constexpr (OUTER_K == 0) v *= __ldg(a.outer);
        if (a.row_scale) v *= __ldg(a.row_scale + (a.row_scales == 1 ? 0 : token));
        if (a.bias) v += a.bias_fp32 ? ((const float *)a.bias)[n] : wide(((const u16 *)a.bias)[n]);
        a.y[(long long)token * a.n + n] = narrow(v);
    }
}
