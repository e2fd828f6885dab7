"""What the CUDA backend makes of canonical weights and inputs, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ctypes import Array, c_float, c_int32, c_int64, c_void_p

import pytest
import torch

from support import outlier_input, random_modulation, random_weights
from tonfa.errors import FormatError, UnsupportedError
from tonfa.kernels.cuda.catalog import kernels
from tonfa.kernels.cuda.contract import aligned, check_operand
from tonfa.kernels.cuda.kernel import Struct, _device_code
from tonfa.kernels.cuda.product import pack_product, product_struct, tile_grid, unpack_product
from tonfa.kernels.cuda.product_gelu_quantize import tiles_of_slice
from tonfa.kernels.cuda.quantize import (
    pack_activation,
    pack_input,
    quantize_grid,
    rank_chunk,
    unpack_activation,
    unpack_input,
)
from tonfa.kernels.cuda.w4a16 import pack_w4a16, unpack_w4a16
from tonfa.ops import quantize as op
from tonfa.ops.activation import InputWeights

DTYPES = [torch.bfloat16, torch.float16]


def input_weights(w) -> InputWeights:
    return InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "int4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "rank"), [(128, 32), (200, 16), (202, 5), (1, 256)])
def test_weights_come_back(n: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = random_weights(n, 192, rank, generator=generator, dtype=dtype)
    packed = pack_product(w)
    assert packed.columns % 8 == 0 and packed.proj_up.shape[1] % 16 == 0
    for found, expected in zip(unpack_product(packed), (w.qweight, w.wscales, w.proj_up, w.bias), strict=True):
        assert torch.equal(found, expected)
    assert not packed.qweight[n:].any() and not packed.bias[n:].any() and not packed.proj_up[:, rank:].any()

    inputs = pack_input(input_weights(w))
    back = unpack_input(inputs)
    assert torch.equal(back.proj_down, w.proj_down) and torch.equal(back.smooth_factor, w.smooth_factor)
    assert back.unsigned == w.unsigned and not inputs.proj_down[rank:].any()
    assert torch.equal(inputs.smooth[:, 1], 1 / w.smooth_factor.float())


def structs(kind: type[Struct]) -> Iterator[type[Struct]]:
    yield kind
    for nested in kind.nested():
        yield from structs(nested)


def test_structs_have_the_fields_of_the_device_code_in_its_order() -> None:
    text = "\n".join(_device_code("tonfa.kernels.cuda").values())
    kinds = {s for kernel in kernels() for parameter in kernel.parameters for s in structs(parameter)}
    assert len(kinds) == 12
    for kind in kinds:
        (body,) = re.findall(rf"^struct {kind.__name__} {{\n(.*?)^}};", text, re.S | re.M)
        fields = re.findall(r"^\s+([\w ]+?)(\*?) +(\w+)(?:\[\w+\])?;", body, re.M)
        assert [name for _, _, name in fields] == [name for name, _ in kind._fields_]
        for (written, star, _), (_, held) in zip(fields, kind._fields_, strict=True):
            device_type = "pointer" if star else written
            held = held._type_ if issubclass(held, Array) else held
            host_type = {c_void_p: "pointer", c_int32: "int", c_int64: "long long", c_float: "float"}.get(
                held, held.__name__
            )
            assert device_type == host_type


def test_weights_that_fit_are_not_copied(generator: torch.Generator) -> None:
    w = random_weights(3072, 128, generator=generator)
    packed = pack_product(w)
    for found, expected in ((packed.qweight, w.qweight), (packed.wscales, w.wscales), (packed.proj_up, w.proj_up)):
        assert found.data_ptr() == expected.data_ptr()


def test_misaligned_tensors_are_copied() -> None:
    base = torch.arange(64, dtype=torch.uint8)
    start = -base.data_ptr() % 16
    assert aligned(base[start : start + 16]).data_ptr() == base.data_ptr() + start
    moved = aligned(base[start + 1 : start + 17])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, base[start + 1 : start + 17])


@pytest.mark.parametrize("n", [192, 18])
def test_modulations_come_back(n: int, generator: torch.Generator) -> None:
    w = random_modulation(n, 128, generator=generator)
    back = unpack_w4a16(pack_w4a16(w))
    assert all(torch.equal(found, w.tensors()[name]) for name, found in back.tensors().items())


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
def test_inputs_come_back(rows: int, unsigned: bool, generator: torch.Generator) -> None:
    w = random_weights(64, 128, generator=generator, unsigned=unsigned)
    x = op.reference(outlier_input(rows, 128, generator).abs(), input_weights(w))
    packed = pack_activation(x)
    back = unpack_activation(packed, unsigned)
    assert torch.equal(back.codes, x.codes) and torch.equal(back.scales, x.scales)
    struct, _ = product_struct(packed, pack_product(w))
    assert (struct.rows, struct.columns, struct.channels, struct.rank) == (rows, 64, 128, 32)
    assert struct.scale_stride % 8 == 0 and struct.scale_stride >= rows and struct.lowrank_stride % 4 == 0


def test_lowrank_columns_of_a_shared_input_are_read_in_place(generator: torch.Generator) -> None:
    w = random_weights(64, 64, generator=generator)
    x = pack_activation(op.reference(outlier_input(5, 64, generator), input_weights(w)))
    joint = torch.cat((x.lowrank, x.lowrank), dim=1)
    halves = type(x)(x.codes, x.scales, joint, x.dtype).split((32, 32))
    struct, _ = product_struct(halves[1], pack_product(w))
    assert struct.lowrank == joint.data_ptr() + 128 and struct.lowrank_stride == 64


def test_other_dtypes_and_layouts_are_refused(generator: torch.Generator) -> None:
    w = random_weights(64, 64, generator=generator)
    single = random_weights(64, 64, generator=generator, dtype=torch.float32)
    for pack, weights in ((pack_product, single), (pack_input, input_weights(single))):
        with pytest.raises(UnsupportedError, match=r"torch.float32; convert the layer with .to\(torch.bfloat16\)"):
            pack(weights)
    x = op.reference(outlier_input(5, 64, generator), input_weights(w))
    with pytest.raises(FormatError, match="must come from this backend's quantize"):
        product_struct(x, pack_product(w))
    packed = pack_activation(x)
    with pytest.raises(FormatError, match="expected 128 channels"):
        product_struct(packed, pack_product(random_weights(64, 128, generator=generator)))
    row_major = type(x)(packed.codes, x.scales, x.lowrank, x.dtype)
    with pytest.raises(FormatError, match="its layout is another one"):
        product_struct(row_major, pack_product(w))
    with pytest.raises(FormatError, match="the input is torch.bfloat16, the weights are torch.float16"):
        product_struct(packed, pack_product(random_weights(64, 64, generator=generator, dtype=torch.float16)))
    with pytest.raises(FormatError, match="more than 4 GiB of codes; split the rows"):
        check_operand("product", 2**20, 12288)


def test_grids_cover_every_tile_once() -> None:
    for rows in (1, 128, 129, 512, 4608, 16896):
        height, columns, bands = tile_grid(rows, 3072)
        tiles = -(-rows // 128)
        assert columns == 24 and height <= 16 and tiles <= height * bands < tiles + bands
    assert tile_grid(4608, 200) == (12, 2, 3)


def test_slices_are_chosen_by_the_number_of_processors() -> None:
    assert [tiles_of_slice(36, 96, processors) for processors in (82, 108, 128, 132)] == [2, 8, 2, 2]
    assert tiles_of_slice(1, 8, 132) == 1


def test_ranks_are_computed_in_chunks(generator: torch.Generator) -> None:
    chunks = [rank_chunk(rank) for rank in (16, 32, 48, 64, 256)]
    assert chunks == [32, 32, 64, 64, 64]
    w = pack_input(input_weights(random_weights(64, 64, 80, generator=generator)))
    assert (w.padded_rank, w.rank_chunk, w.proj_down.shape[0]) == (80, 64, 128)
    assert quantize_grid(33, w) == (2, 2)
