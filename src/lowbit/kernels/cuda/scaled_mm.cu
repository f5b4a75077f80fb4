// y (M, N) = x (M, K) W (N, K)^T of 8-bit codes: int8 into int32, float8 into fp32; integers of 4 bits become such codes on the
// way. Scales, bias, one rounding. Hopper's matrix units take both operands from shared memory. Few tokens are a matter of
// how many bytes are under way, and many of the tiles' shape: both are constants.
//
// One thread brings W, another the activations, through tensor maps, in stages of 128 codes of K; a warpgroup widens W, if it
// has 4 bits; CONSUMERS warpgroups multiply. W does not wait for the kernel ahead, which quantizes the activations. tiles.cuh
// says which tiles a block has.
//
// Sums of PART products leave the matrix units and are added in fp32 where scales change along K, and for float8, of whose
// sums Hopper keeps about 14 bits. One warpgroup multiplies while another adds.
//
// Compiled with -D beyond those of decode.cuh and tiles.cuh: S8 (else float8), X_GROUP (codes per scale of the activations
// along K, 0: one per token), STAGES, MIN_BLOCKS, PRODUCER_REGS, WIDENER_REGS, CONSUMER_REGS. `wgmma(d, a, b, add)` comes from
// scaled_mm.py.

#include "decode.cuh"
#include "tiles.cuh"
#include "early.cuh"

#if S8
typedef int Product;
#else
typedef float Product;
#endif

constexpr bool NARROW = BITS == 4;
constexpr int THREADS = 128 * (CONSUMERS + NARROW + 1);
constexpr int DEPTH = 128;  // codes of K per stage: what a row of the swizzle has
// A stage: W as codes of 8 bits, the activations, and W as it came.
constexpr int W_BYTES = ROWS * DEPTH, X_BYTES = TOKENS * DEPTH, RAW_ROW = DEPTH / 2, RAW_BYTES = NARROW ? ROWS * RAW_ROW : 0;
constexpr int STAGE_BYTES = W_BYTES + X_BYTES + RAW_BYTES;
constexpr u64 SWIZZLED = 1ull << 62 | 64ull << 32;  // rows of 128 bytes, in a descriptor of shared memory
constexpr bool W_ALONG_K = SCALE_MODE != PER_ROW;
constexpr int PART = W_ALONG_K && GROUP < DEPTH ? GROUP : DEPTH, STAGE_PARTS = DEPTH / PART;
// Rows of the products that have scales of W of their own: of a warpgroup's tiles, and of the 16 rows of a warp. Where TURNED,
// W has one for all of a tile.
constexpr int SCALED = TURNED ? 1 : ROW_TILES, HALVES = TURNED || SCALE_N % 16 == 0 ? 1 : 2;
static_assert(!TURNED || (W_ALONG_K && SCALE_N % ROWS == 0), "tokens are the rows where W has blocks of scales");

// A box of the matrix behind a tensor map, of rows of BYTES. Elements of two bytes stand for the codes in them.
template <int BYTES>
__device__ __forceinline__ void copy_box(u32 to, const TensorMap &map, int step, int row, u32 bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(step * (BYTES / 2)), "r"(row), "r"(bar) : "memory");
}

__device__ __forceinline__ void expect_bytes(u32 bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ float read_float(u32 from) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from));
    return v;
}

// Registers that a product under way writes are not to be read before the wait for it.
__device__ __forceinline__ void written(Product &v) {
#if S8
    asm volatile("" : "+r"(v)::"memory");
#else
    asm volatile("" : "+f"(v)::"memory");
#endif
}

// Where scales or zero points of the part `p` of a stage lie along K.
__device__ __forceinline__ int scale_column(const Arguments &a, int step, int p) {
    const int column = W_ALONG_K ? (step * DEPTH + p * PART) / GROUP : 0;
    return STAGE_PARTS > 1 ? min(column, a.scale_columns - 1) : column;
}

