"""Strips of 8 rows, and chunks of one strip, so that small images have many of both."""

from functools import partial

from sdvae.model.strips.passes import StripSizes, streamed

TINY_STRIPS = StripSizes(least_rows=8, strip_bytes=1, least_blocks=0, chunk_bytes=1)

tiny_streamed = partial(streamed, sizes=TINY_STRIPS)
