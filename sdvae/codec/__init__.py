"""Folders of images <-> latents: the files, the plan, and the run that carries it out."""
