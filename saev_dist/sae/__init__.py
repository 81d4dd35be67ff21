"""Sparse autoencoders: one in-memory form, an encoder, and a loader for each checkpoint format."""
