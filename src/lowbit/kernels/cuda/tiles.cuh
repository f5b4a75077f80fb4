// Products by Hopper's matrix units, for ROWS rows of W and TOKENS tokens at a time: which tiles a block multiplies, how blocks
// share tiles, and how sums become outputs. Blocks stay for the whole run. Of the two sides, rows of W are the rows of the
// products and tokens their columns; where TURNED, it is the other way round.
//
// Where tiles do not fill the blocks evenly, the last of them are cut along K into equal shares. A block goes through its
// share from the end to the beginning: the parts of a tile that other blocks have are then their first, and belong to
// blocks of lower numbers, which never wait for those of higher ones. Their sums are added in a fixed order.
//
// Where there are very few tiles, the SPLIT blocks of a team share each: every block has a part of K, leaves its sums for
// the blocks that finish them, and finishes those of some tokens itself.
//
// Blocks may form clusters: CLUSTER tiles that follow each other, of the same tokens, are multiplied side by side.
//
// Outputs go through shared memory: runs of 64 rows of W for some tokens, which the copy engine writes while the warpgroup
// goes on. Where rows of y do not begin at multiples of 16 bytes, every warp writes its own instead.
//
// After decode.cuh. Compiled with -D COLUMNS, ROW_TILES (of 64 rows, per warpgroup), CONSUMERS (warpgroups), SPLIT, BULK_OUT,
// OUT_BUFFERS (runs that a warpgroup has room for), and INTEGER where sums are, TURNED where products are, CLUSTER where there
// are any.

#ifndef INTEGER
#define INTEGER 0
#endif
#ifndef TURNED
#define TURNED 0
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#if INTEGER
typedef int Sum;
typedef int4 Sum4;
#else
typedef float Sum;
typedef float4 Sum4;
#endif

constexpr int PRODUCT_ROWS = 64 * ROW_TILES * CONSUMERS;
constexpr int ROWS = TURNED ? COLUMNS : PRODUCT_ROWS, TOKENS = TURNED ? PRODUCT_ROWS : COLUMNS;
constexpr int FINISHED = COLUMNS / SPLIT;  // columns of a tile whose outputs a block finishes
constexpr int OUT_COLUMNS = BULK_OUT && FINISHED % 64 == 0 ? 64 : FINISHED < 32 ? FINISHED : 32;  // of a run
static_assert(FINISHED % OUT_COLUMNS == 0 && (OUT_COLUMNS >= 16 || !TURNED), "outputs are written in whole runs");
static_assert(!BULK_OUT || !TURNED || OUT_COLUMNS == 64, "rows of a run have 128 bytes");
// Bytes of a token's outputs there: 64 of them, swizzled; or a warp's, 16 or OUT_COLUMNS of them, and 16 more for the banks.
constexpr int OUT_STRIDE = BULK_OUT ? 128 : 2 * (TURNED ? OUT_COLUMNS : 16) + 16;
constexpr int RUN_BYTES = (TURNED ? (BULK_OUT ? 64 : 16) : OUT_COLUMNS) * OUT_STRIDE;  // of a warpgroup, or of a warp
constexpr int OUT_BYTES = (BULK_OUT ? OUT_BUFFERS : 4) * RUN_BYTES;  // of a warpgroup

// How the copy engine finds boxes of TOKENS x 64 activations (loader.tensor_map).
struct alignas(64) TensorMap {
    u32 words[32];
};

// Where a tile lies. Token tiles are neighbours in time, up to eight of them, so that rows of W are read from memory
// once.
struct Tile {
    int row, token;
};

// The SPLIT blocks that share a tile, and those of the tiles beside it, are a team.
constexpr int TEAM = SPLIT * CLUSTER;
__device__ __forceinline__ int rank() { return blockIdx.x % CLUSTER; }
__device__ __forceinline__ int member() { return blockIdx.x / CLUSTER % SPLIT; }
__device__ __forceinline__ int team() { return blockIdx.x / TEAM; }
__device__ __forceinline__ int teams() { return gridDim.x / TEAM; }
// A block that has to do with the same tiles as this one.
__device__ __forceinline__ int block_of(int team, int member = 0) { return (team * SPLIT + member) * CLUSTER + rank(); }
__device__ __forceinline__ int row_tiles(const Arguments &a) { return (a.n + CLUSTER * ROWS - 1) / (CLUSTER * ROWS); }

