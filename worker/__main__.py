"""Entry of `python -m worker`, `python worker` and, for the worker, `torchrun worker`."""

from mixtral_worker.cli import main

if __name__ == "__main__":
    main()
