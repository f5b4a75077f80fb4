// y (M, N) = x (M, K) W (N, K)^T for M <= 8 * TOKEN_TILES tokens; W in any format, read once, straight from the
// canonical planes. bf16 activations, mma.sync m16n8k16, fp32 accumulation in a fixed order.
//
// Rows of W are the m16 side of the tensor-core tile, tokens the n8 side. The order of K inside a product is free, so
// each lane loads 16 consecutive bytes of its row (a chunk) and feeds them to consecutive MMAs; the activations are read
// at the same places. No weight is ever shuffled, which is why no packed layout is needed.
//
// Compiled with -D beyond those of decode.cuh: TOKEN_TILES (of 8), ROW_TILES (of 16), MIN_BLOCKS (resident per
// multiprocessor).

#include "decode.cuh"

constexpr int WARPS = 8;
constexpr int HALVES = 2 * ROW_TILES;  // rows of a lane: lane / 4 + 8 h
constexpr int ROWS = 8 * HALVES;       // of a block
constexpr int UNROLL = (OCTETS >= 8 ? 2 : 4) / ROW_TILES;

// Weights are read once: they leave the caches to the activations.
__device__ __forceinline__ void stream(u32 (&v)[4], const u8 *p) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p));
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) small_m(const __grid_constant__ Arguments a) {
    __shared__ float sums[WARPS][ROW_TILES][TOKEN_TILES][32][4];
    __shared__ u32 tables[TABLE_WORDS];
    const u32 table = fill_table(tables, a);
    if constexpr (HAS_TABLE) __syncthreads();
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
            for (int r = 0; r < HALVES; r++) load(chunks[u][r], a, rows[r], k);
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
#pragma unroll
                    for (int i = 0; i < ROW_TILES; i++) {
                        float (&c)[4] = SCALE_MODE == PER_STEP ? part[i][t] : acc[i][t];
                        mma(c, {w[2 * i][0], w[2 * i + 1][0], w[2 * i][1], w[2 * i + 1][1]}, x.x, x.y);
                        mma(c, {w[2 * i][2], w[2 * i + 1][2], w[2 * i][3], w[2 * i + 1][3]}, x.z, x.w);
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
        a.y[(long long)token * a.n + n] = narrow(finish(a, v, n, token));
    }
}