// This block's of a team's tile. The rows of a cluster's last may all be beyond those of W.
__device__ __forceinline__ Tile tile_at(const Arguments &a, int tile) {
    const int rows = row_tiles(a), token_tiles = (a.m + TOKENS - 1) / TOKENS;
    const int band = tile / (8 * rows), width = min(8, token_tiles - 8 * band), inside = tile - band * 8 * rows;
    return {(inside / width * CLUSTER + rank()) * ROWS, (8 * band + inside % width) * TOKENS};
}

// A part of a tile: steps [begin, end) of K.
struct Piece {
    int tile, begin, end;
};

// The pieces of a team, one after the other: of the tiles that are cut, the steps from first(team) to first(team + 1) of all
// in a row; then whole tiles, which go around the teams.
struct Work {
    int tiles, steps, cut_tiles, share, rest, at, whole;

    __device__ __forceinline__ Work(const Arguments &a, int steps, int cut)
        : tiles(row_tiles(a) * ((a.m + TOKENS - 1) / TOKENS)), steps(steps),
          cut_tiles(cut ? tiles - max(tiles / teams() - 1, 0) * teams() : 0), share(cut_tiles * steps / teams()),
          rest(cut_tiles * steps % teams()), at(first(team() + 1)), whole(cut_tiles + team()) {}

    __device__ __forceinline__ int first(int team) const { return share * team + rest * team / teams(); }

    __device__ __forceinline__ bool next(Piece &p) {
        const int begin = first(team());
        if (at > begin) {
            p.tile = (at - 1) / steps;
            p.end = at - p.tile * steps;
            at = max(begin, p.tile * steps);
            p.begin = at - p.tile * steps;
            return true;
        }
        p = {whole, steps * member() / SPLIT, steps * (member() + 1) / SPLIT};
        whole += teams();
        return p.tile < tiles;
    }
};

// The threads of one consumer warpgroup wait for each other.
__device__ __forceinline__ void group_barrier(int group) {
    asm volatile("barrier.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Flags lie in memory that holds anything before; raised is one that equals this launch's number. Who waited lowers it:
// a graph that is replayed finds the same memory and has the same number.
__device__ __forceinline__ void raise(u64 *flag, u64 number) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(number) : "memory");
}

__device__ __forceinline__ void wait_for(u64 *flag, u64 number) {
    u64 v;
    do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(flag) : "memory");
    while (v != number);
    *flag = 0;
}

// Sums of a warpgroup of a block, in the order of its registers.
__device__ __forceinline__ Sum4 *sums_at(Sum4 *sums, int block, int group) {
    return sums + (long long)(block * CONSUMERS + group) * ROW_TILES * (COLUMNS / 8) * 128 + threadIdx.x % 128;
}

// The flag that says so to the member `to` of a team, or to whoever finishes a tile that is cut.
__device__ __forceinline__ u64 *flag_at(u64 *flags, int block, int group, int to) { return flags + (block * CONSUMERS + group) * SPLIT + to; }

// Eight outputs of a token, from shared memory.
__device__ __forceinline__ void write_eight(const Arguments &a, int token, int n, u32 from) {
    if (token >= a.m || n >= a.n) return;
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    u16 *y = a.y + (long long)token * a.n + n;
    if (a.n % 8 == 0) {
        *(uint4 *)y = v;
    } else {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (n + e < a.n) y[e] = words[e / 2] >> e % 2 * 16;
    }
}

