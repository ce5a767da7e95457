"""Frozen networks that losses and metrics share, and where their weights come from."""
