"""Entry of `python -m benchmark`, `python benchmark` and, for the worker, `torchrun worker`."""

from mixtral_benchmark.cli import main

if __name__ == "__main__":
    main()
