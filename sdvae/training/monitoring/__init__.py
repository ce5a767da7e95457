"""What a training run shows of itself while it goes on."""
