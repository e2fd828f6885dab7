// product: the 4-bit product with its low-rank up-projection and bias (ops/product.py).
#include "product.cuh"

struct Output {
    u16* y;  // (M, N)
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
product(const __grid_constant__ Product p, const __grid_constant__ Output out) {
    const Place place = place_of_block();
    if (place.row0 >= p.rows) return;
    Tile y;
    compute_tile<UNSIGNED>(p, place, y);
    for_outputs(
        p, place, y, [&](int row) { return out.y + static_cast<size_t>(row) * p.columns; },
        [](u16* line, int column, uint4 words) { store8(line + column, words); });
}
