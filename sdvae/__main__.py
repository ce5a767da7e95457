"""`python -m sdvae` is the command `sdvae`."""

from sdvae.cli.main import main

main()
