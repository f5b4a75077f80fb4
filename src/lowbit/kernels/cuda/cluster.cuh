// Blocks that share memory: CLUSTER of them, or one by itself.

__device__ __forceinline__ void arrive_cluster() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// Every block of the cluster has come to the same place: sums written before it can be read after it.
__device__ __forceinline__ void wait_cluster() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same address of shared memory in block `rank` of the cluster.
__device__ __forceinline__ u32 shared_of(u32 at, int rank) {
#if CLUSTER > 1
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    return there;
#else
    return at;
#endif
}

// A float of the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float read_float(u32 at, int rank) {
    float v;
#if CLUSTER > 1
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(shared_of(at, rank)));
#else
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
#endif
    return v;
}
