"""`python -m tonfa.cli`: the same as `tonfa`."""

from tonfa.cli.app import main

main()