// The sums of a warp, 16 rows of the products by FINISHED columns, become outputs; `buffer` in shared memory is its
// warpgroup's, all of which comes here.
__device__ __forceinline__ void write_outputs(const Arguments &a, const TensorMap &map, const Sum *acc, int group, int first_row,
                                              int first_column, u32 buffer) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;
    const bool leads = threadIdx.x % 128 == 0;
    // Where outputs are many, they leave the second level cache first, and activations stay (createpolicy's encoding).
    const u64 keeping = (long long)a.m * a.n > 8 << 20 ? 0x12F0000000000000 : 0x1000000000000000;
    // Of the two rows that a lane has, lane / 4 and that + 8, and of two columns.
    Finish outputs[2];
    float tokens[2];
    const auto find_outputs = [&](int n, int apart) {
        for (int i = 0; i < 2; i++) outputs[i] = finish_of(a, min(n + i * apart, a.n - 1));
    };
    const auto find_tokens = [&](int m, int apart) {
        for (int i = 0; i < 2; i++) tokens[i] = token_scale(a, min(m + i * apart, a.m - 1));
    };
    if constexpr (TURNED) find_tokens(first_row + lane / 4, 8);
    else find_outputs(first_row + lane / 4, 8);
#pragma unroll
    for (int t = 0; t < FINISHED; t += OUT_COLUMNS) {
        if (first_column + t >= (TURNED ? a.n : a.m)) break;
        const u32 run = buffer + (BULK_OUT ? t / OUT_COLUMNS % OUT_BUFFERS : warp) * RUN_BYTES;
        if constexpr (BULK_OUT) {
            // What lay there has been read.
            if (leads) {
                if (t == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
                else asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(OUT_BUFFERS - 1) : "memory");
            }
            group_barrier(group);
        }
        // Two pairs of 8 x 8 matrices: rows 0..7 and 8..15 of eight columns, then of the next eight.
#pragma unroll
        for (int j = 0; j < OUT_COLUMNS / 8; j += 2) {
            u32 words[4];
#pragma unroll
            for (int b = 0; b < 2; b++) {
                if (8 * (j + b) >= OUT_COLUMNS) break;
                const int column = first_column + t + 8 * (j + b) + 2 * quad;
                if constexpr (TURNED) find_outputs(column, 1);
                else find_tokens(column, 1);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const Sum *v = &acc[(t / 8 + j + b) * 4 + 2 * h];
                    words[2 * b + h] = narrow2(finish(a, v[0], outputs[TURNED ? 0 : h], tokens[TURNED ? h : 0]),
                                               finish(a, v[1], outputs[TURNED ? 1 : h], tokens[TURNED ? h : 1]));
                }
            }
            // The lane's token and piece of 16 bytes.
            const int m = TURNED ? (BULK_OUT ? warp * 16 : 0) + lane % 16 : 8 * (j + lane / 16) + lane % 8;
            const int piece = TURNED ? j + lane / 16 : (BULK_OUT ? 2 * warp : 0) + lane / 8 % 2;
            const u32 to = run + m * OUT_STRIDE + (BULK_OUT ? piece ^ lane % 8 : piece) * 16;
            if constexpr (TURNED)
                asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]),
                             "r"(words[2]), "r"(words[3]) : "memory");
            else if constexpr (OUT_COLUMNS >= 16)
                asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
                             "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
            else
                asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(words[0]), "r"(words[1])
                             : "memory");
        }
        if constexpr (BULK_OUT) {
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            group_barrier(group);
            if (leads) {
                const int row = first_row, column = first_column + t;
                asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%1, %2}], [%3], %4;" ::
                                 "l"(&map), "r"(TURNED ? column : row), "r"(TURNED ? row : column), "r"(run), "l"(keeping) : "memory");
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
            continue;
        }
        __syncwarp();
        constexpr int EIGHTS = TURNED ? OUT_COLUMNS / 8 : 2;  // of a token
#pragma unroll
        for (int i = lane; i < 2 * OUT_COLUMNS; i += 32) {
            const int m = i / EIGHTS, n = i % EIGHTS;
            const u32 from = run + m * OUT_STRIDE + n * 16;
            if constexpr (TURNED) write_eight(a, first_row + m, first_column + t + n * 8, from);
            else write_eight(a, first_column + t + m, first_row + n * 8, from);
        }
        __syncwarp();
    }
}

