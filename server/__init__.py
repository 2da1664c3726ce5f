"""Lets `python -m server` find this folder; the code is the package mixtral_server beside it."""
