"""Numbers over images and latents."""