// One instruction each, which the compiler is not to take apart: A & B | C; A & B ^ C; B, and the bits of C that A lacks.
#define LOP3(name, table) \
    __device__ __forceinline__ u32 name(u32 a, u32 b, u32 c) { \
        u32 d; \
        asm("lop3.b32 %0, %1, %2, %3, " table ";" : "=r"(d) : "r"(a), "r"(b), "r"(c)); \
        return d; \
    }
LOP3(and_or, "0xea")
LOP3(and_xor, "0x6a")
LOP3(or_missing, "0xce")

// The codes of 4 bits in the low halves of four bytes, as 8-bit codes of 2^-CODES_UNIT of their levels: int8, or float8 e4m3,
// which counts evenly from 0 to 16 in units of 2^-9, through its denormals and two exponents. The upper halves are dirty.
// `zero` is the zero point in every byte. No byte borrows from the next, and bit 7 says what is not negative.
__device__ __forceinline__ u32 widened(u32 codes, u32 zero) {
    constexpr u32 SIGNS = 0x80808080;
    if constexpr (!ZERO && S8) return and_xor(codes << 4, 0xf0f0f0f0, SIGNS);
    if constexpr (!ZERO) return or_missing(codes << 4, __vabsdiffu4(codes & 0x0f0f0f0f, 0x08080808), SIGNS);
    const u32 above = and_or(codes, 0x0f0f0f0f, SIGNS);
    return S8 ? above - zero ^ SIGNS : or_missing(above - zero, __vabsdiffu4(above, zero | SIGNS), SIGNS);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
scaled_mm(const __grid_constant__ Arguments a, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
          const __grid_constant__ TensorMap y_map, const Exchange exchange, const float *x_scales, int cut) {
    extern __shared__ u8 memory[];
    __shared__ alignas(8) u64 barriers[(2 + NARROW) * STAGES];
    let_the_next_start();
    // The 128-byte swizzle counts from multiples of 1024.
    u32 ring = (shared_address(memory) + 1023) & ~1023u, full = shared_address(barriers);
    keep(ring), keep(full);
    const u32 out = ring + STAGES * STAGE_BYTES, scale_ring = out + CONSUMERS * OUT_BYTES;
    const u32 empty = full + 8 * STAGES, ready = NARROW ? empty + 8 * STAGES : full;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, X_GROUP ? 34 : 2), barrier_init(empty + 8 * i, 4 * CONSUMERS);
            if constexpr (NARROW) barrier_init(ready + 8 * i, 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int steps = (a.k + DEPTH - 1) / DEPTH;
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;
    int slot = 0;
    u32 phase = 0;
    const auto advance = [&]() {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    };
    if (group == CONSUMERS + NARROW) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        Work work(a, steps, cut);
        Piece piece;
        if (warp > 0) wait_for_the_kernel_before();
        if (warp < 2 && lane == 0) {
            while (work.next(piece)) {
                const Tile at = tile_at(a, piece.tile);
#pragma unroll 1
                for (int step = piece.begin; step < piece.end; step++, advance()) {
                    wait_barrier(empty + 8 * slot, phase ^ 1);
                    const u32 to = ring + slot * STAGE_BYTES, bar = full + 8 * slot;
                    expect_bytes(bar, warp == 1 ? X_BYTES : NARROW ? RAW_BYTES : W_BYTES);
                    if (warp == 1) copy_box<DEPTH>(to + W_BYTES, x_map, step, at.token, bar);
                    else if (NARROW) copy_box<RAW_ROW>(to + W_BYTES + X_BYTES, w_map, step, at.row, bar);
                    else copy_box<DEPTH>(to, w_map, step, at.row, bar);
                }
            }
        } else if (X_GROUP && warp == 2) {
            // Scales of the stage's tokens, which lie `steps` apart.
            while (work.next(piece)) {
                const int token = tile_at(a, piece.tile).token;
#pragma unroll 1
                for (int step = piece.begin; step < piece.end; step++, advance()) {
                    wait_barrier(empty + 8 * slot, phase ^ 1);
#pragma unroll
                    for (int t = lane; t < TOKENS; t += 32)
                        copy<4>(scale_ring + (slot * TOKENS + t) * 4,
                                (const u8 *)(x_scales + (long long)min(token + t, a.m - 1) * steps + step), true);
                    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full + 8 * slot) : "memory");
                }
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
        }
        return;
    }
    if (NARROW && group == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WIDENER_REGS));
        Work work(a, steps, cut);
        Piece piece;
        // Four threads have a row, 32 codes of it each: 16 bytes, and 32 of the swizzled rows that products read.
        constexpr int COUNT = ROWS / 32;
        const int row = threadIdx.x % 128 / 4, part = quad * 32 / PART;
        const u32 from = ring + W_BYTES + X_BYTES + row * RAW_ROW + quad * 16;
        const u32 to = ring + row * DEPTH, first = (2 * quad ^ row % 8) * 16;
        while (work.next(piece)) {
            const int first_row = tile_at(a, piece.tile).row;
            for (int step = piece.begin; step < piece.end; step++, advance()) {
                u32 words[COUNT][4], zero[COUNT];
                if constexpr (ZERO)
#pragma unroll
                    for (int i = 0; i < COUNT; i++)
                        zero[i] = load_zero(scale_row(a, min(first_row + row + 32 * i, a.n - 1)), scale_column(a, step, part)) * 0x01010101;
                wait_barrier(full + 8 * slot, phase);
#pragma unroll
                for (int i = 0; i < COUNT; i++) read_shared<16>(words[i], from + slot * STAGE_BYTES + i * 32 * RAW_ROW);
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    u32 wide[8];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const u32 odd = words[i][j] >> 4;
                        wide[2 * j] = widened(__byte_perm(words[i][j], odd, 0x5140), zero[i]);
                        wide[2 * j + 1] = widened(__byte_perm(words[i][j], odd, 0x7362), zero[i]);
                    }
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + slot * STAGE_BYTES + i * 32 * DEPTH + (first ^ h * 16)),
                                     "r"(wide[4 * h]), "r"(wide[4 * h + 1]), "r"(wide[4 * h + 2]), "r"(wide[4 * h + 3]) : "memory");
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                __syncwarp();
                if (lane == 0) arrive_barrier(ready + 8 * slot);
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
    Work work(a, steps, cut);
    Piece piece;
    const int warp_row = group * 64 * ROW_TILES + warp * 16, base_row = warp_row + lane / 4;
    // Where blocks leave sums and flags, the kernel before may still have something else.
    wait_for_the_kernel_before();
    while (work.next(piece)) {
        const Tile at = tile_at(a, piece.tile);
        Sum acc[ROW_TILES][COLUMNS / 2];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < COLUMNS / 2; e++) acc[i][e] = 0;
        // Scales are on their way a stage ahead.
        RawScale raw[SCALED][HALVES][STAGE_PARTS];
        ScaleRow scale_rows[SCALED][HALVES];
        const auto load_scales = [&](int step) {
#pragma unroll
            for (int i = 0; i < SCALED; i++)
#pragma unroll
                for (int h = 0; h < HALVES; h++)
#pragma unroll
                    for (int p = 0; p < STAGE_PARTS; p++)
                        raw[i][h][p] = load_scale(scale_rows[i][h], scale_column(a, min(step, piece.end - 1), p));
        };
