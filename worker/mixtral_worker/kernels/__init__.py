"""Code for one kind of processor, each beside the plain torch that computes the same."""
