"""Training a KL-VAE: configuration, losses, one step, the loop around it."""
