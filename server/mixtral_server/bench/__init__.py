"""What one server process can do, measured from outside. `python -m mixtral_server.bench --help`; figures: docs/server-speed.md."""
