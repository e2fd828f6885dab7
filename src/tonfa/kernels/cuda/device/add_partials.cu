// add_partials: the sum over slices of product_gelu_quantize's low-rank partials, always in the same order.
struct Partials {
    const float4* partial;  // (slices, count)
    float4* sum;            // (count,)
    int count;              // a quarter of M * R
    int slices;
};

extern "C" __global__ void __launch_bounds__(128) add_partials(const __grid_constant__ Partials p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    float4 sum = p.partial[i];
#pragma unroll 4
    for (int slice = 1; slice < p.slices; slice++) {
        const float4 part = p.partial[static_cast<size_t>(slice) * p.count + i];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    p.sum[i] = sum;
}
