// Sums over the GPUs of one host, each with a part of a layer: every GPU writes what it has into the memory of all others
// and adds up what it finds in its own. One trip over the link, where rings of copies take several, and a kernel that can
// go on with the sum in its registers.
//
// There is no separate signal: each 8 bytes written are 4 of data and a number that says which call they belong to, so
// that data is complete when the number is right (the LL protocol of NCCL). A block's calls alternate between two places.
// A GPU that has the data of a call knows that its sender has read what it got in the call before, so two suffice.
//
// Compiled with -D WORLD (GPUs), THREADS, ITEMS (of 8 elements for each thread: together a row), MODE, FP16.

#define SUM 0     // out = sum of all y
#define NORM 1    // total = x + the sum, out = RMSNorm of it
#define GATHER 2  // out = all y side by side: rows of WORLD times as many columns

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#include "early.cuh"
#include "pairs.cuh"

constexpr int LINES = 2 * THREADS * ITEMS;  // of 16 bytes: half of them data, for four elements

struct Arguments {
    const u16 *y, *x, *weight;
    u16 *total, *out;
    u32 *calls;            // of every block so far
    u64 memory[8];         // of every GPU, (blocks, 2, WORLD, LINES) of 16 bytes: the third index is the sender's
    int elements;          // of y
    int width, columns;    // elements of a row here, and of a row of y that is gathered
    int rank;
    float eps;
};

struct Octet {
    u32 words[4];
};

__device__ __forceinline__ Octet load(const u16 *from) {
    uint4 v = *(const uint4 *)from;
    return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store(u16 *to, const Octet &v) {
    *(uint4 *)to = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
}

__device__ __forceinline__ void send(u64 to, const Octet &v, u32 call) {
#pragma unroll
    for (int h = 0; h < 2; h++)
        asm volatile("st.volatile.global.v4.u32 [%0], {%1, %3, %2, %3};"
                     :: "l"(to + 16 * THREADS * h), "r"(v.words[2 * h]), "r"(v.words[2 * h + 1]), "r"(call) : "memory");
}

__device__ __forceinline__ Octet receive(u64 from, u32 call) {
    Octet v;
    u32 seen[4];
    do {
#pragma unroll
        for (int h = 0; h < 2; h++)
            asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.words[2 * h]), "=r"(seen[2 * h]), "=r"(v.words[2 * h + 1]), "=r"(seen[2 * h + 1])
                         : "l"(from + 16 * THREADS * h) : "memory");
    } while (seen[0] != call || seen[1] != call || seen[2] != call || seen[3] != call);
    return v;
}

// Every other call has the same place: whoever is there has left the one before.
__device__ __forceinline__ float sum_of_block(float v, u32 call) {
    __shared__ float of_warps[2][32];
    for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
    if (threadIdx.x % 32 == 0) of_warps[call % 2][threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x % 32 < THREADS / 32 ? of_warps[call % 2][threadIdx.x % 32] : 0.0f;
    for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) all_reduce(const __grid_constant__ Arguments a) {
    const int t = threadIdx.x;
    Octet mine[ITEMS], of_stream[ITEMS], weight[ITEMS];
    let_the_next_start();
    wait_for_the_kernel_before();
    u32 call = __ldcg(a.calls + blockIdx.x);
    for (int start = blockIdx.x * a.width; start < a.elements; start += gridDim.x * a.width) {
        call++;
        // The place of this thread's first line from sender 0.
        const u64 place = 16 * ((u64)(blockIdx.x * 2 + call % 2) * WORLD * LINES + t);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int at = 8 * (t + i * THREADS);
            mine[i] = at < a.width && start + at < a.elements ? load(a.y + start + at) : Octet{};
        }
        // Behind the end of y, too: what a thread gets is how it knows that its last but one has been read.
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
#pragma unroll
            for (int to = 0; to < WORLD; to++)
                if (to != a.rank) send(a.memory[to] + place + 16 * (a.rank * LINES + 2 * i * THREADS), mine[i], call);
        if constexpr (MODE == NORM)
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const int at = 8 * (t + i * THREADS);
                of_stream[i] = at < a.width ? load(a.x + start + at) : Octet{};
                weight[i] = at < a.width ? load(a.weight + at) : Octet{};
            }
        float2 sum[ITEMS][4];
        float squares = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int at = start + 8 * (t + i * THREADS);
            const bool inside = at - start < a.width && at < a.elements;
            // In the order of the ranks, so that all have the same bits.
#pragma unroll
            for (int from = 0; from < WORLD; from++) {
                const u64 theirs = a.memory[a.rank] + place + 16 * (from * LINES + 2 * i * THREADS);
                const Octet v = from == a.rank ? mine[i] : receive(theirs, call);
                if constexpr (MODE == GATHER) {
                    if (inside) store(a.out + (at / a.columns * WORLD + from) * a.columns + at % a.columns, v);
                    continue;
                }
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const float2 pair = unpacked(v.words[p]);
                    sum[i][p] = from ? make_float2(sum[i][p].x + pair.x, sum[i][p].y + pair.y) : pair;
                }
            }
            if constexpr (MODE == GATHER) continue;
            Octet rounded;
#pragma unroll
            for (int p = 0; p < 4; p++) rounded.words[p] = packed(sum[i][p].x, sum[i][p].y);
            if constexpr (MODE == SUM) {
                if (inside) store(a.out + at, rounded);
                continue;
            }
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float2 change = unpacked(rounded.words[p]), before = unpacked(of_stream[i].words[p]);
                rounded.words[p] = packed(before.x + change.x, before.y + change.y);
                sum[i][p] = unpacked(rounded.words[p]);
                squares += sum[i][p].x * sum[i][p].x + sum[i][p].y * sum[i][p].y;
            }
            if (inside) store(a.total + at, rounded);
        }
        if constexpr (MODE == NORM) {
            const float scale = 1.0f / sqrtf(sum_of_block(squares, call) / a.width + a.eps);
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const int at = 8 * (t + i * THREADS);
                if (at >= a.width) continue;
                Octet out;
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const float2 w = unpacked(weight[i].words[p]);
                    out.words[p] = packed(sum[i][p].x * scale * w.x, sum[i][p].y * scale * w.y);
                }
                store(a.out + start + at, out);
            }
        }
    }
    __syncthreads();  // all have read the number
    if (t == 0) a.calls[blockIdx.x] = call;
}
