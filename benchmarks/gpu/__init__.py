"""Every figure that only a GPU can give, from one command: `python -m benchmarks.gpu --help`."""
