// From packed codes to bf16 or fp16 operands of the tensor cores: what the CUDA C++ kernels share.
//
// A lane takes QUAD consecutive bytes of a row's main plane (a chunk) and decodes eight codes at a time (an octet) into
// four pairs. The order of K inside a product is free, so a pair holds the two codes that one mask takes out of a
// 32-bit word, which are half a word apart: `pair_codes` says which, and activations are laid out to match.
//
// Compiled with -D FP16 (else operands are bf16), and with what decode.py derives from a format's declarations: QUAD,
// BITS per code, KIND, MANTISSA, BIAS, TABLE_FP32; SCALE_MODE, SCALE_TYPE, GROUP (weights per scale along K), SCALE_N (along N), ZERO, OUTER_K (-1: no outer
// scale, 0: one for the tensor, else weights per outer scale), OFFSET.

#define INT 0     // level = code - offset
#define FLOAT 1   // small float: MANTISSA bits of fraction, exponent less BIAS
#define TABLE 2   // 16-bit entries, up to 16 of them, looked up in pairs
#define VECTOR 3  // 256 entries of two weights

#define PER_ROW 0    // one scale per row or tensor, applied at the end
#define PER_STEP 1   // groups of whole steps of four lanes: applied to fp32 sums, exact
#define PER_CHUNK 2  // finer groups: applied to the decoded pair in bf16

#define FP32 0
#define BF16 1
#define E4M3 2
#define E8M0 3
#define INT8 4

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#ifndef FP16
#define FP16 0
#endif
#ifndef AS_CODES
#define AS_CODES 0  // codes are multiplied as 8-bit codes, which leaves this power of two of the levels undone:
#define CODES_UNIT 0
#endif
#ifndef COPIES
#define COPIES 32  // of a table in shared memory: every lane has a bank of its own; or 8, where room is scarce
#endif
constexpr int ENTRY_SHIFT = COPIES == 32 ? 7 : 5;  // an entry's copies fill so many bytes
constexpr int VECTOR_SIZE = KIND == VECTOR ? 2 : 1;
// Width of the plane that is read 16 bytes at a time; the others follow it.
constexpr int MAIN = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
constexpr int CHUNK = QUAD * 8 / MAIN * VECTOR_SIZE;  // weights a lane takes at once
constexpr int OCTETS = CHUNK / 8;
constexpr int STEP = 4 * CHUNK;  // weights of one row that a warp takes at once
// Tables of 4-bit codes and of pairs are indexed by a whole byte.
constexpr bool BYTES = KIND == VECTOR || (KIND == TABLE && BITS == 4);
// 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1
constexpr bool HAS_2 = BITS == 6 || BITS == 7;
constexpr bool HAS_1 = BITS == 3 || BITS == 5 || BITS == 7;
constexpr int TWO = HAS_2 ? CHUNK / 4 : 0, ONE = HAS_1 ? CHUNK / 8 : 0;  // bytes of a lane's chunk in the other planes
// The 16-bit operands: bits of fraction, what is taken off exponents, and the value of the smallest denormal as a power.
constexpr int FRACTION = FP16 ? 10 : 7, EXCESS = FP16 ? 15 : 127, LEAST = FP16 ? -24 : -133;
// What a small float in the place of an operand lacks.
constexpr int RESCALE = EXCESS - BIAS;
// Where one bf16 scale multiplies the decoded pair, it carries the power of two that decoding leaves out, so that a pair
// costs no product of its own: 2^-FOLD of the true value, undone at the end. Weights beyond 2^44 would overflow; the
// exponents of fp16 have no room for it.
constexpr bool FOLDED =
    !FP16 && SCALE_MODE == PER_CHUNK && SCALE_TYPE != FP32 && OUTER_K <= 0 && (KIND == FLOAT || (KIND == INT && !ZERO));
