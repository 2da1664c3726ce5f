"""Entry of `python -m mixtral_server.bench`."""

from mixtral_server.bench.cli import main

if __name__ == "__main__":
    main()
