// y (M, N) = x (M, K) W (N, K)^T for M <= 8 * TOKEN_TILES tokens; W in any format, read once, straight from the
// canonical planes. bf16 or fp16 activations, mma.sync m16n8k16, fp32 accumulation in a fixed order.
//
// Blocks stay for the whole run and go through tiles of 16 rows of W; the warps of a block, and the CLUSTER blocks of a
// cluster, share K in segments of 64 bytes of the main plane. Every warp keeps STAGES - 1 segments on their way into a
// ring of its own. The activations lie in shared memory from the start, in the order in which `decode` pairs codes, so
// that no weight is ever shuffled and no packed layout is needed.
//
// Compiled with -D beyond those of decode.cuh: TOKEN_TILES (of 8), CLUSTER, WHOLE (K is a multiple of SEGMENT), BUFFERS
// (tiles whose sums may wait to be added up, so that warps need not wait for each other), RESIDENT (blocks that registers
// shall suffice for), GATED (W is a gate above what it gates: y (M, N / 2) = silu(gate) * up).

#include "decode.cuh"
#include "early.cuh"
#include "cluster.cuh"

constexpr int WARPS = 8;
constexpr int STAGES = 4;
constexpr int ROWS = 16;                     // of a tile: lane / 4 and lane / 4 + 8
constexpr int PARTS = 16 / QUAD;             // chunks of a lane per segment
constexpr int SEGMENT = PARTS * STEP;        // weights of one row
constexpr int TWO_SEGMENT = 4 * PARTS * TWO, ONE_SEGMENT = 4 * PARTS * ONE;  // bytes of a row in the other planes
constexpr int STAGE_BYTES = ROWS * (64 + TWO_SEGMENT + ONE_SEGMENT);
// Scales of a row per segment: one per part for sums, else those of the lane's chunk.
constexpr int ROW_SCALES = SCALE_MODE == PER_STEP ? PARTS : SCALE_MODE == PER_CHUNK ? SCALES : 1;

// Rows `group` and `group + 8` of a tile as rows of W: neighbours eight apart, or a gate and what it gates.
__device__ __forceinline__ int row_of(const Arguments &a, int tile, int group, int h) {
    if constexpr (GATED) return min(tile * 8 + group, a.n / 2 - 1) + h * (a.n / 2);
    return min(tile * ROWS + group + 8 * h, a.n - 1);
}

// Place of the 16-byte piece `piece` in a row's 64 bytes: lanes that read together find different banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return piece ^ (QUAD == 8 ? row / 2 % 2 * 2 : row / 2 % 4); }

