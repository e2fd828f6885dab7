// product_gate_residual: gate and residual in the product's epilogue (ops/fused.py).
#include "product.cuh"

struct Residual {
    u16* out;             // (M, N)
    const u16* residual;  // (M, N)
    const u16* gate;      // (M / length, N)
    int length;           // rows of an image
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
product_gate_residual(const __grid_constant__ Product p, const __grid_constant__ Residual e) {
    const Place place = place_of_block();
    if (place.row0 >= p.rows) return;
    Tile y;
    compute_tile<UNSIGNED>(p, place, y);
    const auto add = [](u32 residual, u32 gate, u32 word) {
        return T::pack(T::finite(fmaf(T::low(gate), T::low(word), T::low(residual))),
                       T::finite(fmaf(T::high(gate), T::high(word), T::high(residual))));
    };
    struct Line {
        size_t output, gate;
    };
    const auto line_of = [&](int row) {
        return Line{static_cast<size_t>(row) * p.columns, static_cast<size_t>(row / e.length) * p.columns};
    };
    for_outputs(p, place, y, line_of, [&](Line line, int column, uint4 words) {
        const uint4 residual = load8(e.residual + line.output + column, true);
        const uint4 gate = load8(e.gate + line.gate + column, true);
        store8(e.out + line.output + column, make_uint4(add(residual.x, gate.x, words.x), add(residual.y, gate.y, words.y),
                                      add(residual.z, gate.z, words.z), add(residual.w, gate.w, words.w)));
    });
}