// A block's shared memory is in use until the copy engine has read it.
__device__ __forceinline__ void wait_for_outputs() {
    if constexpr (BULK_OUT) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Memory that blocks share: sums, and flags that tell of them.
struct Exchange {
    Sum4 *sums;
    u64 *flags, number;
};

// The sums `acc` of a piece, which a warpgroup is done with: left for another block, or added to those of others and written.
// A warp's part begins at `first_row` and `first_column` of the products; `buffer` is the warpgroup's, of OUT_BYTES.
__device__ __forceinline__ void finish_piece(const Arguments &a, const TensorMap &map, const Work &work, const Piece &piece,
                                             Sum (&acc)[ROW_TILES][COLUMNS / 2], const Exchange &x, int group, int first_row,
                                             int first_column, u32 buffer) {
    if constexpr (SPLIT > 1) {
        constexpr int QUARTETS = FINISHED / 8;
        Sum own[ROW_TILES][FINISHED / 2];
        Sum4 *to = sums_at(x.sums, blockIdx.x, group);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < COLUMNS / 8; e++) {
                if (e / QUARTETS != member()) to[(i * (COLUMNS / 8) + e) * 128] = *(Sum4 *)&acc[i][4 * e];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    Sum &v = own[i][e % QUARTETS * 4 + j];
                    v = e < QUARTETS || e / QUARTETS == member() ? acc[i][4 * e + j] : v;
                }
            }
        group_barrier(group);
        const int other = threadIdx.x % 128;
        if (other < SPLIT && other != member()) {
            raise(flag_at(x.flags, blockIdx.x, group, other), x.number);
            wait_for(flag_at(x.flags, block_of(team(), other), group, member()), x.number);
        }
        group_barrier(group);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            Sum total[FINISHED / 2] = {};
#pragma unroll
            for (int r = 0; r < SPLIT; r++) {
                const Sum4 *from = sums_at(x.sums, block_of(team(), r), group) + member() * QUARTETS * 128;
                keep(from);
#pragma unroll
                for (int e = 0; e < QUARTETS; e++) {
                    Sum4 v = *(Sum4 *)&own[i][4 * e];
                    if (r != member()) v = __ldcg(from + (i * (COLUMNS / 8) + e) * 128);
                    total[4 * e] += v.x, total[4 * e + 1] += v.y, total[4 * e + 2] += v.z, total[4 * e + 3] += v.w;
                }
            }
            write_outputs(a, map, total, group, first_row + 64 * i, first_column + member() * FINISHED, buffer);
        }
        return;
    }
    if (piece.end < work.steps) {
        Sum4 *to = sums_at(x.sums, blockIdx.x, group);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int e = 0; e < COLUMNS / 8; e++) to[(i * (COLUMNS / 8) + e) * 128] = *(Sum4 *)&acc[i][4 * e];
        group_barrier(group);
        if (threadIdx.x % 128 == 0) raise(flag_at(x.flags, blockIdx.x, group, 0), x.number);
        return;
    }
    if (piece.begin > 0) {
        // The teams before have the other parts of this tile. Their sums are added in the order of these teams;
        // where they are few, those of several are on their way together.
        constexpr int TOGETHER = ROW_TILES * COLUMNS <= 32 ? 4 : 1, QUARTETS = ROW_TILES * COLUMNS / 8;
        int first = team() - 1;
        while (first > 0 && work.first(first) > piece.tile * work.steps) first--;
        for (int t = first + threadIdx.x % 128; t < team(); t += 128)
            wait_for(flag_at(x.flags, block_of(t), group, 0), x.number);
        group_barrier(group);
        for (int c = team() - 1; c >= first; c -= TOGETHER) {
            Sum4 v[TOGETHER][QUARTETS];
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                const bool valid = TOGETHER == 1 || c - t >= first;
                const Sum4 *from = sums_at(x.sums, block_of(valid ? c - t : c), group);
                keep(from);
#pragma unroll
                for (int e = 0; e < QUARTETS; e++) v[t][e] = valid ? __ldcg(from + e * 128) : Sum4{0, 0, 0, 0};
            }
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
#pragma unroll
                for (int e = 0; e < QUARTETS; e++) {
                    Sum *to = &acc[e / (COLUMNS / 8)][e % (COLUMNS / 8) * 4];
                    to[0] += v[t][e].x, to[1] += v[t][e].y, to[2] += v[t][e].z, to[3] += v[t][e].w;
                }
        }
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) write_outputs(a, map, acc[i], group, first_row + 64 * i, first_column, buffer);
}
