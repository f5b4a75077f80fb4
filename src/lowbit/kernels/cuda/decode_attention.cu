// Attention of T new tokens per sequence over its KV cache, for the R query heads that share a key head: rotary embedding,
// the write into the cache and the attention. B sequences, G key heads, S positions of the cache.
//
// A cluster of blocks takes one key head of one sequence. Its warps go through chunks of 16 positions, each warp through
// its own, with products of 16 or 32 rows (the new tokens' heads) by mma.sync; what they found is added up through the shared
// memory of the cluster, in a fixed order. What earlier steps have left in the cache is on its way before the kernel ahead
// has ended. How long a sequence is, is read from memory, so that a CUDA graph is good for every length.
//
// Compiled with -D WIDTH (D, numbers of a head), SHARED (R) and TOKENS (T; T R <= 32), CLUSTER, WARPS (4 or more), STAGES (chunks of a
// warp on their way and in use), NORM (RMSNorm of queries and keys before they are turned), FP16.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#include "cluster.cuh"
#include "early.cuh"
#include "pairs.cuh"

constexpr int D = WIDTH, R = SHARED, T = TOKENS;
constexpr int WORKERS = CLUSTER * WARPS;
constexpr int CHUNK = 16;
constexpr int PITCH = 2 * D + 16;      // bytes from row to row: eight rows at the same place are in different banks
constexpr int TILE = CHUNK * PITCH;
constexpr int OWN = D / 16;            // of half a row, for each of the eight threads that turn it
constexpr float LOWEST = -1e30f;       // less than any score; unlike minus infinity it may be subtracted from itself
constexpr int ROWS = T * R, ROW_TILES = (ROWS + 15) / 16;

struct Arguments {
    const u16 *qkv;                    // (B, T, (R + 2) G, D)
    u16 *keys, *values;                // (B, G, S, D)
    const int *positions;              // (B,)
    const float *cos, *sin;            // (S, D / 2)
    const u16 *q_norm, *k_norm;        // (D,)
    u16 *out;                          // (B, T, G R, D)
    int groups, capacity;
    float eps, scale_log2;
};

__device__ __forceinline__ float exp2_of(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

__device__ __forceinline__ u32 address(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }

// 16 bytes, or zeros.
__device__ __forceinline__ void copy(u32 to, const u16 *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&out)[4], u32 from) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(from) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// All blocks of the cluster have come to the same place, and see what the others have written before it.
__device__ __forceinline__ void meet() {
    if constexpr (CLUSTER == 1) __syncthreads();
    arrive_cluster();
    wait_cluster();
}

// A float of the shared memory of block `rank`.
__device__ __forceinline__ float read(const float *at, int rank) {
    if constexpr (CLUSTER == 1) return *at;
    return read_float(address(at), rank);
}

// Angles of one token for a thread's OWN pairs of numbers, which are half a row apart.
struct Angles {
    float c[OWN], s[OWN];

    __device__ __forceinline__ Angles(const Arguments &a, int position, int first) {
        const bool there = position < a.capacity;
        for (int i = 0; i < OWN; i++) {
            const long long at = (long long)position * (D / 2) + first + i;
            c[i] = there ? a.cos[at] : 0.0f;
            s[i] = there ? a.sin[at] : 0.0f;
        }
    }
};

// A row of D numbers, normed and turned, by eight threads into shared memory and, if `cache` is given, into the cache.
__device__ __forceinline__ void turn(const Angles &angles, const u16 *row, const u16 *norm, float eps, bool real, int first,
                                     u8 *to, u16 *cache) {
    float x[2][OWN];
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < OWN; i += 2) {
            const float2 pair = unpacked(real ? *(const u32 *)(row + h * (D / 2) + first + i) : 0);
            x[h][i] = pair.x, x[h][i + 1] = pair.y;
        }
    if constexpr (NORM) {
        float squares = 0;
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < OWN; i++) squares += x[h][i] * x[h][i];
        for (int apart = 4; apart; apart /= 2) squares += __shfl_xor_sync(~0u, squares, apart);
        const float scale = 1.0f / sqrtf(squares / D + eps);
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < OWN; i += 2) {
                const float2 w = unpacked(*(const u32 *)(norm + h * (D / 2) + first + i));
                x[h][i] *= scale * w.x, x[h][i + 1] *= scale * w.y;
            }
    }
    for (int i = 0; i < OWN; i += 2) {
        float y[2][2];
        for (int j = 0; j < 2; j++) {
            y[0][j] = x[0][i + j] * angles.c[i + j] - x[1][i + j] * angles.s[i + j];
            y[1][j] = x[1][i + j] * angles.c[i + j] + x[0][i + j] * angles.s[i + j];
        }
        for (int h = 0; h < 2; h++) {
            const u32 word = packed(y[h][0], y[h][1]);
            *(u32 *)(to + 2 * (h * (D / 2) + first + i)) = word;
            if (cache) *(u32 *)(cache + h * (D / 2) + first + i) = word;
        }
    }
}

