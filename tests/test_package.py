"""What `import tonfa` loads, and the names that it gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import tonfa

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "triton", "numba", "huggingface_hub", "PIL")


def loaded_after(statement: str) -> set[str]:
    """The heavy modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import tonfa") == set()


def test_public_names_of_errors_load_nothing_heavy() -> None:
    assert loaded_after("from tonfa import TonfaError, __version__; import tonfa; dir(tonfa)") == set()


def test_the_linear_needs_neither_diffusers_nor_compilers() -> None:
    assert loaded_after("from tonfa import SVDQLinear") <= {"torch"}


def test_the_command_line_starts_light() -> None:
    statement = "import sys; sys.argv = ['tonfa', '--version']\nfrom tonfa.cli.app import main\n"
    assert loaded_after(statement + "try:\n    main()\nexcept SystemExit as e:\n    assert e.code == 0") == set()


@pytest.mark.parametrize("name", tonfa.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(tonfa, name) is not None
    assert name in dir(tonfa)


def test_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert tonfa.__version__ == version("tonfa")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        _ = tonfa.NoSuchThing


def test_diffusers_finds_its_base_class() -> None:
    """Diffusers reads `library.ModelMixin` when it loads a pipeline whose transformer is ours."""
    import diffusers

    assert tonfa.ModelMixin is diffusers.ModelMixin
    assert issubclass(tonfa.SVDQFluxTransformer2DModel, tonfa.ModelMixin)
    assert "ModelMixin" not in tonfa.__all__


def test_saved_pipelines_name_a_module_that_is_imported() -> None:
    """`model_index.json` holds the class's module; Diffusers takes a second-to-last part 'flux' for one of its own."""
    from diffusers import FluxPipeline  # noqa: F401, loading it makes 'flux' a name that Diffusers knows
    from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple

    assert _fetch_class_library_tuple(tonfa.SVDQFluxTransformer2DModel) == ("tonfa", "SVDQFluxTransformer2DModel")
