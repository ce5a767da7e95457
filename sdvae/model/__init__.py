"""The autoencoder itself: layers, posterior, tiling, and the diffusers-compatible class around them."""
