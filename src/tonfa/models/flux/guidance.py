"""The guidance scale of pictures for which none is asked for: commands and benchmarks draw with the same.

3.5 is the default of Diffusers' FLUX pipelines, 10 is what the model card of FLUX.1-Depth draws with.
"""

from __future__ import annotations

GUIDANCE, CONTROL_GUIDANCE = 3.5, 10.0


def choose_guidance(given: float | None, takes_control: bool) -> float:
    """The guidance scale that is asked for, else the usual one of such a model."""
    return given if given is not None else (CONTROL_GUIDANCE if takes_control else GUIDANCE)
