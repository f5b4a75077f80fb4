// y (M, N) = x (M, K) W (N, K)^T for tiles of TOKENS tokens; W in any format, straight from the canonical planes. bf16
// or fp16 activations, wgmma with the decoded weights in registers, fp32 accumulation in a fixed order. Hopper only.
//
// One producer warpgroup copies, CONSUMERS warpgroups decode and multiply; each of these owns 64 * ROW_TILES rows. As
// in small_m.cu the order of K inside a product is free: a lane owns 16 consecutive bytes of its row (a chunk), so four
// lanes own STEP consecutive weights. `pack_x` lays the activations out in that order, pair by pair, as images of shared
// memory, and bulk copies bring them there; weights are neither packed nor shuffled and are read once. Or, where OWN_ORDER,
// activations come as they are, through a tensor map: decoding takes one instruction more per pair, and no kernel is
// needed ahead. The blocks of a cluster bring a part of the activations each, to all of them: of the energy of a product of
// thousands of tokens, which run at the GPU's power limit, bringing all to every block takes a tenth.
//
// While the tensor cores multiply some steps of 16 weights, the next is decoded into other registers. Copies for the next
// tile are under way while a warp writes its outputs, and warpgroups drift apart, so that one multiplies while another
// writes. tiles.cuh says which tiles a block has.
//
// Compiled with -D beyond those of decode.cuh and tiles.cuh: OWN_ORDER, X_OCTETS (per stage of activations), X_STAGES,
// W_STAGES, MIN_BLOCKS, PRODUCER_REGS, CONSUMER_REGS. `wgmma(acc, frag, descriptor, add)` for TOKENS comes from wgmma.py.
// `Arguments::x` of wgmma_kernel are the images, if there are any.

#include "decode.cuh"
#include "tiles.cuh"
#include "cluster.cuh"
#include "early.cuh"

constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int IMAGES = STEP / 64;  // per stage of weights; two octets each
constexpr int IMAGE_BYTES = TOKENS * 128, X_BYTES = X_OCTETS / 2 * IMAGE_BYTES;
constexpr int BATCH = 2;  // steps of 16 weights that are multiplied together; four proved no faster
constexpr int BATCHES = 2 * OCTETS / BATCH;  // per step
constexpr int X_STEPS = OCTETS / X_OCTETS;  // stages of activations per stage of weights
constexpr int W_BYTES = ROWS * 4 * (16 + TWO + ONE);
constexpr int PIECES = OWN_ORDER ? 4 / BATCHES : 2;  // of 16 bytes of a row, per batch
constexpr int STEP_SCALES = OWN_ORDER && SCALE_MODE == PER_CHUNK && GROUP < STEP ? STEP / GROUP : SCALES;  // that a lane needs
constexpr int W_THREADS = 64;  // of the producers, the others bring activations
constexpr int SHARE = TOKENS / CLUSTER;  // of the tokens, that a block brings to its cluster
constexpr u16 ALL_BLOCKS = (1 << CLUSTER) - 1;
// Groups of whole steps multiply fp32 sums where these are few; else scales multiply the decoded pairs.
constexpr bool SUMS = SCALE_MODE == PER_STEP;

// One plane of a tile: four chunks of BYTES of every row, from the byte `at` of the row. `rows` are byte offsets.
template <int BYTES>
__device__ __forceinline__ void copy_plane(u32 to, const u8 *from, const u32 (&rows)[ROWS * 4 / W_THREADS], bool valid) {
#pragma unroll
    for (int i = 0; i < ROWS * 4 / W_THREADS; i++)
        copy<BYTES>(to + (i * W_THREADS + threadIdx.x) * BYTES, from + (valid ? rows[i] : 0), valid);
}

// Sixteen bytes of every row are moved so that eight rows can be read at a time, where lanes share what they read.
__device__ __forceinline__ int moved_piece(int row, int piece) { return OWN_ORDER ? piece ^ row / 2 % 4 : piece; }

// Activations for all blocks of the cluster, each of which counts the bytes: SHARE tokens and 64 of K from a matrix, or images.
__device__ __forceinline__ void bring(u32 to, u32 bar, const TensorMap &map, int k, int token) {
#if CLUSTER > 1
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(k), "r"(token), "r"(bar), "h"(ALL_BLOCKS) : "memory");
#else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                     "r"(to), "l"(&map), "r"(k), "r"(token), "r"(bar) : "memory");
#endif
}

__device__ __forceinline__ void bring(u32 to, u32 bar, const u8 *images) {
#if CLUSTER > 1
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::
                     "r"(to), "l"(images), "n"(X_BYTES / CLUSTER), "r"(bar), "h"(ALL_BLOCKS) : "memory");
#else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(images),
                 "n"(X_BYTES), "r"(bar) : "memory");
#endif
}

