"""Model cards, and their upload."""