#pragma unroll
        for (int i = 0; i < SCALED; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++) scale_rows[i][h] = scale_row(a, min(at.row + (TURNED ? 0 : base_row + 64 * i + 8 * h), a.n - 1));
        if constexpr (W_ALONG_K) load_scales(piece.begin);
        wait_barrier(ready + 8 * slot, phase);
        for (int step = piece.begin; step < piece.end; step++) {
            const int this_slot = slot;
            // The same in all lanes, so that the compiler keeps descriptors where products take them from.
            const u32 stage = ring + slot * STAGE_BYTES >> 4 | 1 << 16, other = TURNED ? W_BYTES / 16 : 0;
            const u32 rows_at = __shfl_sync(~0u, stage + other + group * (ROW_TILES * 64 * DEPTH / 16), 0);
            const u32 columns_at = __shfl_sync(~0u, stage + W_BYTES / 16 - other, 0);
            const auto multiply = [&](Product(&d)[COLUMNS / 2], int i, int p, bool anew) {
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int s = 0; s < PART / 32; s++) {
                    const int k = 2 * (p * (PART / 32) + s);
                    wgmma(d, SWIZZLED | rows_at + i * (64 * DEPTH / 16) + k, SWIZZLED | columns_at + k, !anew || s > 0);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            };
            const auto release = [&](int slot) {
                if (lane == 0) arrive_barrier(empty + 8 * slot);
            };
            // What the next stage needs, while the products of this one are under way.
            const auto prepare = [&]() {
                if constexpr (W_ALONG_K) load_scales(step + 1);
                advance();
                if (step + 1 < piece.end) wait_barrier(ready + 8 * slot, phase);
            };
#if INTEGER
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) multiply(acc[i], i, 0, false);
            prepare();
            // All but the products of this stage are done.
            asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(ROW_TILES) : "memory");
            if (step > piece.begin) release(this_slot == 0 ? STAGES - 1 : this_slot - 1);
