"""Entry of `python -m server`, `python server` and, for the worker, `torchrun worker`."""

from mixtral_server.cli import main

if __name__ == "__main__":
    main()
