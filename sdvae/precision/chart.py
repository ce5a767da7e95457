"""The chart of a precision audit: magnitudes of all layers in order of execution, as one SVG file of its own.

It brings its style along, in light and in dark, and needs no script; a layer's name shows when the pointer rests on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from sdvae.precision.activations import LayerPeak
from sdvae.precision.audit import Audit
from sdvae.precision.number_formats import LIMITS
from sdvae.precision.verdict import repair_of
from sdvae.report.charts import caption, px, stroke

__all__ = ["audit_chart"]

# Colours as in the report of an evaluation: told apart by colour-blind readers, each clear of its background.
_STYLE = """
  svg { --paper: #ffffff; --ink: #1b1c1f; --muted: #5f6268; --line: #e3e0da; --band: #f6f4f0; --bad: #b0302a;
    --stream: #0068a8; --block: #cc5200; --other: #85888f; background: var(--paper); color-scheme: light dark;
    font: 12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #1a1c1f; --ink: #eceae6; --muted: #a3a5aa; --line: #33363b; --band: #212428; --bad: #f4847b;
      --stream: #56b4e9; --block: #f08c42; --other: #8b8f97; } }
  text { fill: var(--muted); } .ink { fill: var(--ink); } .head { font-size: 15px; font-weight: 600; fill: var(--ink); }
  .end { text-anchor: end; } .middle { text-anchor: middle; } .over { fill: var(--bad); font-weight: 600; }
  .paper { fill: var(--paper); } .band { fill: var(--band); } .grid { stroke: var(--line); }
  .leader { stroke: var(--muted); stroke-width: 1; }
  .part { stroke: var(--muted); stroke-dasharray: 1 3; } .limit { stroke: var(--bad); stroke-width: 1.5; }
  .limit-text { fill: var(--bad); }
  .over, .limit-text, .name { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
  .stream { color: var(--stream); } .block { color: var(--block); }
  .other { color: var(--other); } circle { fill: currentColor; } .stem { stroke: currentColor; stroke-width: 1.2; }
  .tick { stroke: currentColor; stroke-width: 1.6; } .ring { fill: none; stroke: var(--bad); stroke-width: 2; }
"""
_WIDTH, _LEFT, _RIGHT, _TOP, _BASE = 1180, 64, 16, 84, 424
_BLOCK_LABEL_PX = 34  # a narrower block gets no label
_LEGEND = (
    ("stream", "residual stream: one power of two per network scales it"),
    ("block", "inside a block: its own power of two"),
    ("other", "normalised, or what a network takes and gives"),
)


def audit_chart(audit: Audit) -> str:
    """An SVG document: one dot per layer for its peak, a tick for its 99.99th percentile, a line for fp16's limit."""
    layers = audit.layers
    axes = _Axes.of(layers)
    verdict = audit.verdict("float16")
    title = f"Peak magnitudes in {audit.vae}: {verdict.sentence}"
    marks = Markup().join(
        (
            Markup('<rect class="paper" width="{}" height="{}"/>').format(_WIDTH, _BASE + 64),
            _heading(audit, verdict.sentence),
            *_blocks(layers, axes),
            *_grid(axes),
            *(_layer(layer, axes.x(index), axes) for index, layer in enumerate(layers)),
            *_annotation(audit, axes),
        )
    )
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" '
            'aria-label="{title}"><style>{style}</style>{marks}</svg>\n'
        ).format(w=_WIDTH, h=_BASE + 64, title=escape(title), style=Markup(_STYLE), marks=marks)
    )


