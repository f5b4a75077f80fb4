// y (M, N) = x (M, K) W (N, K)^T for tiles of TOKENS tokens; W in any format, straight from the canonical planes. bf16
// activations, wgmma with the decoded weights in registers, fp32 accumulation in a fixed order. Hopper only.
//
// One producer warpgroup copies, two consumer warpgroups decode and multiply; each of these owns 64 * ROW_TILES rows. As
// in small_m.cu the order of K inside a product is free: a lane owns 16 consecutive bytes of its row (a chunk), so four
// lanes own STEP consecutive weights. `pack_x` lays the activations out in that order, pair by pair, as images of shared
// memory, and bulk copies bring them there; weights are neither packed nor shuffled and are read once.
//
// While the tensor cores multiply one octet (32 weights of K for four lanes), the next is decoded into other registers.
// SPLIT blocks of a cluster share K and add their sums in the order of their ranks through distributed shared memory.
//
// Compiled with -D beyond those of decode.cuh: TOKENS, ROW_TILES, SPLIT, X_STAGES, W_STAGES, MIN_BLOCKS, PRODUCER_REGS,
// CONSUMER_REGS. `wgmma(acc, frag, descriptor)` for TOKENS comes from wgmma.py. `Arguments::x` of wgmma_kernel are the
// images.

#include "decode.cuh"

constexpr int CONSUMERS = 2;
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int ROWS = 64 * ROW_TILES * CONSUMERS;
constexpr int X_STEPS = STEP / 64;  // stages of activations per stage of weights; two octets each
constexpr int X_BYTES = TOKENS * 128;
constexpr int TWO = HAS_2 ? CHUNK / 4 : 0, ONE = HAS_1 ? CHUNK / 8 : 0;  // bytes of a lane's chunk in the other planes
constexpr int W_BYTES = ROWS * 4 * (16 + TWO + ONE);
constexpr int W_THREADS = 64;  // of the producers, the others bring activations
constexpr int SUM_STRIDE = ROWS + 4;     // of a token in the sums; 4 more keep a warp's stores in different banks

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\n"
        "done:\n}" ::"r"(bar), "r"(parity) : "memory");
}

// Copies BYTES, or zeros.
template <int BYTES>
__device__ __forceinline__ void copy(u32 to, const void *from, bool valid) {
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
    }
}

// One plane of a tile: four chunks of BYTES of every row, from the byte `at` of the row. `rows` are byte offsets.
template <int BYTES>
__device__ __forceinline__ void copy_plane(u32 to, const u8 *from, const u32 (&rows)[ROWS * 4 / W_THREADS], bool valid) {
#pragma unroll
    for (int i = 0; i < ROWS * 4 / W_THREADS; i++)
        copy<BYTES>(to + (i * W_THREADS + threadIdx.x) * BYTES, from + (valid ? rows[i] : 0), valid);
}

template <int BYTES>
__device__ __forceinline__ void read_few(u32 (&out)[2], u32 from) {
    if constexpr (BYTES == 8) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(from));
    else asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[0]) : "r"(from));
}

__device__ __forceinline__ void read_chunk(Chunk &c, u32 stage, int row, int quad) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(c.main[0]), "=r"(c.main[1]), "=r"(c.main[2]), "=r"(c.main[3]) : "r"(stage + row * 64 + quad * 16));
    if constexpr (HAS_2) read_few<TWO>(c.two, stage + ROWS * 64 + (row * 4 + quad) * TWO);
    if constexpr (HAS_1) read_few<ONE>(c.one, stage + ROWS * (64 + 4 * TWO) + (row * 4 + quad) * ONE);
}

__device__ __forceinline__ void sums_are_written() {
    if constexpr (SPLIT > 1)
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    else __syncthreads();
}

// Shared memory that others of the cluster still read must not go away.
__device__ __forceinline__ void leave_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Images of the activations: for every tile of TOKENS tokens and every stage along K the bytes of a ring's stage. A row
// has 128 bytes in pieces of 16; piece c, which the swizzle moves to c ^ token % 8, holds for each of the four lanes the
// pair c of the 16 weights which that lane owns in this stage. One thread per piece.
extern "C" __global__ void __launch_bounds__(256) pack_x(const u16 *x, uint4 *images, int m, int k, int stages) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    const int place = i % 8, row = i / 8 % TOKENS, piece = place ^ row % 8;
    const long long image = i / (8 * TOKENS);
    const int stage = image % stages;
    const long long token = image / stages * TOKENS + row;
    if (token >= (m + TOKENS - 1) / TOKENS * TOKENS) return;
    const int at = stage / X_STEPS * STEP + stage % X_STEPS * 16 + 2 * piece;
    u32 word[4];
#pragma unroll
    for (int q = 0; q < 4; q++)
        word[q] = token < m && at + q * CHUNK < k ? __ldg((const u32 *)(x + token * k + at + q * CHUNK)) : 0;
    images[i] = make_uint4(word[0], word[1], word[2], word[3]);
}

