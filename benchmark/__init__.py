"""Lets `python -m benchmark` find this folder; the code is the package mixtral_benchmark beside it."""
