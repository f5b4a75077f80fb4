// Decodes rows of W into bf16, every weight rounded once. Any format, straight from the canonical planes.
//
// A thread decodes the same chunk of some rows, so that a warp reads and writes whole lines. The product with the scale
// is taken in fp32: nothing is multiplied here that tensor cores would have to keep up with.

#include "decode.cuh"

constexpr int ROWS = 8;  // at a time
constexpr int THREADS = 256;
constexpr int PASSES = HAS_TABLE ? 4 : 1;  // more rows are worth a table

template <int BYTES, int WORDS>
__device__ __forceinline__ void read_global(u32 (&out)[WORDS], const u8 *from) {
    if constexpr (BYTES == 8) {
        const uint2 v = __ldg((const uint2 *)from);
        out[0] = v.x, out[1] = v.y;
    }
    if constexpr (BYTES == 4) out[0] = __ldg((const u32 *)from);
    if constexpr (BYTES == 2) out[0] = __ldg((const u16 *)from);
    if constexpr (BYTES == 1) out[0] = __ldg(from);
}

// `a.y` is the output, `out_stride` elements per row. Rows [first_row, first_row + rows) of W, columns of [begin, end).
extern "C" __global__ void __launch_bounds__(THREADS)
dequant(const __grid_constant__ Arguments a, int first_row, int rows, int begin, int end, int out_stride) {
    __shared__ u32 tables[TABLE_WORDS];
    const u32 table = fill_table(tables, a);
    if constexpr (HAS_TABLE) __syncthreads();
    const int chunks = (end - begin) / CHUNK, blocks = (chunks + THREADS - 1) / THREADS;
    const int chunk = blockIdx.x % blocks * THREADS + threadIdx.x, first = blockIdx.x / blocks * ROWS * PASSES;
    if (chunk >= chunks) return;
    const int k = begin + chunk * CHUNK, column = SCALE_MODE == PER_ROW ? 0 : k / GROUP;
    for (int row_0 = first; row_0 < min(first + ROWS * PASSES, rows); row_0 += ROWS) {
        Chunk c[ROWS];
        RawScale scale[ROWS];
        u32 zero[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const long long n = first_row + min(row_0 + r, rows - 1);
            read_global<QUAD>(c[r].main, a.codes + n * a.stride + k / CHUNK * QUAD);
            if constexpr (HAS_2) read_global<TWO>(c[r].two, a.codes2 + n * a.stride2 + k / CHUNK * TWO);
            if constexpr (HAS_1) read_global<ONE>(c[r].one, a.codes1 + n * a.stride1 + k / CHUNK * ONE);
            const ScaleRow from = scale_row(a, n);
            scale[r] = load_scale(from, column);
            zero[r] = load_zero(from, column);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (row_0 + r >= rows) break;
            float s = scale_value(a, scale[r]) * UNDO;
            if constexpr (OUTER_K == 0) s *= __ldg(a.outer);
            const u32 base = base_value(zero[r]);
            float v[CHUNK];
#pragma unroll
            for (int p = 0; p < CHUNK / 2; p++) {
                const u32 w = decode(c[r], p / 4, p % 4, base, table);
                const Pair pair = pair_codes(p);
                v[pair.first] = __uint_as_float(w << 16) * s;
                v[pair.second] = __uint_as_float(w & 0xffff0000) * s;
            }
            uint4 *to = (uint4 *)(a.y + (long long)(row_0 + r) * out_stride + chunk * CHUNK);
#pragma unroll
            for (int i = 0; i < CHUNK / 8; i++)
                to[i] = make_uint4(narrow2(v[8 * i], v[8 * i + 1]), narrow2(v[8 * i + 2], v[8 * i + 3]),
                                   narrow2(v[8 * i + 4], v[8 * i + 5]), narrow2(v[8 * i + 6], v[8 * i + 7]));
        }
    }
}
