"""The worker: pulls chat jobs over HTTP, runs them in one batch on every rank of a torchrun, streams tokens back."""