#if SPLIT > 1
extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, MIN_BLOCKS)
#else
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
#endif
wgmma_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ u8 memory[];
    __shared__ alignas(8) unsigned long long barriers[2 * X_STAGES + 2 * W_STAGES];
    __shared__ u32 tables[TABLE_WORDS];
    // The 128-byte swizzle counts from multiples of 1024.
    const u32 x_ring = (shared_address(memory) + 1023) & ~1023u, w_ring = x_ring + X_STAGES * X_BYTES;
    const u32 full = shared_address(barriers), empty = full + 8 * X_STAGES, w_full = empty + 8 * X_STAGES,
              w_empty = w_full + 8 * W_STAGES;
    const u32 table = fill_table(tables, a);
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 4 * CONSUMERS);
        for (int i = 0; i < W_STAGES; i++) barrier_init(w_full + 8 * i, W_THREADS), barrier_init(w_empty + 8 * i, 4 * CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    // Token tiles are neighbours in time, up to eight of them, so that rows of W are read from memory once.
    const int row_tiles = (a.n + ROWS - 1) / ROWS, token_tiles = (a.m + TOKENS - 1) / TOKENS;
    const int tile = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT;
    const int band = tile / (8 * row_tiles), wide_band = min(8, token_tiles - 8 * band), inside = tile - band * 8 * row_tiles;
    const int first = inside / wide_band * ROWS, first_token = (8 * band + inside % wide_band) * TOKENS;
    const int steps = (a.k + STEP - 1) / STEP, begin = steps * rank / SPLIT, end = steps * (rank + 1) / SPLIT;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        if (threadIdx.x < W_THREADS) {
            // A thread copies the same chunk of ROWS * 4 / W_THREADS rows in every step.
            constexpr int COUNT = ROWS * 4 / W_THREADS;
            const int chunk = threadIdx.x % 4;
            u32 rows[COUNT], rows2[COUNT], rows1[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const u32 row = min(first + (int)threadIdx.x / 4 + i * (W_THREADS / 4), a.n - 1) - first;
                rows[i] = row * (u32)a.stride;
                if constexpr (HAS_2) rows2[i] = row * (u32)a.stride2;
                if constexpr (HAS_1) rows1[i] = row * (u32)a.stride1;
            }
            const u8 *codes = a.codes + first * a.stride + begin * 64 + chunk * 16;
            const u8 *codes2 = a.codes2 + first * a.stride2 + begin * 4 * TWO + chunk * TWO;
            const u8 *codes1 = a.codes1 + first * a.stride1 + begin * 4 * ONE + chunk * ONE;
            int slot = 0;
            u32 phase = 1;
            for (int step = begin; step < end; step++) {
                wait(w_empty + 8 * slot, phase);
                const u32 to = w_ring + slot * W_BYTES;
                const bool valid = step * STEP + chunk * CHUNK < a.k;
                copy_plane<16>(to, valid ? codes : a.codes, rows, valid);
                if constexpr (HAS_2) copy_plane<TWO>(to + ROWS * 64, valid ? codes2 : a.codes2, rows2, valid);
                if constexpr (HAS_1) copy_plane<ONE>(to + ROWS * (64 + 4 * TWO), valid ? codes1 : a.codes1, rows1, valid);
                asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(w_full + 8 * slot) : "memory");
                codes += 64, codes2 += 4 * TWO, codes1 += 4 * ONE;
                if (++slot == W_STAGES) slot = 0, phase ^= 1;
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
        } else if (threadIdx.x == W_THREADS) {
            // The images are the work of the kernel before.
            asm volatile("griddepcontrol.wait;" ::: "memory");
            const u8 *image = (const u8 *)a.x + ((long long)(first_token / TOKENS) * steps + begin) * X_STEPS * X_BYTES;
            int slot = 0;
            u32 phase = 1;
            for (int stage = (end - begin) * X_STEPS; stage > 0; stage--) {
                wait(empty + 8 * slot, phase);
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * slot), "n"(X_BYTES)
                             : "memory");
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                                 x_ring + slot * X_BYTES),
                             "l"(image), "n"(X_BYTES), "r"(full + 8 * slot)
                             : "memory");
                image += X_BYTES;
                if (++slot == X_STAGES) slot = 0, phase ^= 1;
            }
        }
        __syncwarp();
        __syncthreads();
        sums_are_written();
        if constexpr (SPLIT > 1) leave_cluster();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
        const int group = threadIdx.x / 128 - 1, base_row = group * 64 * ROW_TILES + warp * 16 + lane / 4;
        float acc[ROW_TILES][TOKENS / 2];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < TOKENS / 2; e++) acc[i][e] = 0;
        u32 frag[2][ROW_TILES][8];
        RawScale raw[ROW_TILES][2][SCALES];
        u32 zero[ROW_TILES][2][SCALES];
        auto load_scales = [&](int step) {
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int s = 0; s < SCALES; s++) {
                        const int row = min(first + base_row + 64 * i + 8 * h, a.n - 1);
                        const int k = min(step * STEP + quad * CHUNK + s * (CHUNK / SCALES), a.k - 1);
                        const int column = SCALE_MODE == PER_ROW ? 0 : k / GROUP;
                        if constexpr (SCALE_MODE != PER_ROW) raw[i][h][s] = load_scale(a, row, column);
                        zero[i][h][s] = load_zero(a, row, column);
                    }
        };
        if (begin < end) load_scales(begin);
        int slot = 0, w_slot = 0;
        u32 phase = 0, w_phase = 0;
        for (int step = begin; step < end; step++) {
            wait(w_full + 8 * w_slot, w_phase);
            Chunk chunks[ROW_TILES][2];
            u32 scale[ROW_TILES][2][SCALES], base[ROW_TILES][2][SCALES];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    read_chunk(chunks[i][h], w_ring + w_slot * W_BYTES, base_row + 64 * i + 8 * h, quad);
#pragma unroll
                    for (int s = 0; s < SCALES; s++) {
                        if constexpr (SCALE_MODE != PER_ROW) scale[i][h][s] = pair(scale_value(a, raw[i][h][s]) * FOLD);
                        base[i][h][s] = base_value(zero[i][h][s]);
                    }
                }
            __syncwarp();
            if (lane == 0) arrive(w_empty + 8 * w_slot);
            if (++w_slot == W_STAGES) w_slot = 0, w_phase ^= 1;
            if (SCALE_MODE != PER_ROW && step + 1 < end) load_scales(step + 1);