constexpr int FOLD = 50;
// The code whose level is zero; of one bit, halfway between its two.
constexpr float MIDDLE = BITS == 1 ? 0.5f : 1 << (BITS - 1);
// Integers are decoded to 2^-UNIT of their levels; those of one bit to half of that, since their levels are -1 and 1.
constexpr int BASE_UNIT = -LEAST - EXCESS;
constexpr int UNIT = KIND == INT ? BASE_UNIT + (BITS == 1 && !ZERO) : 0;
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

__host__ __device__ constexpr float exp2i(int e) { return e == 0 ? 1.f : e > 0 ? 2.f * exp2i(e - 1) : 0.5f * exp2i(e + 1); }

// 2^e as a pair of operands.
__device__ __forceinline__ constexpr u32 power(int e) { return 0x00010001u * ((EXCESS + e) << FRACTION); }

// Pairs of operands. Below sm_90 bf16 has only the fused form; plus -0 changes nothing.
#if FP16
#define OPERAND "f16"
#else
#define OPERAND "bf16"
#endif
#define PAIR OPERAND "x2"

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn." PAIR " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900 || FP16
    u32 d;
    asm("mul.rn." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    return fma2(a, b, 0x80008000);
#endif
}

// 16-bit floats without the toolkit's headers, which a user of the PyTorch wheels need not have.
__device__ __forceinline__ float bf16_value(u16 h) { return __uint_as_float((u32)h << 16); }

__device__ __forceinline__ float wide(u16 h) {
#if FP16
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
    return v;
#else
    return bf16_value(h);
#endif
}

__device__ __forceinline__ u32 narrow2(float low, float high) {
    u32 d;
    asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ u16 narrow(float v) { return narrow2(v, 0); }

__device__ __forceinline__ u32 pair(float v) { return narrow(v) * 0x00010001u; }

// Computed once: without this the compiler would rather compute addresses again than keep them.
__device__ __forceinline__ void keep(u32 &v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void keep(int &v) { asm volatile("" : "+r"(v)); }
template <typename T>
__device__ __forceinline__ void keep(T *&v) { asm volatile("" : "+l"(v)); }

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Copies BYTES, or zeros. Weights are read once: they pass the first cache by where that can be said.
template <int BYTES>
__device__ __forceinline__ void copy(u32 to, const u8 *from, bool valid) {
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}

template <int BYTES, int WORDS>
__device__ __forceinline__ void read_shared(u32 (&out)[WORDS], u32 from) {
    if constexpr (BYTES == 16)
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(from));
    if constexpr (BYTES == 8) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(from));
    if constexpr (BYTES == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[0]) : "r"(from));
    if constexpr (BYTES == 2) asm volatile("ld.shared.u16 %0, [%1];" : "=r"(out[0]) : "r"(from));
    if constexpr (BYTES == 1) asm volatile("ld.shared.u8 %0, [%1];" : "=r"(out[0]) : "r"(from));
}

__device__ __forceinline__ void barrier_init(u32 bar, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive_barrier(u32 bar) {
    unsigned long long state;
    asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(bar) : "memory");
}

__device__ __forceinline__ void wait_barrier(u32 bar, u32 parity) {
#if __CUDA_ARCH__ >= 900
#define TRY_WAIT "mbarrier.try_wait.parity"
#else
#define TRY_WAIT "mbarrier.test_wait.parity"
#endif
    asm volatile(
        "{\n.reg .pred p;\nagain:\n" TRY_WAIT ".shared.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(bar), "r"(parity)
        : "memory");
}

// One chunk of one row: the bytes of every plane.
struct Chunk {
    u32 main[QUAD / 4];
    u32 two[(TWO + 3) / 4 + !TWO], one[(ONE + 3) / 4 + !ONE];
};

// The weights of a chunk whose values are in pair `p` of the chunk (four pairs per octet).
struct Pair {
    int first, second;
};

__device__ __forceinline__ Pair pair_codes(int p) {
    if constexpr (BYTES) return {2 * p, 2 * p + 1};
    constexpr int CODES = 32 / MAIN;  // of a word
    const int first = p / (CODES / 2) * CODES + p % (CODES / 2);
    return {first, first + CODES / 2};
}