// A warp is done with a stage of activations: every block of the cluster hears of it from a lane of its own, for which
// `bar` is that block's barrier.
__device__ __forceinline__ void leave_stage(u32 bar, int lane) {
#if CLUSTER > 1
    if (lane < CLUSTER) asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
#else
    if (lane == 0) arrive_barrier(bar);
#endif
}

// `chunk` counts the four chunks of every row of the stage.
__device__ __forceinline__ void read_chunk(Chunk &c, u32 stage, u32 chunk) {
    read_shared<16>(c.main, stage + chunk * 16);
    if constexpr (HAS_2) read_shared<TWO>(c.two, stage + ROWS * 64 + chunk * TWO);
    if constexpr (HAS_1) read_shared<ONE>(c.one, stage + ROWS * (64 + 4 * TWO) + chunk * ONE);
}

// Images of the activations: for every tile of TOKENS tokens and every 64 weights of K the bytes that shared memory is to
// hold. A row has 128 bytes in pieces of 16; piece c, which the swizzle moves to c ^ token % 8, holds for each of the four
// lanes the pair c of the 16 weights which that lane owns there. One thread per piece.
extern "C" __global__ void __launch_bounds__(256) pack_x(const u16 *x, uint4 *images, int m, int k, int count) {
    let_the_next_start();
    wait_for_the_kernel_before();
    const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    const int place = i % 8, row = i / 8 % TOKENS, piece = place ^ row % 8;
    const int image = i / (8 * TOKENS) % count;
    const long long token = i / (8 * TOKENS) / count * TOKENS + row;
    if (token >= (m + TOKENS - 1) / TOKENS * TOKENS) return;
    const Pair pair = pair_codes(image % IMAGES * 8 + piece);
    u32 word[4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const int at = image / IMAGES * STEP + q * CHUNK;
        const u16 *from = x + token * k + at;
        word[q] = token < m && at < k ? __ldg(from + pair.first) | (u32)__ldg(from + pair.second) << 16 : 0;
    }
    images[i] = make_uint4(word[0], word[1], word[2], word[3]);
}

