// norm_modulate_quantize: LayerNorm and modulation on the way into quantization (ops/fused.py).
//
// Mean and deviation of the block's 32 rows come first, a row at a time for each warp and in two passes (a row of 3072
// channels is 6 KB, so the second reads L1); the main pass then finds the rows in L2.
#include "quantize_rows.cuh"

struct Norm {
    const u16* x;      // (B * L, K)
    const u16* scale;  // (B, K), holds the 1 of "1 + scale"
    const u16* shift;  // (B, K)
    int length;        // L
    float epsilon;
};

__device__ inline float2 mean_and_inverse_deviation(const u16* x, int channels, float epsilon) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int k = 8 * lane; k < channels; k += 256) {
        const uint4 w = load8(x + k, true);
        sum += ((T::low(w.x) + T::high(w.x)) + (T::low(w.y) + T::high(w.y))) +
               ((T::low(w.z) + T::high(w.z)) + (T::low(w.w) + T::high(w.w)));
    }
    const float mean = warp_sum(sum) / static_cast<float>(channels);
    float squares = 0.0f;
    const auto add = [&](u32 word) {
        const float low = T::low(word) - mean, high = T::high(word) - mean;
        squares = fmaf(low, low, fmaf(high, high, squares));
    };
    for (int k = 8 * lane; k < channels; k += 256) {
        const uint4 w = load8(x + k, true);
        add(w.x), add(w.y), add(w.z), add(w.w);
    }
    return make_float2(mean, rsqrtf(warp_sum(squares) / static_cast<float>(channels) + epsilon));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
norm_modulate_quantize(const __grid_constant__ Quantize p, const __grid_constant__ Norm norm) {
    __shared__ float2 moments[ROWS];
    __shared__ int images[ROWS];
    const int channels = p.out.channels;
    for (int i = threadIdx.x / 32; i < ROWS; i += WARPS) {
        const int row = blockIdx.x * ROWS + i;
        if (row >= p.rows) break;
        const float2 found =
            mean_and_inverse_deviation(norm.x + static_cast<size_t>(row) * channels, channels, norm.epsilon);
        if (threadIdx.x % 32 == 0) {
            moments[i] = found;
            images[i] = row / norm.length;
        }
    }
    __syncthreads();
    quantize_rows(p, [&](int row, int k) {
        if (row >= p.rows) return make_uint4(0, 0, 0, 0);
        const float2 moment = moments[row % ROWS];
        const size_t image = static_cast<size_t>(images[row % ROWS]) * channels + k;
        const uint4 x = load8(norm.x + static_cast<size_t>(row) * channels + k, true);
        const uint4 scale = load8(norm.scale + image, true), shift = load8(norm.shift + image, true);
        const auto modulate = [&](u32 v, u32 times, u32 plus) {
            return T::pack(fmaf((T::low(v) - moment.x) * moment.y, T::low(times), T::low(plus)),
                           fmaf((T::high(v) - moment.x) * moment.y, T::high(times), T::high(plus)));
        };
        return make_uint4(modulate(x.x, scale.x, shift.x), modulate(x.y, scale.y, shift.y),
                          modulate(x.z, scale.z, shift.z), modulate(x.w, scale.w, shift.w));
    });
}
