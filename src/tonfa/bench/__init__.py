"""What `tonfa bench` measures: steps, linears, attention, pictures and errors, each beside its baselines in one run."""
