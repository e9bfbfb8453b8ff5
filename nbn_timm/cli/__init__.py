"""Console commands: parse, build, run."""