// The eight weights of an octet are two runs of four, SECOND_FOUR apart. Activations that meet them, in the order of pairs.
constexpr int SECOND_FOUR = BYTES || MAIN >= 4 ? 4 : 16 / MAIN;

__device__ __forceinline__ uint4 pairs_of(uint2 l, uint2 h) {
    if constexpr (BYTES) return {l.x, l.y, h.x, h.y};
    if constexpr (MAIN == 8)
        return {__byte_perm(l.x, l.y, 0x5410), __byte_perm(l.x, l.y, 0x7632), __byte_perm(h.x, h.y, 0x5410),
                __byte_perm(h.x, h.y, 0x7632)};
    return {__byte_perm(l.x, h.x, 0x5410), __byte_perm(l.x, h.x, 0x7632), __byte_perm(l.y, h.y, 0x5410),
            __byte_perm(l.y, h.y, 0x7632)};
}

// How far above the bottom of both halves the codes of pair j of octet o are brought. Integers stay in the byte where they
// lie: their place is part of the constant that multiplies them, and one shift serves all pairs of the upper bytes.
__device__ __forceinline__ constexpr int place_of(int o, int j) {
    if (KIND != INT) return 0;
    const int in_byte = (o * 4 + j) * MAIN % 8;
    return BITS == MAIN ? in_byte : BITS == 3 ? (in_byte < 4 ? in_byte : 4) : 0;
}

// Codes of pair j of octet o at their place. Bits around them are dirty for floats and tables of a single plane, whose
// decoders mask them anyway.
__device__ __forceinline__ u32 pair_bits(const Chunk &c, int o, int j) {
    constexpr int CODES = 16 / MAIN;  // in half a word of the main plane
    const int place = place_of(o, j), word = (o * 4 + j) / CODES, lies = (o * 4 + j) % CODES * MAIN;
    const auto moved = [](u32 v, int from, int to) { return from > to ? v >> (from - to) : v << (to - from); };
    u32 bits = moved(c.main[word], lies, place);
    if constexpr (KIND == INT || BITS != MAIN) bits &= 0x00010001u * ((1 << MAIN) - 1) << place;
    if constexpr (HAS_2) {
        // Sixteen bits for a word of eight codes: the second four go to the upper half.
        const u32 two = __byte_perm(c.two[o / 2], 0, o % 2 ? 0x4342 : 0x4140);
        bits |= moved(two, 2 * j, place + 4) & 0x00030003u << place + 4;
    }
    if constexpr (HAS_1) {
        constexpr int HIGH = BITS - 1;
        u32 one;
        if constexpr (MAIN == 4) {
            const u32 eight = c.one[o / 4] >> (o % 4 * 8) & 0xff;
            one = eight | eight << 12;
        } else {
            one = __byte_perm(c.one[o / 4], 0, o / 2 % 2 ? 0x4342 : 0x4140);
        }
        bits |= moved(one, MAIN == 4 ? j : o % 2 * 4 + j, place + HIGH) & 0x00010001u << place + HIGH;
    }
    return bits;
}

constexpr bool HAS_TABLE = KIND == TABLE || KIND == VECTOR;
constexpr int TABLE_WORDS = HAS_TABLE ? 256 * COPIES : 1;

// Floats of BITS bits in the halves of a word, brought to their places in an operand. What a shift brings across the halves
// is masked.
__device__ __forceinline__ u32 float_pair(u32 bits) {
    constexpr u32 MAGNITUDE = ((1u << (BITS - 1)) - 1) << (FRACTION - MANTISSA);
    const u32 value = (bits << (16 - BITS) & 0x80008000) | (bits << (FRACTION - MANTISSA) & 0x00010001u * MAGNITUDE);
    return FOLDED || RESCALE == 0 ? value : mul2(value, power(RESCALE));
}

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
            tables[i] = FP16 ? narrow2(bf16_value(t[low]), bf16_value(t[high])) : t[low] | (u32)t[high] << 16;
        }
    }
    return shared_address(tables) + threadIdx.x % COPIES * 4;
}

