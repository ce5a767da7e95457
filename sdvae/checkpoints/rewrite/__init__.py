"""Weights changed, function kept."""