__device__ __forceinline__ void mma(float *d, const u32 (&a)[4], u32 b0, u32 b1, const float *c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." OPERAND "." OPERAND ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Four activations from an address that is a multiple of 8, as two words.
__device__ __forceinline__ uint2 load_four(const u16 *x) { return __ldg((const uint2 *)x); }

#if CLUSTER > 1
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPS * 32, RESIDENT)
#else
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
#endif
small_m(const __grid_constant__ Arguments a, int half) {
    extern __shared__ u8 memory[];  // the activations, then a ring for every warp
    __shared__ float4 sums[BUFFERS][WARPS][TOKEN_TILES][32];
    __shared__ alignas(8) unsigned long long written[BUFFERS], used[BUFFERS];
    __shared__ u32 tables[TABLE_WORDS];
    let_the_next_start();  // weights are on their way before the kernel ahead has ended; everything else waits
    const u32 table = fill_table(tables, a);
    if (threadIdx.x < BUFFERS) {
        barrier_init(shared_address(&written[threadIdx.x]), WARPS);
        barrier_init(shared_address(&used[threadIdx.x]), 1);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    // Of two blocks on a multiprocessor, which are `half` of the grid apart, one gets the tiles after those of the other:
    // together they have as many as any two.
    const int block = half ? blockIdx.x % half * 2 + blockIdx.x / half : blockIdx.x;
    const int rank = block % CLUSTER, cluster = block / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int tiles = (a.n + ROWS - 1) / ROWS, segments = (a.k + SEGMENT - 1) / SEGMENT;
    const int first_tile = (long long)tiles * cluster / clusters, last_tile = (long long)tiles * (cluster + 1) / clusters;
    const int begin = segments * rank / CLUSTER, end = segments * (rank + 1) / CLUSTER;
    const int per_tile = (end - begin + WARPS - 1) / WARPS;  // segments of a warp; the last may lie beyond the end
    const int octet_bytes = a.m * 64;                        // of the activations that meet one octet of four lanes
    const u32 x_memory = shared_address(memory);
    const u32 ring = x_memory + (segments + CLUSTER - 1) / CLUSTER * (PARTS * OCTETS) * octet_bytes + warp * STAGES * STAGE_BYTES;

    // A lane brings a quarter of two rows of a segment.
    int segment_0 = begin + warp;
    keep(segment_0);
    const u8 *codes[2], *codes2[2], *codes1[2];  // rows of the lane in the tile that is fetched
    int next_tile = first_tile, next_segment = segment_0;
    auto rows_to_fetch = [&]() {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const long long n = row_of(a, next_tile, group, h);
            codes[h] = a.codes + n * a.stride;
            if constexpr (HAS_2) codes2[h] = a.codes2 + n * a.stride2;
            if constexpr (HAS_1) codes1[h] = a.codes1 + n * a.stride1;
        }
    };
    rows_to_fetch();
    const int quarters = a.k / (SEGMENT / 4);  // of a row
    const int after = segment_0 + per_tile * WARPS;
    u32 own = group * 64 + swizzled(group, quad) * 16;
    u32 own2 = ROWS * 64 + (group * 4 + quad) * (TWO_SEGMENT / 4);
    u32 own1 = ROWS * (64 + TWO_SEGMENT) + (group * 4 + quad) * (ONE_SEGMENT / 4);
    keep(own), keep(own2), keep(own1);
    u32 next_stage = ring;
    auto fetch = [&]() {
        if (next_segment < end && next_tile < last_tile) {
            const int quarter = next_segment * 4 + quad, at = WHOLE ? quarter : min(quarter, quarters - 1);
            const bool valid = WHOLE || quarter < quarters;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                copy<16>(next_stage + own + h * 512, codes[h] + at * 16, valid);
                if constexpr (HAS_2)
                    copy<TWO_SEGMENT / 4>(next_stage + own2 + h * 8 * TWO_SEGMENT, codes2[h] + at * (TWO_SEGMENT / 4), valid);
                if constexpr (HAS_1)
                    copy<ONE_SEGMENT / 4>(next_stage + own1 + h * 8 * ONE_SEGMENT, codes1[h] + at * (ONE_SEGMENT / 4), valid);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        next_stage = next_stage == ring + (STAGES - 1) * STAGE_BYTES ? ring : next_stage + STAGE_BYTES;
        next_segment += WARPS;
        if (next_segment == after) {
            next_segment = segment_0, next_tile++;
            rows_to_fetch();
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) fetch();

    // Scales are read one segment ahead, so that no sum waits for them.
    struct Scales {
        RawScale scale[2][ROW_SCALES];
        u32 zero[2][ROW_SCALES];
    } following;
    ScaleRow scale_rows[2];
    auto rows_to_scale = [&](int tile) {
#pragma unroll
        for (int h = 0; h < 2; h++) scale_rows[h] = scale_row(a, row_of(a, tile, group, h));
    };
    auto load_scales = [&](int segment) {
        // Columns a constant apart, where they are, make addresses that need no arithmetic.
        constexpr int WIDTH = SCALE_MODE == PER_STEP ? STEP : CHUNK / SCALES;
        constexpr bool APART = SEGMENT % GROUP == 0 && (GROUP % WIDTH == 0 || WIDTH % GROUP == 0);
        const int k = segment * SEGMENT + (SCALE_MODE == PER_CHUNK ? quad * CHUNK : 0);
        constexpr bool RUN = WHOLE && APART && WIDTH == GROUP && ROW_SCALES * SCALE_BYTES <= 16;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if constexpr (RUN) {
                u32 bits[ROW_SCALES];
                load_run<SCALE_BYTES>(bits, scale_rows[h].scale + k / GROUP * SCALE_BYTES);
                if constexpr (ZERO) load_run<1>(following.zero[h], scale_rows[h].zero + k / GROUP);
#pragma unroll
                for (int i = 0; i < ROW_SCALES; i++) following.scale[h][i] = {bits[i], load_outer(scale_rows[h], k / GROUP + i)};
            } else {
#pragma unroll
                for (int i = 0; i < ROW_SCALES; i++) {
                    int column = APART ? k / GROUP + i * WIDTH / GROUP : (k + i * WIDTH) / GROUP;
                    if (!WHOLE) column = min(column, a.scale_columns - 1);
                    if (SCALE_MODE == PER_ROW) column = 0;
                    if constexpr (SCALE_MODE != PER_ROW) following.scale[h][i] = load_scale(scale_rows[h], column);
                    following.zero[h][i] = load_zero(scale_rows[h], column);
                }
            }
        }
    };
    rows_to_scale(first_tile);
    load_scales(min(segment_0, segments - 1));

    wait_for_the_kernel_before();
    // The activations of this block's share of K: for every octet of four lanes and every token 64 bytes, the four
    // pairs of each lane.
    const int units = (end - begin) * PARTS * OCTETS * 4;  // of a token: lanes of octets
    int unit = threadIdx.x, token = 0;
    while (token < a.m) {
        // Many loads are under way before the first is used.
        constexpr int BATCH = 8;
        uint2 low[BATCH], high[BATCH];
        u32 to[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            while (unit >= units) unit -= units, token++;
            const int q = unit % 4, octet = unit / 4, k = begin * SEGMENT + octet / OCTETS * STEP + q * CHUNK;
            const u16 *x = a.x + (long long)token * a.k + k + pair_codes(octet % OCTETS * 4).first;
            const bool valid = token < a.m && k < a.k;
            low[i] = valid ? load_four(x) : uint2{0, 0};
            high[i] = valid ? load_four(x + SECOND_FOUR) : uint2{0, 0};
            to[i] = token < a.m ? x_memory + ((octet * a.m + token) * 4 + q) * 16 : 0;
            unit += WARPS * 32;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            uint4 pairs = pairs_of(low[i], high[i]);
            if (to[i])
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to[i]), "r"(pairs.x), "r"(pairs.y), "r"(pairs.z),
                             "r"(pairs.w) : "memory");
        }
    }
    __syncthreads();

    // Sums of the warps in their order, blocks of the cluster in the order of their ranks: the result does not depend on
    // M or on timing. `threads` of a block finish its share of the outputs.
    auto finish_tile = [&](int tile, int buffer, int thread, int threads) {
        constexpr int HEIGHT = GATED ? 8 : ROWS;
        const int outputs = HEIGHT * a.m;
        // The sum of row `row` of the tile for a token, times scales.
        auto total = [&](int row, int token) {
            const int from = row % 8 * 4 + token % 8 / 2, element = row / 8 * 2 + token % 2;
            const u32 at = shared_address(&sums[buffer][0][token / 8][from]) + element * 4;
            float v = 0;
#pragma unroll
            for (int c = 0; c < CLUSTER; c++)
#pragma unroll
                for (int w = 0; w < WARPS; w++) v += read_float(at + w * (u32)sizeof(sums[0][0]), c);
            return finish(a, v, finish_of(a, row_of(a, tile, row % 8, row / 8)), token_scale(a, token));
        };
#pragma unroll 1
        for (int e = outputs * rank / CLUSTER + thread; e < outputs * (rank + 1) / CLUSTER; e += threads) {
            const int row = e % HEIGHT, token = e / HEIGHT, n = tile * HEIGHT + row;
            u16 *y = a.y + (long long)token * (GATED ? a.n / 2 : a.n) + n;
            float v = total(row, token);
            if constexpr (GATED) {
                // Rounded as a layer's outputs are.
                const float gate = wide(narrow(v));
                v = gate / (1.f + __expf(-gate)) * wide(narrow(total(row + 8, token)));
            }
            if (n < (GATED ? a.n / 2 : a.n)) *y = narrow(v);
        }
    };
    // A block by itself: warps take turns in finishing a tile, one tile later. `count` tiles came before it.
    auto finish_by_turns = [&](int count) {
        if (count % WARPS != warp) return;
        const int buffer = count % BUFFERS;
        wait_barrier(shared_address(&written[buffer]), count / BUFFERS & 1);
        finish_tile(first_tile + count, buffer, lane, 32);
        __syncwarp();
        if (lane == 0) arrive_barrier(shared_address(&used[buffer]));
    };

    u32 x_tokens[TOKEN_TILES];  // lanes beyond the last token read it again: their sums are never looked at
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++)
        x_tokens[t] = x_memory + quad * 16 + (warp * (PARTS * OCTETS) * a.m + min(t * 8 + group, a.m - 1)) * 64;
    const u32 x_skip = (WARPS - 1) * (PARTS * OCTETS) * octet_bytes;  // the segments of the other warps
    const float zeros[4] = {0, 0, 0, 0};
    int slot = 0, buffer = 0;
    for (int tile = first_tile; tile < last_tile; tile++, buffer ^= 1) {
        float acc[TOKEN_TILES][4] = {};
        u32 x_at = 0;
        for (int segment = segment_0; segment - segment_0 < per_tile * WARPS; segment += WARPS) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            __syncwarp();
            fetch();
            const Scales scales = following;
            if (segment + WARPS - segment_0 < per_tile * WARPS) load_scales(min(segment + WARPS, segments - 1));
            else if (tile + 1 < last_tile) rows_to_scale(tile + 1), load_scales(min(segment_0, segments - 1));
            const u32 stage = ring + slot * STAGE_BYTES;
            slot = slot == STAGES - 1 ? 0 : slot + 1;
            if (segment >= end) break;  // the last of the tile
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                Chunk chunks[2];
                const int place = p * 4 + quad;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = group + 8 * h;
                    read_shared<QUAD>(chunks[h].main, stage + row * 64 + swizzled(group, place * QUAD / 16) * 16 + place * QUAD % 16);
                    if constexpr (HAS_2) read_shared<TWO>(chunks[h].two, stage + ROWS * 64 + row * TWO_SEGMENT + place * TWO);
                    if constexpr (HAS_1)
                        read_shared<ONE>(chunks[h].one, stage + ROWS * (64 + TWO_SEGMENT) + row * ONE_SEGMENT + place * ONE);
                }
                float sum[TOKEN_TILES][4];
