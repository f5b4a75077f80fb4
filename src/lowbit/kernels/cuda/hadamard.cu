// The Hadamard transform of rows of K = ODD * 2^LOG2 numbers; kernels/hadamard.py has the definition. A block takes a row:
// it is read once, held in shared memory in fp32, and written once.
//
// Numbers are handled in pairs of neighbours, their sum and difference being the first of the LOG2 steps. The others are
// done RADIX_i at a time, each thread with 2^RADIX_i pairs in registers, in the order of the definition.
//
// Compiled with -D ODD, LOG2, RADIX_1, RADIX_2, RADIX_3 (0: there is no such pass), THREADS, TYPE (0: bf16, 1: fp16,
// 2: fp32), SIGNED, INVERSE.

typedef unsigned int u32;

#define FP16 (TYPE == 1)
#include "early.cuh"
#include "pairs.cuh"

constexpr int HALF = (ODD - 1) / 2;
constexpr int COLUMNS = 1 << (LOG2 - 1);      // pairs that one number of Hartley's matrix multiplies
constexpr int PAIRS = ODD * COLUMNS;
constexpr int BATCH = ODD < 8 ? 8 / ODD : 1;  // columns of a thread that are on their way at once

struct Arguments {
    const void *x;
    const signed char *signs;
    void *out;
    float scale;
    float cosine[ODD], sine[ODD];             // of 2 pi m / ODD
};

// So that neither the first pass nor those behind it find their pairs in the same bank.
__device__ __forceinline__ int place(int pair) { return pair + (pair >> RADIX_1); }

__device__ __forceinline__ float2 load(const void *x, long long pair) {
#if TYPE == 2
    return ((const float2 *)x)[pair];
#else
    return unpacked(((const u32 *)x)[pair]);
#endif
}

__device__ __forceinline__ void store(void *out, long long pair, float2 v) {
#if TYPE == 2
    ((float2 *)out)[pair] = v;
#else
    ((u32 *)out)[pair] = packed(v.x, v.y);
#endif
}

__device__ __forceinline__ float2 signed_by(float2 v, const signed char *signs, int pair) {
    const char2 s = ((const char2 *)signs)[pair];
    return make_float2(v.x * s.x, v.y * s.y);
}

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 fma(float m, float2 a, float2 b) { return make_float2(fmaf(m, a.x, b.x), fmaf(m, a.y, b.y)); }
__device__ __forceinline__ float2 sum_and_difference(float2 v) { return make_float2(v.x + v.y, v.x - v.y); }

// Steps LOW + 1 to LOW + RADIX, counted from the first, which pairs of neighbours have behind them.
template <int LOW, int RADIX, class Finish>
__device__ __forceinline__ void pass(float2 *row, Finish finish) {
    for (int item = threadIdx.x; item < PAIRS >> RADIX; item += THREADS) {
        const int first = (item >> LOW << (LOW + RADIX)) + (item & ((1 << LOW) - 1));
        float2 v[1 << RADIX];
#pragma unroll
        for (int i = 0; i < 1 << RADIX; i++) v[i] = row[place(first + (i << LOW))];
#pragma unroll
        for (int step = 0; step < RADIX; step++)
#pragma unroll
            for (int i = 0; i < 1 << RADIX; i++)
                if (!(i >> step & 1)) {
                    const float2 a = v[i], b = v[i | 1 << step];
                    v[i] = a + b, v[i | 1 << step] = a - b;
                }
#pragma unroll
        for (int i = 0; i < 1 << RADIX; i++) finish(first + (i << LOW), v[i]);
    }
}

// Hartley's matrix times a column, and the first step.
__device__ __forceinline__ void mix(const Arguments &a, float2 (&v)[ODD], float2 *row, int column) {
    // cos + sin of an angle and of its negative share their parts: sums meet the cosines, differences the sines.
    float2 all = v[0];
#pragma unroll
    for (int j = 1; j <= HALF; j++) {
        const float2 one = v[j], other = v[ODD - j];
        v[j] = one + other, v[ODD - j] = one - other;
        all = all + v[j];
    }
    row[place(column)] = sum_and_difference(all);
#pragma unroll
    for (int i = 1; i <= HALF; i++) {
        float2 even = v[0], odd = make_float2(0, 0);
#pragma unroll
        for (int j = 1; j <= HALF; j++) {
            even = fma(a.cosine[i * j % ODD], v[j], even);
            odd = fma(a.sine[i * j % ODD], v[ODD - j], odd);
        }
        row[place(i * COLUMNS + column)] = sum_and_difference(even + odd);
        row[place((ODD - i) * COLUMNS + column)] = sum_and_difference(even - odd);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) hadamard(const __grid_constant__ Arguments a) {
    extern __shared__ float2 row[];
    let_the_next_start();
    wait_for_the_kernel_before();
    const long long start = (long long)blockIdx.x * PAIRS;
    for (int first = threadIdx.x; first < COLUMNS; first += THREADS * BATCH) {
        float2 v[BATCH][ODD];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int j = 0; j < ODD; j++) {
                const int pair = j * COLUMNS + min(first + b * THREADS, COLUMNS - 1);
                v[b][j] = load(a.x, start + pair);
                if constexpr (SIGNED && !INVERSE) v[b][j] = signed_by(v[b][j], a.signs, pair);
            }
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (first + b * THREADS < COLUMNS) mix(a, v[b], row, first + b * THREADS);
    }
    __syncthreads();
    auto keep = [&](int pair, float2 v) { row[place(pair)] = v; };
    auto finish = [&](int pair, float2 v) {
        v = make_float2(v.x * a.scale, v.y * a.scale);
        if constexpr (SIGNED && INVERSE) v = signed_by(v, a.signs, pair);
        store(a.out, start + pair, v);
    };
    if constexpr (RADIX_2 == 0) {
        pass<0, RADIX_1>(row, finish);
    } else {
        pass<0, RADIX_1>(row, keep);
        __syncthreads();
        if constexpr (RADIX_3 == 0) {
            pass<RADIX_1, RADIX_2>(row, finish);
        } else {
            pass<RADIX_1, RADIX_2>(row, keep);
            __syncthreads();
            pass<RADIX_1 + RADIX_2, RADIX_3>(row, finish);
        }
    }
}