// What a warp has found so far, for rows lane / 4 and lane / 4 + 8 of a tile: largest scores, sums of weights, weighted
// sums.
struct Found {
    float best[2] = {LOWEST, LOWEST}, weight[2] = {0, 0};
    float sums[D / 8][4] = {};

    // `real(h, j)`: whether row lane / 4 + 8 h sees position j of the chunk.
    template <class Real>
    __device__ __forceinline__ void attend(const u32 (&q)[D / 16][4], u32 keys, u32 values, float scale_log2, Real real) {
        const int lane = threadIdx.x % 32;
        float scores[2][4] = {};
        for (int k = 0; k < D / 16; k++) {
            u32 b[4];
            load_matrices<false>(b, keys + (lane % 8 + lane / 16 * 8) * PITCH + k * 32 + lane / 8 % 2 * 16);
            mma(scores[0], q[k], b[0], b[1]);
            mma(scores[1], q[k], b[2], b[3]);
        }
        u32 p[4];
        for (int h = 0; h < 2; h++) {
            float highest = best[h];
            for (int n = 0; n < 2; n++)
                for (int e = 0; e < 2; e++) {
                    float &score = scores[n][2 * h + e];
                    score = real(h, n * 8 + lane % 4 * 2 + e) ? score * scale_log2 : LOWEST;
                    highest = fmaxf(highest, score);
                }
            for (int apart = 1; apart <= 2; apart *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, apart));
            const float fade = exp2_of(best[h] - highest);
            float sum = 0;
            for (int n = 0; n < 2; n++) {
                float w[2];
                for (int e = 0; e < 2; e++) {
                    const float score = scores[n][2 * h + e];
                    w[e] = score > LOWEST ? exp2_of(score - highest) : 0.0f;
                    sum += w[e];
                }
                p[2 * n + h] = packed(w[0], w[1]);
            }
            for (int apart = 1; apart <= 2; apart *= 2) sum += __shfl_xor_sync(~0u, sum, apart);
            weight[h] = weight[h] * fade + sum;
            best[h] = highest;
            for (int n = 0; n < D / 8; n++) sums[n][2 * h] *= fade, sums[n][2 * h + 1] *= fade;
        }
        for (int n = 0; n < D / 16; n++) {
            u32 b[4];
            load_matrices<true>(b, values + lane % 16 * PITCH + n * 32 + lane / 16 * 16);
            mma(sums[2 * n], p, b[0], b[1]);
            mma(sums[2 * n + 1], p, b[2], b[3]);
        }
    }
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(32 * WARPS)
decode_attention(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float bests[WARPS][ROWS], weights[WARPS][ROWS], best_of_block[ROWS], weight_of_block[ROWS];
    let_the_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % CLUSTER, head = blockIdx.x / CLUSTER;
    const int batch = head / a.groups, group = head % a.groups;
    const int position = a.positions[batch], length = min(position, a.capacity);
    u16 *const keys = a.keys + (long long)head * a.capacity * D, *const values = a.values + (long long)head * a.capacity * D;
    // Queries, new keys, new values; then the ring of each warp, which holds its sums at last.
    u8 *const q_tile = shared, *const k_tile = shared + ROW_TILES * TILE, *const v_tile = k_tile + TILE;
    u8 *const rings = v_tile + TILE, *const ring = rings + warp * STAGES * 2 * TILE;

    const int worker = rank * WARPS + warp, chunks = (length + CHUNK - 1) / CHUNK;
    auto fetch = [&](int turn_, int stage) {
        const int chunk = worker + turn_ * WORKERS;
        if (chunk < chunks)
            for (int p = lane; p < CHUNK * (D / 8); p += 32) {
                const int row = p / (D / 8), at = chunk * CHUNK + row;
                const u32 to = address(ring + stage * 2 * TILE + row * PITCH + p % (D / 8) * 16);
                const long long from = (long long)min(at, a.capacity - 1) * D + p % (D / 8) * 8;
                copy(to, keys + from, at < length);
                copy(to + TILE, values + from, at < length);
            }
        commit();
    };
    for (int i = 0; i < STAGES - 1; i++) fetch(i, i);

    const int row = threadIdx.x / 8, first = threadIdx.x % 8 * OWN;  // eight threads of the first four warps turn a row
    const Angles angles(a, position + min(row, ROWS - 1) / R, first);  // of the first tile
    wait_for_the_kernel_before();

    const u16 *const tokens = a.qkv + (long long)batch * T * (R + 2) * a.groups * D;
    auto vector = [&](int token, int of) { return tokens + ((long long)token * (R + 2) * a.groups + of) * D; };
    for (int m = 0; m < ROW_TILES && warp < 4; m++) {
        const int of = m * 16 + row;
        const Angles its = m ? Angles(a, position + min(of, ROWS - 1) / R, first) : angles;
        turn(its, vector(of / R, group * R + of % R), a.q_norm, a.eps, of < ROWS, first, q_tile + of * PITCH, nullptr);
    }
    // The last warp of the last block has the least to do; it takes the new tokens' own keys and values.
    if (rank == CLUSTER - 1 && warp < 4) {
        const bool real = row < T, fits = real && position + row < a.capacity;
        const long long place = (long long)(position + row) * D;
        const Angles own(a, position + min(row, T - 1), first);
        const u16 *const v = vector(row, (R + 1) * a.groups + group);
        turn(own, vector(row, R * a.groups + group), a.k_norm, a.eps, real, first, k_tile + row * PITCH, fits ? keys + place : nullptr);
        for (int i = 0; i < 2 * OWN; i += 2) {
            const u32 word = real ? *(const u32 *)(v + 2 * first + i) : 0;
            *(u32 *)(v_tile + row * PITCH + 2 * (2 * first + i)) = word;
            if (fits) *(u32 *)(values + place + 2 * first + i) = word;
        }
    }
    __syncthreads();
    u32 q[ROW_TILES][D / 16][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
        for (int k = 0; k < D / 16; k++)
            load_matrices<false>(q[m][k], address(q_tile) + (m * 16 + lane % 16) * PITCH + k * 32 + lane / 16 * 16);

    Found found[ROW_TILES];
    for (int i = 0, stage = 0; worker + i * WORKERS < chunks; i++, stage = stage + 1 < STAGES ? stage + 1 : 0) {
        __syncwarp();  // all have read what was in the stage before this one
        fetch(i + STAGES - 1, stage ? stage - 1 : STAGES - 1);
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
        __syncwarp();
        const int begin = (worker + i * WORKERS) * CHUNK;
        const u32 at = address(ring + stage * 2 * TILE);
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
            found[m].attend(q[m], at, at + TILE, a.scale_log2, [&](int, int j) { return begin + j < length; });
    }
    if (rank == CLUSTER - 1 && warp == WARPS - 1)
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
            found[m].attend(q[m], address(k_tile), address(v_tile), a.scale_log2,
                            [&](int h, int j) { return j < T && j <= (m * 16 + lane / 4 + 8 * h) / R; });

    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
    float *const sums = (float *)ring;  // (ROWS, D)
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
        for (int h = 0; h < 2; h++) {
            const Found &f = found[m];
            const int of = m * 16 + lane / 4 + 8 * h;
            if (of >= ROWS) continue;
            if (lane % 4 == 0) bests[warp][of] = f.best[h], weights[warp][of] = f.weight[h];
            for (int n = 0; n < D / 8; n++)
                *(float2 *)(sums + of * D + n * 8 + lane % 4 * 2) = make_float2(f.sums[n][2 * h], f.sums[n][2 * h + 1]);
        }
    __syncthreads();
    float *const sums_of_block = (float *)shared;  // (ROWS, D), where queries and new keys were
    for (int e = threadIdx.x; e < ROWS * D; e += 32 * WARPS) {
        const int of = e / D;
        float highest = LOWEST, sum = 0, weight = 0;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, bests[w][of]);
        for (int w = 0; w < WARPS; w++) {
            const float fade = exp2_of(bests[w][of] - highest);
            sum += fade * ((const float *)(rings + w * STAGES * 2 * TILE))[e];
            weight += fade * weights[w][of];
        }
        sums_of_block[e] = sum;
        if (e % D == 0) best_of_block[of] = highest, weight_of_block[of] = weight;
    }
    meet();
    constexpr int SHARE = ROWS * D / CLUSTER;  // outputs of each block
    for (int e = rank * SHARE + threadIdx.x; e < (rank + 1) * SHARE; e += 32 * WARPS) {
        const int of = e / D;
        float best[CLUSTER], highest = LOWEST, sum = 0, weight = 0;
        for (int c = 0; c < CLUSTER; c++) highest = fmaxf(highest, best[c] = read(best_of_block + of, c));
        for (int c = 0; c < CLUSTER; c++) {
            const float fade = exp2_of(best[c] - highest);
            sum += fade * read(sums_of_block + e, c);
            weight += fade * read(weight_of_block + of, c);
        }
        const u16 y = (u16)packed(sum / weight, 0.0f);
        a.out[(((long long)batch * T + of / R) * a.groups * R + group * R + of % R) * D + e % D] = y;
    }
    // Nobody leaves while others read here.
    arrive_cluster();
    wait_cluster();
}
