// y (M, N) = x (M, K) W (N, K)^T of 8-bit codes, both as they lie: int8 into int32, float8 into fp32; one scale per row of W
// and one per token, bias, one rounding. Hopper's matrix units take both operands from shared memory. Few tokens are a
// matter of how many bytes are under way, and many of the tiles' shape: both are constants.
//
// One thread brings W, another the activations, through tensor maps, in stages of 128 codes of K; CONSUMERS warpgroups
// multiply. W does not wait for the kernel ahead, which quantizes the activations. tiles.cuh says which tiles a block has.
//
// Hopper's float8 units keep about 14 bits of a sum: sums of 128 products are added in fp32.
//
// Compiled with -D beyond those of decode.cuh and tiles.cuh: STAGES, MIN_BLOCKS. `wgmma(d, a, b, add)` comes from
// scaled_mm.py.

#include "decode.cuh"
#include "tiles.cuh"

constexpr int THREADS = 128 * CONSUMERS + 64;
constexpr int DEPTH = 128;  // codes of K per stage: what a row of the swizzle has
constexpr int W_BYTES = ROWS * DEPTH, X_BYTES = TOKENS * DEPTH, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr u64 SWIZZLED = 1ull << 62 | 64ull << 32;  // rows of 128 bytes, in a descriptor of shared memory

// A box of the matrix behind a tensor map. Half as many elements as codes: they are taken for elements of two bytes.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap &map, int step, int row, u32 bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(step * (DEPTH / 2)), "r"(row), "r"(bar) : "memory");
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
        if (lane > 0) return;
        const bool brings_x = warp == 1;
        u32 phase = 1;
        if (brings_x) asm volatile("griddepcontrol.wait;" ::: "memory");
        while (work.next(piece)) {
            const Tile at = tile_at(a, piece.tile);
            for (int step = piece.begin; step < piece.end; step++) {
                wait_barrier(empty + 8 * slot, phase);
                const u32 to = ring + slot * STAGE_BYTES, bar = full + 8 * slot;
                expect_bytes(bar, brings_x ? X_BYTES : W_BYTES);
                if (brings_x) copy_box(to + W_BYTES, x_map, step, at.token, bar);
                else copy_box(to, w_map, step, at.row, bar);
                if (++slot == STAGES) slot = 0, phase ^= 1;
            }
        }
        return;
    }
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