#pragma unroll
                for (int o = 0; o < OCTETS; o++) {
                    u32 w[2][4];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int s = SCALE_MODE == PER_STEP ? p : SCALE_MODE == PER_CHUNK ? o * SCALES / OCTETS : 0;
                        const u32 base = base_value(scales.zero[h][s]);
                        const Factor factor = SCALE_MODE == PER_CHUNK ? factor_of(scale_value(a, scales.scale[h][s])) : Factor{};
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            if constexpr (SCALE_MODE == PER_CHUNK) w[h][j] = decode_scaled(chunks[h], o, j, base, table, factor);
                            else w[h][j] = decode(chunks[h], o, j, base, table);
                        }
                    }
#pragma unroll
                    for (int t = 0; t < TOKEN_TILES; t++) {
                        u32 x[4];
                        read_shared<16>(x, x_tokens[t] + x_at);
                        float *c = SCALE_MODE == PER_STEP ? sum[t] : acc[t];
                        mma(c, {w[0][0], w[1][0], w[0][1], w[1][1]}, x[0], x[1], SCALE_MODE == PER_STEP && o == 0 ? zeros : c);
                        mma(c, {w[0][2], w[1][2], w[0][3], w[1][3]}, x[2], x[3], c);
                    }
                    x_at += octet_bytes;
                }
                if constexpr (SCALE_MODE == PER_STEP)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float scale = scale_value(a, scales.scale[h][p]);
