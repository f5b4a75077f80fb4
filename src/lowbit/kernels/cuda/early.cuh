// Inside CUDA graphs kernels are launched early: they start before the one ahead of them has ended.

// From here on the kernel behind may start; it waits for this one's end where it reads results.
__device__ __forceinline__ void let_the_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Everything that kernels ahead have written is visible behind this. Every block has to come by.
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