// Entry (index >> ENTRY_SHIFT) & 255 of this lane's copy of the table, which starts at the shared-memory address `table`.
__device__ __forceinline__ u32 look_up(u32 table, u32 index) {
    u32 entry;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"((index & 0xff << ENTRY_SHIFT) + table));
    return entry;
}

// Codes of integers at their place, and no bits around them. As an operand they are 2^(place + LEAST) times the code: below
// 256 the encoding is linear, through the denormals and the first exponent. The codes of int8 become unsigned.
__device__ __forceinline__ u32 integer_bits(const Chunk &c, int o, int j) {
    const u32 bits = pair_bits(c, o, j);
    return BITS == 8 && !ZERO ? bits ^ 0x00800080 : bits;
}

// Pair j of octet o before scaling; of integers 2^-UNIT times the levels, exactly. `base` is `base_value`.
__device__ __forceinline__ u32 decode(const Chunk &c, int o, int j, u32 base, u32 table) {
    if constexpr (BYTES) return look_up(table, j == 0 ? c.main[o] << ENTRY_SHIFT : c.main[o] >> (8 * j - ENTRY_SHIFT));
    if constexpr (KIND == INT) return fma2(integer_bits(c, o, j), power(EXCESS - place_of(o, j)), base);
    constexpr u32 CODE = 0x00010001u * ((1u << BITS) - 1);
    const u32 bits = pair_bits(c, o, j);
    if constexpr (KIND == FLOAT) return float_pair(bits);
    const u32 codes = bits & CODE;
    return look_up(table, (codes | codes >> 12) << ENTRY_SHIFT);
}

// A scale as it lies in memory; loading and converting are apart so that a kernel can load early.
struct RawScale {
    u32 bits;
    float outer;
};

constexpr int SCALE_BYTES = SCALE_TYPE == FP32 ? 4 : SCALE_TYPE == BF16 ? 2 : 1;

// Where the scales and zero points of a row begin.
struct ScaleRow {
    const u8 *scale, *zero;
    const float *outer;
};

__device__ __forceinline__ ScaleRow scale_row(const Arguments &a, long long row) {
    const long long first = (a.scale_rows == 1 ? 0 : row / SCALE_N) * a.scale_columns;
    return {(const u8 *)a.scale + first * SCALE_BYTES, ZERO ? a.zero + first : nullptr,
            OUTER_K > 0 ? a.outer + row * a.outer_columns : nullptr};
}

__device__ __forceinline__ float load_outer(const ScaleRow &row, int column) {
    return OUTER_K > 0 ? __ldg(row.outer + column / (OUTER_K > 0 ? OUTER_K / GROUP : 1)) : 1.f;
}

__device__ __forceinline__ RawScale load_scale(const ScaleRow &row, int column) {
    RawScale s;
    const u8 *from = row.scale + (long long)column * SCALE_BYTES;
    if constexpr (SCALE_BYTES == 4) s.bits = __ldg((const u32 *)from);
    else if constexpr (SCALE_BYTES == 2) s.bits = __ldg((const u16 *)from);
    else s.bits = __ldg(from);
    s.outer = load_outer(row, column);
    return s;
}

// A scale as the factor of decoded pairs. In fp16, which has few exponents, it undoes the unit of integers. What does not
// fit an operand goes into a second one, so that a product is rounded once.
constexpr bool TWO_FACTORS = SCALE_MODE == PER_CHUNK && (SCALE_TYPE == FP32 || OUTER_K > 0);

struct Factor {
    u32 high, low;
};

// Of a float that is an operand already.
__device__ __forceinline__ u32 pair_of_exact(float v) { return FP16 ? pair(v) : __byte_perm(__float_as_uint(v), 0, 0x3232); }

