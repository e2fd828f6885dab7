"""`python -m tonfa`: the same as `tonfa`."""

from tonfa.cli.app import main

main()
