"""Images: found on disk, read as sRGB pixels, brought to the size that a VAE takes, and written."""