// For integers with a folded scale, `low` takes off the middle of the levels.
__device__ __forceinline__ Factor factor_of(float scale) {
    if constexpr (FP16 && KIND == INT) scale *= exp2i(BASE_UNIT);
    if constexpr (TWO_FACTORS) {
        const u16 high = narrow(scale);
        return {high * 0x00010001u, pair(scale - wide(high))};
    }
    if constexpr (FOLDED && KIND == INT)
        return {pair_of_exact(scale * exp2i(-LEAST - FOLD)), pair_of_exact(scale * (-MIDDLE * exp2i(-FOLD)))};
    if constexpr (FOLDED) return {pair_of_exact(scale * exp2i(RESCALE - FOLD)), 0};
    return {pair_of_exact(scale), 0};
}

// A decoded pair times a scale that is finer than a step.
__device__ __forceinline__ u32 scaled(u32 w, Factor f) { return TWO_FACTORS ? fma2(w, f.high, mul2(w, f.low)) : mul2(w, f.high); }

// Pair j of octet o times its scale.
__device__ __forceinline__ u32 decode_scaled(const Chunk &c, int o, int j, u32 base, u32 table, Factor f) {
    if constexpr (FOLDED && KIND == INT) {
        const int place = place_of(o, j);
        return fma2(integer_bits(c, o, j), place ? mul2(f.high, power(-place)) : f.high, f.low);
    }
    return scaled(decode(c, o, j, base, table), f);
}

// Activations in their own order: in a product of 16 weights of a row, lane q of a quad has weights 2q and 2q + 1 of both
// eights. All four lanes read the same words, and a byte permutation takes out what is the lane's. For codes of 4 and 8
// bits in one plane. `words` are those of the 16 weights, `j` is the eight.

// What the permutation selects for this lane: its byte of a word of eight codes, or its two of two words, in both halves.
__device__ __forceinline__ u32 selector() {
    const u32 quad = threadIdx.x % 4;
    if constexpr (BYTES) return 0x4440 | quad;
    return BITS == 4 ? 0x1111 * quad : 2 * quad | (2 * quad + 1) << 8;
}

// The two codes in the halves of a word: of 4 bits, the upper one four bits higher. Other bits are dirty for floats.
__device__ __forceinline__ u32 own_bits(const u32 *words, int j, u32 select) {
    if constexpr (BITS == 8) {
        const u32 bits = __byte_perm(words[2 * j], words[2 * j + 1], select);
        return KIND != INT ? bits : ZERO ? bits & 0x00ff00ff : bits & 0x00ff00ff ^ 0x00800080;
    }
    const u32 bits = __byte_perm(words[j], 0, select);
    if constexpr (KIND == INT) return bits & 0x00f0000f;
    return BYTES ? bits : bits & 0xffff | bits >> 4 & 0xffff0000;
}

// 2^e as a pair of operands for these two: the place of the upper one is undone.
__device__ __forceinline__ constexpr u32 power_own(int e) { return (EXCESS + e | EXCESS + e - (BITS == 4 ? 4 : 0) << 16) << FRACTION; }

// `decode` and `decode_scaled` of these two.
__device__ __forceinline__ u32 decode_own(const u32 *words, int j, u32 select, u32 base, u32 table) {
    const u32 bits = own_bits(words, j, select);
    if constexpr (BYTES) return look_up(table, bits << ENTRY_SHIFT);
    if constexpr (KIND == FLOAT) return float_pair(bits);
    return fma2(bits, power_own(EXCESS), base);
}

__device__ __forceinline__ u32 decode_own_scaled(const u32 *words, int j, u32 select, u32 base, u32 table, Factor f) {
    if constexpr (FOLDED && KIND == INT) return fma2(own_bits(words, j, select), BITS == 4 ? mul2(f.high, power_own(0)) : f.high, f.low);
    return scaled(decode_own(words, j, select, base, table), f);
}