@dataclass(frozen=True)
class _Axes:
    """Places of layers and of magnitudes, whose axis is logarithmic."""

    num_layers: int
    low: int  # powers of ten at both ends
    high: int

    @staticmethod
    def of(layers: Sequence[LayerPeak]) -> _Axes:
        positive = [value for layer in layers for value in (layer.peak, layer.percentile) if value > 0] or [1.0]
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        # half a power and more above the largest dot, for the label
        return _Axes(len(layers), max(-6, min(low, 0)), max(high + (math.log10(max(positive)) > high - 0.5), 6))

    def x(self, index: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (index + 0.5) / self.num_layers

    def y(self, magnitude: float) -> float:
        power = math.log10(max(magnitude, 10.0**self.low))
        return _BASE - (_BASE - _TOP) * (power - self.low) / (self.high - self.low)


def _heading(audit: Audit, sentence: str) -> Markup:
    name = audit.vae if len(audit.vae) <= 70 else "..." + audit.vae[-67:]
    images = f"{audit.num_images} image{'s' if audit.num_images != 1 else ''}"
    line = caption("head", _LEFT, 24, f"Peak magnitudes in {name}, {images}, float32") + caption(
        "ink", _LEFT, 43, sentence
    )
    x = float(_LEFT)
    for name, words in _LEGEND:
        line += Markup('<g class="{}"><circle cx="{}" cy="{}" r="4"/></g>').format(name, px(x + 4), 60)
        line += caption("", x + 13, 64, words)
        x += 30 + 6.1 * len(words)
    return line + caption("", x, 64, "dot: peak, tick: 99.99 %")


def _blocks(layers: Sequence[LayerPeak], axes: _Axes) -> Iterator[Markup]:
    """Bands for the blocks, with their names below, and lines between encoder and decoder."""
    half = (_WIDTH - _LEFT - _RIGHT) / axes.num_layers / 2
    part_before = ""
    groups = [(name, list(group)) for name, group in itertools.groupby(range(len(layers)), lambda i: _block(layers[i]))]
    for number, ((part, block), indices) in enumerate(groups):
        left, right = axes.x(indices[0]) - half, axes.x(indices[-1]) + half
        if number % 2:
            yield Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"/>').format(
                px(left), _TOP, px(right - left), _BASE - _TOP
            )
        if right - left >= max(_BLOCK_LABEL_PX, 6.5 * len(block)):
            yield caption("middle", (left + right) / 2, _BASE + 18, block)
        if part != part_before:
            if part_before:
                yield stroke("part", left, _TOP, left, _BASE + 44)
            yield caption("ink", left + 4, _BASE + 40, part)
        part_before = part


def _block(layer: LayerPeak) -> tuple[str, str]:
    """("decoder", "up 2") for decoder.up_blocks.2.resnets.0.conv1."""
    part, *path = layer.name.split(".")
    if not path:  # quant_conv stands after the encoder, post_quant_conv before the decoder
        return {"quant_conv": "encoder", "post_quant_conv": "decoder"}.get(part, part), ""
    if path[0].endswith("_block"):
        return part, path[0].removesuffix("_block")
    return part, f"{path[0].removesuffix('_blocks')} {path[1]}" if len(path) > 1 and path[1].isdigit() else ""


def _grid(axes: _Axes) -> Iterator[Markup]:
    every = math.ceil((axes.high - axes.low) / 10)
    for power in range(axes.low, axes.high + 1, every):
        y = axes.y(10.0**power)
        yield stroke("grid", _LEFT, y, _WIDTH - _RIGHT, y)
        yield caption("end", _LEFT - 8, y + 4, f"{10.0**power:g}" if -4 < power < 5 else f"1e{power}")
    y = axes.y(LIMITS["float16"])
    yield stroke("limit", _LEFT, y, _WIDTH - _RIGHT, y)
    yield caption("end limit-text", _WIDTH - _RIGHT, y - 5, f"fp16 ends at {LIMITS['float16']:g}")


def _layer(layer: LayerPeak, x: float, axes: _Axes) -> Markup:
    role = repair_of(layer.name) or "other"
    low, high = axes.y(layer.percentile), axes.y(layer.peak)
    words = f"{layer.name} ({layer.kind}): peak {layer.peak:.4g}, 99.99 % at most {layer.percentile:.4g}"
    ring = Markup('<circle class="ring" cx="{}" cy="{}" r="6"/>').format(px(x), px(high))
    return Markup('<g class="{}"><title>{}</title>{}{}<circle cx="{}" cy="{}" r="3.2"/>{}</g>').format(
        role,
        words,
        stroke("stem", x, low, x, high),
        stroke("tick", x - 3.5, low, x + 3.5, low),
        px(x),
        px(high),
        ring if layer.peak > LIMITS["float16"] else Markup(),
    )


def _annotation(audit: Audit, axes: _Axes) -> Iterator[Markup]:
    """The name of the layer that the verdict on fp16 speaks of, above all dots, with a line to its own."""
    name = audit.verdict("float16").layer
    index = next(index for index, layer in enumerate(audit.layers) if layer.name == name)
    layer, x = audit.layers[index], axes.x(index)
    side, step = ("end", -5) if x > _WIDTH / 2 else ("", 5)
    kind = "over" if layer.peak > LIMITS["float16"] else "ink name"
    yield stroke("leader", x, _TOP + 4, x, axes.y(layer.peak) - 7)
    yield caption(f"{kind} {side}", x + step, _TOP + 14, f"{name}: {layer.peak:.3g}")
