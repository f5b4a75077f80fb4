// y (M, N) = x (M, K) W (N, K)^T of 8-bit codes, both as they lie: int8 into int32, float8 into fp32; one scale per row of W
// and one per token, bias, one rounding. Hopper's matrix units take both operands from shared memory. Few tokens are a
// matter of how many bytes are under way, and many of the tiles' shape: both are constants.
//
// Or float8 times 4-bit codes whose values float8 holds exactly: they are looked up and come from registers, and their
// scales, of rows or of groups along K, multiply fp32 sums.
//
// One thread brings W, another the activations, through tensor maps, in stages of 128 codes of K; CONSUMERS warpgroups
// multiply. W does not wait for the kernel ahead, which quantizes the activations. tiles.cuh says which tiles a block has.
//
// Hopper's float8 units keep about 14 bits of a sum: sums of at most 128 products are added in fp32.
//
// Compiled with -D beyond those of decode.cuh and tiles.cuh: STAGES, MIN_BLOCKS, and for codes of 4 bits EVEN_LOW to
// ODD_HIGH (their values), PRODUCER_REGS and CONSUMER_REGS. `wgmma(d, a, b, add)` comes from scaled_mm.py.

#include "decode.cuh"
#include "tiles.cuh"

constexpr bool LOOKED_UP = BITS == 4;
constexpr int THREADS = 128 * CONSUMERS + (LOOKED_UP ? 128 : 64);
constexpr int DEPTH = 128;  // codes of K per stage: what a row of the swizzle has
constexpr int W_ROW = DEPTH * BITS / 8, W_BYTES = ROWS * W_ROW, X_BYTES = TOKENS * DEPTH, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr u64 SWIZZLED = 1ull << 62 | 64ull << 32;  // rows of 128 bytes, in a descriptor of shared memory

// A box of the matrix behind a tensor map, from a column on, counted in elements of two bytes.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap &map, int column, int row, u32 bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(bar) : "memory");
}

__device__ __forceinline__ void expect_bytes(u32 bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Registers that a product under way writes are not to be read before the wait for it.
__device__ __forceinline__ void written(Sum &v) {
#if INTEGER
    asm volatile("" : "+r"(v)::"memory");
#else
    asm volatile("" : "+f"(v)::"memory");
#endif
}

#if BITS == 4
constexpr int CHAIN = SCALE_MODE == PER_ROW || GROUP >= DEPTH ? 4 : GROUP / 32;  // products of 32 codes that one scale has
constexpr int CHAINS = 4 / CHAIN;

// float8 of the four codes in the low half of a word. A byte permutation looks up eight entries by three bits of each
// code: which pair of codes it is. The fourth bit, its lowest, chooses one of the two by the permutation's way of copying
// signs: where it is set, all bits of the third operand's 0x80 are.
__device__ __forceinline__ u32 looked_up(u32 codes) {
    const u32 pairs = codes >> 1 & 0x7777;
    const u32 even = __byte_perm(EVEN_LOW, EVEN_HIGH, pairs), odd = __byte_perm(ODD_LOW, ODD_HIGH, pairs);
    u32 is_odd;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(is_odd) : "r"(0x80808080), "r"(codes << 3));
    return even & ~is_odd | odd & is_odd;
}

// Rows of 64 bytes: where the copy engine's swizzle puts 16 of them.
__device__ __forceinline__ u32 piece_at(int row, int piece) { return row * 64 + (piece ^ row / 2 % 4) * 16; }