// Small elements that lie side by side, in one load: COUNT of BYTES each, the first at a multiple of COUNT * BYTES.
template <int BYTES, int COUNT>
__device__ __forceinline__ void load_run(u32 (&out)[COUNT], const u8 *from) {
    constexpr int ALL = BYTES * COUNT;
    u32 words[(ALL + 3) / 4];
    if constexpr (ALL == 16) {
        const uint4 v = __ldg((const uint4 *)from);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (ALL == 8) {
        const uint2 v = __ldg((const uint2 *)from);
        words[0] = v.x, words[1] = v.y;
    } else if constexpr (ALL == 4) {
        words[0] = __ldg((const u32 *)from);
    } else if constexpr (ALL == 2) {
        words[0] = __ldg((const u16 *)from);
    } else {
        words[0] = __ldg(from);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        out[i] = BYTES == 4 ? words[i] : words[i * BYTES / 4] >> i * BYTES % 4 * 8 & (BYTES == 2 ? 0xffffu : 0xffu);
}

__device__ __forceinline__ float scale_value(const Arguments &a, RawScale raw) {
    float s;
    if constexpr (SCALE_TYPE == FP32) s = __uint_as_float(raw.bits);
    if constexpr (SCALE_TYPE == BF16) s = bf16_value(raw.bits);
    if constexpr (SCALE_TYPE == INT8) s = (float)(signed char)raw.bits;
    if constexpr (SCALE_TYPE == E8M0) {
        // 2^(e - 127); 0 stands for 2^-127, 255 for NaN.
        const u32 e = raw.bits;
        s = __uint_as_float(max(e << 23, 0x00400000u) + (e + 1 >> 8));
    }
    if constexpr (SCALE_TYPE == E4M3) s = __uint_as_float((raw.bits & 0x80) << 24 | (raw.bits & 0x7f) << 20) * 0x1p120f;
    if constexpr (OUTER_K > 0) s *= raw.outer;
    if constexpr (OFFSET) s += __ldg(a.offset);
    return s;
}

// What undoes the powers of two that decoding leaves.
constexpr float UNDO = exp2i(AS_CODES                                            ? CODES_UNIT
                             : FOLDED                                            ? FOLD + (KIND == INT && BITS == 1)
                             : FP16 && KIND == INT && SCALE_MODE == PER_CHUNK ? UNIT - BASE_UNIT
                                                                               : UNIT);

// What is left after the sum over K, for outputs of one row of W.
struct Finish {
    float scale, bias;
};

__device__ __forceinline__ Finish finish_of(const Arguments &a, int n) {
    Finish f = {1, 0};
    if constexpr (SCALE_MODE == PER_ROW) f.scale = scale_value(a, load_scale(scale_row(a, n), 0));
    if (a.bias) f.bias = a.bias_fp32 ? ((const float *)a.bias)[n] : wide(((const u16 *)a.bias)[n]);
    return f;
}

// The scale that a quantized activation has for a token, 1 for others.
__device__ __forceinline__ float token_scale(const Arguments &a, int token) {
    return a.row_scale ? __ldg(a.row_scale + (a.row_scales == 1 ? 0 : token)) : 1.f;
}

__device__ __forceinline__ float finish(const Arguments &a, float v, Finish f, float token_scale) {
    if constexpr (SCALE_MODE == PER_ROW) v *= f.scale;
    v *= UNDO;
    if constexpr (OUTER_K == 0) v *= __ldg(a.outer);
    return v * token_scale + f.bias;
}

__device__ __forceinline__ u32 load_zero(const ScaleRow &row, int column) {
    if constexpr (!ZERO) return 0;
    return __ldg(row.zero + column);
}

// What `decode` takes off integers, as a pair: the zero point, or the middle of the codes, in their unit.
__device__ __forceinline__ u32 base_value(u32 zero) {
    if constexpr (KIND != INT) return 0;
    if constexpr (!ZERO) return pair(MIDDLE * -exp2i(-BASE_UNIT));
    return pair(zero * -exp2i(-BASE_UNIT));
}