#pragma unroll
                        for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
                            for (int e = 0; e < 2; e++) acc[t][2 * h + e] += sum[t][2 * h + e] * scale;
                    }
            }
            x_at += x_skip;
        }
        const int count = tile - first_tile;
        if constexpr (CLUSTER > 1) {
            // The sums of the tile before, which the whole cluster has written by now.
            if (count > 0) {
                wait_cluster();
                finish_tile(tile - 1, buffer ^ 1, threadIdx.x, WARPS * 32);
            }
        } else {
            if (count >= BUFFERS) wait_barrier(shared_address(&used[count % BUFFERS]), (count / BUFFERS - 1) & 1);
        }
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; t++) sums[CLUSTER > 1 ? buffer : count % BUFFERS][warp][t][lane] = *(float4 *)acc[t];
        if constexpr (CLUSTER > 1) {
            arrive_cluster();
        } else {
            __syncwarp();
            if (lane == 0) arrive_barrier(shared_address(&written[count % BUFFERS]));
            if (count > 0) finish_by_turns(count - 1);
        }
    }
    if (first_tile == last_tile) return;
    if constexpr (CLUSTER > 1) {
        wait_cluster();
        finish_tile(last_tile - 1, buffer ^ 1, threadIdx.x, WARPS * 32);
        // Sums that others still read must not go away.
        arrive_cluster();
        wait_cluster();
    } else {
        finish_by_turns(last_tile - first_tile - 1);
    }
}
