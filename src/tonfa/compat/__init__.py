"""Stand-ins for other packages, so that scripts written for them run here; each has to be asked for."""
