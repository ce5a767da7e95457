"""What each program that takes a VAE needs."""
