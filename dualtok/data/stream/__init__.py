"""A split's blocks as batches, in an order that (seed, epoch) alone decide."""
