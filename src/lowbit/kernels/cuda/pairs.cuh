// Two neighbours of 16 bits, as one word and as fp32: fp16 where FP16 is defined as 1, else bf16.

#if FP16
#define ELEMENT "f16"
#else
#define ELEMENT "bf16"
#endif

__device__ __forceinline__ u32 packed(float low, float high) {
    u32 out;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ float2 unpacked(u32 word) {
#if FP16
    float2 out;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(out.x), "=f"(out.y) : "r"(word));
    return out;
#else
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#endif
}
