"""The `tonfa` command: `generate`, `quantize`, `doctor`. One file a command; heavy imports happen inside of them."""
