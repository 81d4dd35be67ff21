"""saev_dist: what drives each feature of a sparse autoencoder, over any number of activations."""

__version__ = "0.1.0"
