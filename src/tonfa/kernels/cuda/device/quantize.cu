// quantize: smooth and quantize an input, with the low-rank down-projection (ops/quantize.py).
#include "quantize_rows.cuh"

struct Input {
    const u16* x;  // (M, K)
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
quantize(const __grid_constant__ Quantize p, const __grid_constant__ Input input) {
    quantize_rows(p, [&](int row, int k) {
        return load8(input.x + static_cast<size_t>(row) * p.out.channels + k, row < p.rows);
    });
}
