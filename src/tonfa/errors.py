"""Every error that tonfa raises on purpose. Each message names what was wrong, what was expected and what to do."""


def printable(text: str) -> str:
    """`text` with escapes in place of control characters: names in files may hold codes that steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class TonfaError(Exception):
    """Base of all errors of this package: catch it to handle any of them."""

    def __str__(self) -> str:
        return printable(super().__str__())


class FormatError(TonfaError, ValueError):
    """A tensor's shape, dtype or device does not fit what an op, a layer or a model expects."""


class CheckpointError(TonfaError, ValueError):
    """A file or folder of weights is missing, truncated, incomplete, misshapen or of another kind."""


class UnsupportedError(TonfaError, ValueError):
    """A known request that cannot be served here: an option, a device, a size, a combination of them."""


class KernelError(TonfaError, RuntimeError):
    """A kernel could not be compiled, loaded or started; the message holds its name, the device and the log."""
