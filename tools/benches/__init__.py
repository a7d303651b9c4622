"""The benchmarks of `tide bench`."""
