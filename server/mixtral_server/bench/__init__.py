"""What one server process can do, measured from outside it. `python -m mixtral_server.bench --help` tells how; docs/server-speed.md what came out."""