#if CLUSTER > 1
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, MIN_BLOCKS)
#else
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
#endif
wgmma_kernel(const __grid_constant__ Arguments a, const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap y_map,
             const Exchange exchange, int cut) {
    extern __shared__ u8 memory[];
    __shared__ alignas(8) u64 barriers[2 * X_STAGES + 2 * W_STAGES];
    __shared__ u32 tables[TABLE_WORDS];
    let_the_next_start();
    // The 128-byte swizzle counts from multiples of 1024.
    u32 x_ring = (shared_address(memory) + 1023) & ~1023u, w_ring = x_ring + X_STAGES * X_BYTES;
    keep(x_ring), keep(w_ring);
    const u32 out = w_ring + W_STAGES * W_BYTES;
    const u32 full = shared_address(barriers), empty = full + 8 * X_STAGES, w_full = empty + 8 * X_STAGES,
              w_empty = w_full + 8 * W_STAGES;
    const u32 table = fill_table(tables, a);
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 4 * CONSUMERS * CLUSTER);
        for (int i = 0; i < W_STAGES; i++) barrier_init(w_full + 8 * i, W_THREADS), barrier_init(w_empty + 8 * i, 4 * CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    arrive_cluster();
    wait_cluster();

    Work work(a, (a.k + STEP - 1) / STEP, cut);
    Piece piece;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        int slot = 0;
        u32 phase = 1;
        if (threadIdx.x < W_THREADS) {
            // A thread copies the same chunk of ROWS * 4 / W_THREADS rows in every step.
            constexpr int COUNT = ROWS * 4 / W_THREADS;
            const int chunk = threadIdx.x % 4, place = moved_piece(threadIdx.x / 4, chunk) - chunk;
            while (work.next(piece)) {
                const int first_row = min(tile_at(a, piece.tile).row, a.n - 1);
                u32 rows[COUNT], rows2[COUNT], rows1[COUNT];
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    const u32 row = min(first_row + (int)threadIdx.x / 4 + i * (W_THREADS / 4), a.n - 1) - first_row;
                    rows[i] = row * (u32)a.stride;
                    if constexpr (HAS_2) rows2[i] = row * (u32)a.stride2;
                    if constexpr (HAS_1) rows1[i] = row * (u32)a.stride1;
                }
                const u8 *codes = a.codes + (long long)first_row * a.stride + piece.begin * 64 + chunk * 16;
                const u8 *codes2 = a.codes2 + (long long)first_row * a.stride2 + piece.begin * 4 * TWO + chunk * TWO;
                const u8 *codes1 = a.codes1 + (long long)first_row * a.stride1 + piece.begin * 4 * ONE + chunk * ONE;
                for (int step = piece.begin; step < piece.end; step++) {
                    wait_barrier(w_empty + 8 * slot, phase);
                    const u32 to = w_ring + slot * W_BYTES + place * 16;
                    const bool valid = step * STEP + chunk * CHUNK < a.k;
                    copy_plane<16>(to, valid ? codes : a.codes, rows, valid);
                    if constexpr (HAS_2) copy_plane<TWO>(to + ROWS * 64, valid ? codes2 : a.codes2, rows2, valid);
                    if constexpr (HAS_1) copy_plane<ONE>(to + ROWS * (64 + 4 * TWO), valid ? codes1 : a.codes1, rows1, valid);
                    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(w_full + 8 * slot) : "memory");
                    codes += 64, codes2 += 4 * TWO, codes1 += 4 * ONE;
                    if (++slot == W_STAGES) slot = 0, phase ^= 1;
                }
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
        } else if (threadIdx.x == W_THREADS) {
            // What is multiplied is the work of the kernel before.
            wait_for_the_kernel_before();
            while (work.next(piece)) {
                const int token = tile_at(a, piece.tile).token;
                const u8 *images = (const u8 *)a.x + ((long long)token / TOKENS * work.steps + piece.begin) * IMAGES * IMAGE_BYTES;
                for (int stage = piece.begin * X_STEPS; stage < piece.end * X_STEPS; stage++) {
                    wait_barrier(empty + 8 * slot, phase);
                    const u32 to = x_ring + slot * X_BYTES, bar = full + 8 * slot;
                    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "n"(X_BYTES) : "memory");
                    if constexpr (OWN_ORDER) {
#pragma unroll
                        for (int i = 0; i < X_OCTETS / 2; i++)
                            bring(to + i * IMAGE_BYTES + rank() * SHARE * 128, bar, map, (stage * (X_OCTETS / 2) + i) * 64,
                                  token + rank() * SHARE);
                    } else {
                        bring(to + rank() * (X_BYTES / CLUSTER), bar, images + rank() * (X_BYTES / CLUSTER));
                        images += X_BYTES;
                    }
                    if (++slot == X_STAGES) slot = 0, phase ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
        const int group = threadIdx.x / 128 - 1, base_row = group * 64 * ROW_TILES + warp * 16 + lane / 4;
        u32 own_chunk = base_row * 4 + (OWN_ORDER ? 0 : quad);
        keep(own_chunk);
        const int moved = moved_piece(lane / 4, 0);
        const u32 select = selector();
        const u32 left = shared_of(empty, lane % CLUSTER);
        int slot = 0, w_slot = 0;
        u32 phase = 0, w_phase = 0;
        // Where blocks leave sums and flags, the kernel before may still have something else.
        wait_for_the_kernel_before();
        while (work.next(piece)) {
            const int begin = piece.begin, end = piece.end;
            const Tile at = tile_at(a, piece.tile);
            float acc[ROW_TILES][TOKENS / 2], part[ROW_TILES][TOKENS / 2], part_scale[ROW_TILES][2];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int e = 0; e < TOKENS / 2; e++) acc[i][e] = 0;
            auto add_part = [&]() {
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int e = 0; e < TOKENS / 2; e++) acc[i][e] += part[i][e] * part_scale[i][e / 2 % 2];
            };
            RawScale raw[ROW_TILES][2][STEP_SCALES];
            u32 zero[ROW_TILES][2][STEP_SCALES], words[ROW_TILES][2][4 * PIECES];
            ScaleRow scale_rows[ROW_TILES][2];
            Chunk chunks[ROW_TILES][2];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) scale_rows[i][h] = scale_row(a, min(at.row + base_row + 64 * i + 8 * h, a.n - 1));
            auto load_scales = [&](int step) {
#pragma unroll
                for (int s = 0; s < STEP_SCALES; s++) {
                    const int k = step * STEP + (SUMS ? 0 : OWN_ORDER ? s * GROUP : quad * CHUNK + s * (CHUNK / SCALES));
                    const int column = SCALE_MODE == PER_ROW ? 0 : min(k / GROUP, a.scale_columns - 1);
#pragma unroll
                    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            if constexpr (SCALE_MODE != PER_ROW) raw[i][h][s] = load_scale(scale_rows[i][h], column);
                            zero[i][h][s] = load_zero(scale_rows[i][h], column);
                        }
                }
            };
            // The chunks of a stage at once, or the words of one batch.
            auto read_weights = [&](int batch) {
                if (batch == 0) wait_barrier(w_full + 8 * w_slot, w_phase);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const u32 stage = w_ring + w_slot * W_BYTES, chunk = own_chunk + 256 * i + 32 * h;
                        if constexpr (!OWN_ORDER) read_chunk(chunks[i][h], stage, chunk);
                        else
#pragma unroll
                            for (int p = 0; p < PIECES; p++)
                                read_shared<16>(*(u32(*)[4])&words[i][h][4 * p], stage + (chunk + (batch * PIECES + p ^ moved)) * 16);
                    }
                if (OWN_ORDER && batch < BATCHES - 1) return;
                __syncwarp();
                if (lane == 0) arrive_barrier(w_empty + 8 * w_slot);
                if (++w_slot == W_STAGES) w_slot = 0, w_phase ^= 1;
            };
            load_scales(begin);
            read_weights(0);
            for (int step = begin; step < end; step++) {
                Factor factor[ROW_TILES][2][STEP_SCALES];
                u32 base[ROW_TILES][2][STEP_SCALES], frag[2][BATCH][ROW_TILES][4];
                float sum_scale[ROW_TILES][2];
                u32 images;
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
#pragma unroll
                        for (int s = 0; s < STEP_SCALES; s++) {
                            if constexpr (SCALE_MODE == PER_CHUNK) factor[i][h][s] = factor_of(scale_value(a, raw[i][h][s]));
                            base[i][h][s] = base_value(zero[i][h][s]);
                        }
                        if constexpr (SUMS) sum_scale[i][h] = scale_value(a, raw[i][h][0]);
                    }
                if (SCALE_MODE != PER_ROW && step + 1 < end) load_scales(step + 1);
                // Batches of steps of 16 weights, half an octet each.
