"""The `tonfa` command: `generate`, `quantize`, `inspect`, `convert`, `verify`, `doctor`, `bench`.

One file a command; heavy imports happen inside of them.
"""
