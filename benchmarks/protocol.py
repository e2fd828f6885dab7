"""The protocol of `tonfa bench`, for scripts in this folder."""

from tonfa.bench.protocol import *  # noqa: F403
