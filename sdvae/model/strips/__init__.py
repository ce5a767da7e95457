"""Exact execution in strips of rows."""
