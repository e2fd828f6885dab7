"""How a command ends when it cannot go on: one message on stderr and an exit code, a traceback only with `--debug`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tonfa.errors import TonfaError

FAILED, INTERRUPTED = 1, 130

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, TonfaError) else f"{type(error).__name__}: {text}"


def _expected() -> tuple[type[BaseException], ...]:
    """Our own errors, what the disk, the network and the Hub raise, and a full GPU. Imports nothing."""
    kinds: list[type[BaseException]] = [TonfaError, OSError]
    if torch := sys.modules.get("torch"):
        kinds.append(torch.OutOfMemoryError)
    if hub := sys.modules.get("huggingface_hub.errors"):
        kinds.append(hub.HfHubHTTPError.__bases__[0])  # of the Hub's HTTP client: broken connections
    return tuple(kinds)


def command(*, interrupted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make expected failures exit with 1 and Ctrl-C with 130, each after a message. The function takes `debug`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, debug: bool, **kwargs: Any) -> None:
            try:
                function(*args, debug=debug, **kwargs)
            except KeyboardInterrupt:
                print(f"\ninterrupted; {interrupted}", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                if debug or not isinstance(error, _expected()):
                    raise
                print(f"error: {_message(error)}", file=sys.stderr)
                raise typer.Exit(FAILED) from None

        return run

    return decorate