#pragma unroll
                for (int batch = 0; batch < BATCHES; batch++) {
#pragma unroll
                    for (int b = 0; b < BATCH; b++)
#pragma unroll
                        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                            for (int h = 0; h < 2; h++)
#pragma unroll
                                for (int j = 0; j < 2; j++) {
                                    const int o = (batch * BATCH + b) / 2, of = o * STEP_SCALES / OCTETS, pair = 2 * (b % 2) + j;
                                    const u32 zero_of = base[i][h][of], *eights = &words[i][h][b * BITS / 2];
                                    u32 &w = frag[batch % 2][b][i][2 * j + h];
                                    if constexpr (SCALE_MODE == PER_CHUNK)
                                        w = OWN_ORDER ? decode_own_scaled(eights, j, select, zero_of, table, factor[i][h][of])
                                                      : decode_scaled(chunks[i][h], o, pair, zero_of, table, factor[i][h][of]);
                                    else
                                        w = OWN_ORDER ? decode_own(eights, j, select, zero_of, table)
                                                      : decode(chunks[i][h], o, pair, zero_of, table);
                                }
                    const int place = batch * BATCH % (2 * X_OCTETS);  // in the stage of activations
                    if (place == 0) {
                        wait_barrier(full + 8 * slot, phase);
                        // The same in all lanes, so that the compiler keeps descriptors where products take them from.
                        images = __shfl_sync(~0u, x_ring + slot * X_BYTES >> 4 | 1 << 16, 0);
                    }
                    if (SUMS && batch == 0 && step > begin) {
                        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                        add_part();
                    }
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                    for (int b = 0; b < BATCH; b++) {
                        const u32 at = images + (place + b) / 4 * (IMAGE_BYTES / 16) + (place + b) % 4 * 2;
                        const u64 descriptor = 1ull << 62 | 64ull << 32 | at;
#pragma unroll
                        for (int i = 0; i < ROW_TILES; i++) {
                            if constexpr (SUMS) wgmma(part[i], frag[batch % 2][b][i], descriptor, batch + b > 0);
                            else wgmma(acc[i], frag[batch % 2][b][i], descriptor, 1);
                        }
                    }
                    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                    if (OWN_ORDER && batch + 1 < BATCHES) read_weights(batch + 1);
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    // The batch before is done; with it, at the start of a stage, the stage before.
                    if (place == 0 && (batch > 0 || step > begin)) leave_stage(left + 8 * (slot == 0 ? X_STAGES - 1 : slot - 1), lane);
                    if (place == 2 * X_OCTETS - BATCH && ++slot == X_STAGES) slot = 0, phase ^= 1;
                }
                if (step + 1 < end) read_weights(0);  // while the last products are under way
                if constexpr (SUMS)
#pragma unroll
                    for (int i = 0; i < ROW_TILES; i++) part_scale[i][0] = sum_scale[i][0], part_scale[i][1] = sum_scale[i][1];
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            leave_stage(left + 8 * (slot == 0 ? X_STAGES - 1 : slot - 1), lane);
            if constexpr (SUMS) add_part();
            const int first_row = at.row + base_row - lane / 4;
            finish_piece(a, y_map, work, piece, acc, exchange, group, first_row, at.token, out + group * OUT_BYTES);
        }
        wait_for_outputs();
    }
    // No block goes while another may still tell it of a stage.
    __syncwarp();
    arrive_cluster();
    wait_cluster();
}