// The operands of a stage: of the 16 rows of a warp a lane has two, and of 32 codes two runs of four.
__device__ __forceinline__ void look_up_stage(u32 (&frag)[4][4], u32 stage, int row, u32 select) {
#pragma unroll
    for (int part = 0; part < 4; part++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 words[4];
            read_shared<16>(words, stage + piece_at(row + 8 * h, part));
            frag[part][h] = looked_up(__byte_perm(words[0], words[1], select));
            frag[part][2 + h] = looked_up(__byte_perm(words[2], words[3], select));
        }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
scaled_mm(const __grid_constant__ Arguments a, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
          const Exchange exchange, int cut) {
    extern __shared__ u8 memory[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    // The 128-byte swizzle counts from multiples of 1024.
    const u32 ring = (shared_address(memory) + 1023) & ~1023u, out = ring + STAGES * STAGE_BYTES;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 2), barrier_init(empty + 8 * i, 4 * CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    Work work(a, (a.k + DEPTH - 1) / DEPTH, cut);
    Piece piece;
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    int slot = 0;
    if (group == CONSUMERS) {
#if BITS == 4
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
#endif
        if (lane > 0 || warp > 1) return;
        const bool brings_x = warp == 1;
        u32 phase = 1;
        if (brings_x) asm volatile("griddepcontrol.wait;" ::: "memory");
        while (work.next(piece)) {
            const Tile at = tile_at(a, piece.tile);
            for (int step = piece.begin; step < piece.end; step++) {
                wait_barrier(empty + 8 * slot, phase);
                const u32 to = ring + slot * STAGE_BYTES, bar = full + 8 * slot;
                expect_bytes(bar, brings_x ? X_BYTES : W_BYTES);
                if (brings_x) copy_box(to + W_BYTES, x_map, step * (DEPTH / 2), at.token, bar);
                else copy_box(to, w_map, step * (W_ROW / 2), at.row, bar);
                if (++slot == STAGES) slot = 0, phase ^= 1;
            }
        }
        return;
    }
#if BITS == 4
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
#endif
    u32 phase = 0;
    // Where blocks leave sums and flags, the kernel before may still have something else.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    while (work.next(piece)) {
        const Tile at = tile_at(a, piece.tile);
        Sum acc[ROW_TILES][TOKENS / 2];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < TOKENS / 2; e++) acc[i][e] = 0;
#if BITS == 4
        const int own_row = group * 64 + warp * 16 + lane / 4;
        // Two bytes out of eight, for a lane of four.
        const u32 select = 0x4400 | 2 * (lane % 4) | (2 * (lane % 4) + 1) << 4;
        u32 frag[4][4];
        RawScale raw[CHAINS][2];
        const ScaleRow scale_rows[2] = {scale_row(a, min(at.row + own_row, a.n - 1)), scale_row(a, min(at.row + own_row + 8, a.n - 1))};
        const auto load_scales = [&](int step) {
            if constexpr (SCALE_MODE != PER_ROW)
#pragma unroll
                for (int c = 0; c < CHAINS; c++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        raw[c][h] = load_scale(scale_rows[h], min((step * DEPTH + c * CHAIN * 32) / GROUP, a.scale_columns - 1));
        };
        load_scales(piece.begin);
        wait_barrier(full + 8 * slot, phase);
        look_up_stage(frag, ring + slot * STAGE_BYTES, own_row, select);
        for (int step = piece.begin; step < piece.end; step++) {
            const u32 x = __shfl_sync(~0u, ring + slot * STAGE_BYTES + W_BYTES >> 4 | 1 << 16, 0);
            const int used = slot;
            if (++slot == STAGES) slot = 0, phase ^= 1;
            u32 next[4][4];
#pragma unroll
            for (int c = 0; c < CHAINS; c++) {
                Sum part[TOKENS / 2];
                float scales[2] = {1, 1};
                if constexpr (SCALE_MODE != PER_ROW) scales[0] = scale_value(a, raw[c][0]), scales[1] = scale_value(a, raw[c][1]);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int i = 0; i < CHAIN; i++) wgmma(part, frag[c * CHAIN + i], SWIZZLED | x + 2 * (c * CHAIN + i), i > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (c == CHAINS - 1 && step + 1 < piece.end) {
                    // The next operands, while these are multiplied.
                    load_scales(step + 1);
                    wait_barrier(full + 8 * slot, phase);
                    look_up_stage(next, ring + slot * STAGE_BYTES, own_row, select);
                }
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                if (c == CHAINS - 1 && lane == 0) arrive_barrier(empty + 8 * used);
#pragma unroll
                for (int e = 0; e < TOKENS / 2; e++) written(part[e]), acc[0][e] += part[e] * scales[e / 2 % 2];
            }
#pragma unroll
            for (int i = 0; i < 16; i++) frag[i / 4][i % 4] = next[i / 4][i % 4];
        }
#else
        for (int step = piece.begin; step < piece.end; step++) {
            wait_barrier(full + 8 * slot, phase);
            // The same in all lanes, so that the compiler keeps descriptors where products take them from.
            const u32 stage = __shfl_sync(~0u, ring + slot * STAGE_BYTES >> 4 | 1 << 16, 0);
            const auto multiply = [&](Sum(&d)[TOKENS / 2], int i, bool anew) {
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int part = 0; part < DEPTH / 32; part++) {
                    const u32 w = stage + (group * ROW_TILES + i) * (64 * DEPTH / 16) + 2 * part;
                    wgmma(d, SWIZZLED | w, SWIZZLED | stage + W_BYTES / 16 + 2 * part, !anew || part > 0);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            };
#if INTEGER
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) multiply(acc[i], i, false);
            // All but the products of this stage are done.
            asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(ROW_TILES) : "memory");
            if (step > piece.begin && lane == 0) arrive_barrier(empty + 8 * (slot == 0 ? STAGES - 1 : slot - 1));
#else
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                Sum part[TOKENS / 2];
                multiply(part, i, true);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                if (i == ROW_TILES - 1 && lane == 0) arrive_barrier(empty + 8 * slot);
#pragma unroll
                for (int e = 0; e < TOKENS / 2; e++) written(part[e]), acc[i][e] += part[e];
            }
#endif
            if (++slot == STAGES) slot = 0, phase ^= 1;
        }
#endif
#if INTEGER
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane == 0) arrive_barrier(empty + 8 * (slot == 0 ? STAGES - 1 : slot - 1));
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < TOKENS / 2; e++) written(acc[i][e]);
#endif
        finish_piece(a, work, piece, acc, exchange, group, at.row + group * 64 * ROW_TILES + warp * 16, at.token,
                     out + threadIdx.x / 32 * OUT_TOKENS * OUT_STRIDE);
    }
}
