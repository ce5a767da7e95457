"""Latent files and caches."""
