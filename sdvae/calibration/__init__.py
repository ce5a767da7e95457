"""scaling_factor and channel statistics."""