#pragma unroll
            for (int o = 0; o < OCTETS; o++) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        u32 w[4];
                        const int s = o * SCALES / OCTETS;
                        decode(chunks[i][h], o, base[i][h][s], table, w);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            if constexpr (SCALE_MODE != PER_ROW) w[j] = mul2(w[j], scale[i][h][s]);
                            frag[o % 2][i][j / 2 * 4 + j % 2 * 2 + h] = w[j];
                        }
                    }
                if (o % 2 == 0) wait(full + 8 * slot, phase);
                const u32 at = x_ring + slot * X_BYTES + o % 2 * 64;
                const unsigned long long descriptor = 1ull << 62 | 64ull << 32 | 1ull << 16 | at >> 4;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < ROW_TILES; i++) wgmma(acc[i], &frag[o % 2][i][4 * half], descriptor + 2 * half);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                // The octet before is done; with it, at the start of a stage, the stage before.
                if (o % 2 == 0 && (o > 0 || step > begin)) {
                    if (lane == 0) arrive(empty + 8 * (slot == 0 ? X_STAGES - 1 : slot - 1));
                }
                if (o % 2 == 1 && ++slot == X_STAGES) slot = 0, phase ^= 1;
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        __syncthreads();  // no one reads the rings any more
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < TOKENS / 2; e++) {
                const int row = base_row + 64 * i + e / 2 % 2 * 8, token = e / 4 * 8 + quad * 2 + e % 2;
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(x_ring + (token * SUM_STRIDE + row) * 4), "f"(acc[i][e]));
            }
        sums_are_written();
        // Every block of the cluster finishes its share of the tokens, adding the sums in the order of the ranks.
        constexpr int QUARTETS = ROWS / 4;
        const int tokens = min(TOKENS, a.m - first_token), from = tokens * rank / SPLIT, to = tokens * (rank + 1) / SPLIT;
        for (int e = threadIdx.x - 128 + from * QUARTETS; e < to * QUARTETS; e += 128 * CONSUMERS) {
            const int token = e / QUARTETS, row = e % QUARTETS * 4, n = first + row;
            if (n >= a.n) continue;
            const u32 at = x_ring + (token * SUM_STRIDE + row) * 4;
            float v[4];
            if constexpr (SPLIT == 1) {
                asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at));
            } else {
#pragma unroll
                for (int c = 0; c < SPLIT; c++) {
                    u32 there;
                    float p[4];
                    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(c));
                    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                                 : "=f"(p[0]), "=f"(p[1]), "=f"(p[2]), "=f"(p[3]) : "r"(there));
#pragma unroll
                    for (int j = 0; j < 4; j++) v[j] = c == 0 ? p[j] : v[j] + p[j];
                }
            }
            const int absolute = first_token + token;
            u16 *y = a.y + (long long)absolute * a.n + n;
            if (a.n % 4 == 0) {
                uint2 packed;
                packed.x = narrow(finish(a, v[0], n, absolute)) | (u32)narrow(finish(a, v[1], n + 1, absolute)) << 16;
                packed.y = narrow(finish(a, v[2], n + 2, absolute)) | (u32)narrow(finish(a, v[3], n + 3, absolute)) << 16;
                *(uint2 *)y = packed;
            } else {
                for (int j = 0; j < 4 && n + j < a.n; j++) y[j] = narrow(finish(a, v[j], n + j, absolute));
            }
        }
        if constexpr (SPLIT > 1) leave_cluster();
    }
}
