"""Lets `python -m worker` find this folder; the code is the package mixtral_worker beside it."""
