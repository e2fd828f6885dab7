"""`tonfa bench image` draws as `tonfa generate` does where no guidance is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tonfa.bench.image import ImageRequest, _draw
from tonfa.models.flux.guidance import choose_guidance


class Pipeline:
    """Notes what it is asked for."""

    def __init__(self, in_channels: int) -> None:
        self.transformer = SimpleNamespace(config={"in_channels": in_channels, "out_channels": 64})
        self.asked: dict[str, Any] = {}

    def __call__(self, **asked: Any) -> SimpleNamespace:
        self.asked = asked
        return SimpleNamespace(images=torch.ones(1, 3, asked["height"], asked["width"]))


@pytest.mark.parametrize(("in_channels", "guidance"), [(64, 3.5), (128, 10.0)], ids=["text", "control"])
def test_guidance_is_the_usual_one_of_the_model(in_channels: int, guidance: float) -> None:
    pipe, cpu = Pipeline(in_channels), torch.device("cpu")
    request = ImageRequest("model", None, 32, 48, 2, 16, 32, None, 1, 0, cpu)
    assert torch.equal(_draw(pipe, request)(), torch.ones(1, 3, 32, 48))
    assert pipe.asked["guidance_scale"] == guidance == choose_guidance(None, in_channels == 128)
    control: Tensor | None = pipe.asked.get("control_image")
    assert (control is not None) == (in_channels == 128)
    if control is not None:
        assert control[0, 0, :, 0].tolist() == torch.linspace(0, 1, 32).tolist()


def test_what_is_asked_for_comes_first() -> None:
    assert (choose_guidance(0.0, True), choose_guidance(7.0, False)) == (0.0, 7.0)