#else
            float scale[SCALED][HALVES][STAGE_PARTS];
#pragma unroll
            for (int i = 0; i < SCALED; i++)
#pragma unroll
                for (int h = 0; h < HALVES; h++)
#pragma unroll
                    for (int p = 0; p < STAGE_PARTS; p++) scale[i][h][p] = W_ALONG_K ? scale_value(a, raw[i][h][p]) : 1;
            const u32 token_scales = scale_ring + this_slot * TOKENS * 4;
#pragma unroll
            for (int p = 0; p < STAGE_PARTS; p++)
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    const bool last = p == STAGE_PARTS - 1 && i == ROW_TILES - 1;
                    Product part[COLUMNS / 2];
                    multiply(part, i, p, true);
                    float of_row[2];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        of_row[h] = scale[i % SCALED][h % HALVES][p];
                        if constexpr (X_GROUP && TURNED) of_row[h] *= read_float(token_scales + (base_row + 64 * i + 8 * h) * 4);
                    }
                    if (last) prepare();
                    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                    if ((!X_GROUP || TURNED) && last) release(this_slot);
#pragma unroll
                    for (int j = 0; j < COLUMNS / 8; j++) {
                        float of_column[2] = {1, 1};
                        if constexpr (X_GROUP && !TURNED)
                            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(of_column[0]), "=f"(of_column[1])
                                         : "r"(token_scales + (8 * j + 2 * quad) * 4));
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            written(part[4 * j + e]);
                            acc[i][4 * j + e] += (float)part[4 * j + e] * (of_column[e % 2] * of_row[e / 2]);
                        }
                    }
                    if (X_GROUP && !TURNED && last) {
                        __syncwarp();
                        release(this_slot);
                    }
                }
#endif
        }
#if INTEGER
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane == 0) arrive_barrier(empty + 8 * (slot == 0 ? STAGES - 1 : slot - 1));
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < COLUMNS / 2; e++) written(acc[i][e]);
#endif
        const int first_row = (TURNED ? at.token : at.row) + warp_row, first_column = TURNED ? at.row : at.token;
        finish_piece(a, y_map, work, piece, acc, exchange, group, first_row, first_column, out + group * OUT_BYTES);
    }
    wait_for_outputs();
}
