"""The report shows every result that the schema allows, says what the numbers say, and lets no text act as markup.

The stored page is rewritten by `SDVAE_UPDATE_GOLDEN=1 python -m pytest tests/report/test_html.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sdvae.report import charts
from sdvae.report import html as report
from sdvae.report.html import render_report
from sdvae.report.result import EvaluationResult, load_result

DATA = Path(__file__).parent / "data"
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page. Fails where a tag is closed that is not the one open."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [
            attrs for name, attrs in self.tags if name == tag and (not css or css in (attrs.get("class") or "").split())
        ]


@pytest.fixture
def data() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / "result.json").read_text(encoding="utf-8"))
    return loaded


def render(data: dict[str, Any]) -> str:
    return render_report(EvaluationResult(**{name: value for name, value in data.items() if name != "schema"}))


def normalised(html: str) -> str:
    """Without styles, script and pictures, which would hide in a comparison what the page says."""
    html = re.sub(r"<style>.*?</style>", "<style></style>", html, flags=re.S)
    html = re.sub(r"<script>.*?</script>", "<script></script>", html, flags=re.S)

    def short(match: re.Match[str]) -> str:
        return "data:" + hashlib.sha256(match[0].encode()).hexdigest()[:12]

    html = re.sub(r"data:image/[^\"]+", short, html)
    return "\n".join(line.strip() for line in html.splitlines() if line.strip()) + "\n"


def test_the_page_of_the_stored_result_is_the_stored_page() -> None:
    page = normalised(render_report(load_result(DATA / "result.json")))
    golden = DATA / "golden_report.html"
    if os.environ.get("SDVAE_UPDATE_GOLDEN"):
        golden.write_text(page, encoding="utf-8")
    assert page == golden.read_text(encoding="utf-8")


def test_nothing_in_the_page_points_outside_it(data: dict[str, Any]) -> None:
    page = Page(render(data))
    (policy,) = [attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in ("src", "href", "action", "poster", "srcset"):
            value = attrs.get(name)
            assert value is None or value.startswith("data:") or value.removeprefix("#") in ids, (name, value)
    assert "url(" not in report._source(report._environment(), "report.css")


# Hostile text

HOSTILE = (
    "\"'></script></script x></style></title><script>boom()</script><img src=x onerror=boom()><!--{{ 7 * 7 }}\u2028"
)
FIXED = {"verdict", "better", "kind", "role", "created", "original", "schema"}  # words and pictures of the schema


def poisoned(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {(HOSTILE if name in HOSTILE_NAMES else name): poisoned(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, key) for item in value]
    if isinstance(value, str) and key not in FIXED and not value.startswith("data:"):
        return HOSTILE if value in HOSTILE_NAMES else value if value in METRICS else HOSTILE + value
    return value


HOSTILE_NAMES = {"mine", "still"}  # a VAE and a slice, whose names are keys as well
METRICS = {"psnr", "ssim", "ms_ssim", "l1", "bias_r", "sharpness", "rfid", "tiny", "sd-vae-ft-mse", "outdoors"}


def test_no_text_of_a_result_becomes_markup(data: dict[str, Any]) -> None:
    clean, hostile = Page(render(data)), Page(render(poisoned(data)))
    assert [tag for tag, _ in clean.tags] == [tag for tag, _ in hostile.tags]
    assert not [attrs for _, attrs in hostile.tags if any(name.startswith("on") for name in attrs)]
    assert "boom()" in hostile.text and "{{ 7 * 7 }}" in hostile.text
    assert "<" not in hostile.scripts[0]  # nothing in there can end the element
    embedded = json.loads(hostile.scripts[0])
    assert embedded["vaes"] == [HOSTILE, "tiny", "sd-vae-ft-mse"]
    assert embedded["images"][1]["key"] == HOSTILE + data["gallery"][1]["key"]


# Every shape of a result


def only(*ids: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["vaes"] = [vae for vae in data["vaes"] if vae["id"] in ids]
        if not any(vae["role"] == "reference" for vae in data["vaes"]):
            data["comparisons"] = []
        for card in data["gallery"]:
            card["reconstructions"] = {name: uri for name, uri in card["reconstructions"].items() if name in ids}

    return change


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in names:
            data[name] = type(data[name])()

    return change


def four_vaes(data: dict[str, Any]) -> None:
    other = copy.deepcopy(data["vaes"][0]) | {"id": "a-name-without-end-" * 8}
    data["vaes"].insert(1, other)
    data["comparisons"].append(copy.deepcopy(data["comparisons"][1]) | {"vae": other["id"]})
    data["per_image"]["values"][other["id"]] = data["per_image"]["values"]["mine"]


def nothing_measured(data: dict[str, Any]) -> None:
    for vae in data["vaes"]:
        for entry in vae["summary"].values():
            entry |= {name: None for name in entry if name != "count"} | {"count": 0}
        for entries in vae["slices"].values():
            for entry in entries.values():
                entry |= dict.fromkeys(("mean", "low", "high")) | {"count": 0}
        vae["latents"]["channels"] = [dict.fromkeys(row) | {"active": False} for row in vae["latents"]["channels"]]
        vae["latents"]["correlation"] = [[None, None], [None, None]]
        vae["latents"]["power_spectrum"]["power"] = [[None] * 4] * 2
        vae["latents"]["suggested"] = {"scaling_factor": None, "shift_factor": None}
        vae["seconds_per_megapixel"] = {"encode": None, "decode": None}
    for comparison in data["comparisons"]:
        for name, entry in comparison["metrics"].items():
            comparison["metrics"][name] = dict.fromkeys(entry) | {"verdict": "undecided", "count": 0}
    for columns in data["per_image"]["values"].values():
        for name, column in columns.items():
            columns[name] = [None] * len(column)
    data["comparisons"][0]["swap"]["drift"] |= {
        "relative_rms": None,
        "mean": {"mine": [None] * 2, "sd-vae-ft-mse": [None] * 2},
    }


def one_image(data: dict[str, Any]) -> None:
    data["dataset"] |= {"num_images": 1, "unreadable": [], "num_found": 1}
    data["gallery"] = data["gallery"][:1]
    for columns in data["per_image"]["values"].values():
        for name, column in columns.items():
            columns[name] = column[:1]
    for name in ("keys", "widths", "heights", "slices"):
        data["per_image"][name] = data["per_image"][name][:1]
    for vae in data["vaes"]:
        for entry in vae["summary"].values():
            entry |= dict.fromkeys({"low", "high", "std"} & set(entry))
    for comparison in data["comparisons"]:
        for entry in comparison["metrics"].values():
            entry |= {"low": None, "high": None, "verdict": "undecided"} if "low" in entry else {}


def thirty_metrics(data: dict[str, Any]) -> None:
    for index in range(24):
        name = f"extra_{index}"
        data["metrics"].append(data["metrics"][0] | {"name": name, "title": f"Extra metric {index} with a long title"})
        for vae in data["vaes"]:
            vae["summary"][name] = vae["summary"]["psnr"]
            data["per_image"]["values"][vae["id"]][name] = data["per_image"]["values"][vae["id"]]["psnr"]
        for comparison in data["comparisons"]:
            comparison["metrics"][name] = comparison["metrics"]["psnr"]


def sixteen_channels(data: dict[str, Any]) -> None:
    health = data["vaes"][0]["latents"]
    health |= {"channels": health["channels"] * 8, "correlation": [[0.1] * 16] * 16}
    health["power_spectrum"]["power"] = health["power_spectrum"]["power"] * 8


def no_stress_and_no_latents(data: dict[str, Any]) -> None:
    for vae in data["vaes"]:
        vae |= {"stress": {}, "latents": {}, "slices": {}}
    data["dataset"]["slices"] = {}
    data["per_image"]["slices"] = [None] * len(data["per_image"]["keys"])


def not_finite(data: dict[str, Any]) -> None:
    data["vaes"][0]["summary"]["psnr"]["mean"] = float("nan")
    data["per_image"]["values"]["mine"]["psnr"][0] = float("inf")
    data["vaes"][0]["latents"]["kl_nats"] = float("inf")


def equal_values(data: dict[str, Any]) -> None:
    for columns in data["per_image"]["values"].values():
        for name, column in columns.items():
            columns[name] = [0.0] * len(column)


SHAPES = {
    "one VAE": only("mine"),
    "two VAEs, no reference": only("mine", "tiny"),
    "only the reference": only("sd-vae-ft-mse"),
    "four VAEs, one with a long name": four_vaes,
    "no values per image": without("per_image"),
    "no gallery": without("gallery"),
    "least": without("per_image", "gallery", "published", "gates", "warnings", "skipped_metrics"),
    "no metric": lambda data: [vae["summary"].clear() for vae in data["vaes"]],
    "nothing measured": nothing_measured,
    "one image": one_image,
    "thirty metrics": thirty_metrics,
    "sixteen channels": sixteen_channels,
    "no stress, latents and slices": no_stress_and_no_latents,
    "numbers that are not finite": not_finite,
    "equal values": equal_values,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_result_that_the_schema_allows_has_a_page(shape: str, data: dict[str, Any]) -> None:
    change = SHAPES[shape]
    change(data)
    if shape.startswith("only"):
        data["comparisons"] = []
    page = Page(render(data))
    assert not re.search(r"\b(None|nan|inf)\b|\{\{|<built-in", page.text)
    assert not re.search(
        r"[\s\"](nan|inf|None)[\s\"]", " ".join(str(attrs) for tag, attrs in page.tags if tag != "img")
    )
    wanted = {"summary", "protocol"} | ({"gallery"} if data["gallery"] else set())
    assert wanted <= {attrs["id"] for attrs in page.all("section") if "id" in attrs}


# What it says


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (
            ["better"] * 7 + ["worse", "undecided"],
            "is better than REF in 7 of 9 metrics, worse in 1 and undecided in 1",
        ),
        (["better"] * 3, "is better than REF in all 3 metrics"),
        (["worse"], "is worse than REF in its only metric"),
        (
            ["worse", "worse", "better", "undecided"],
            "is worse than REF in 2 of 4 metrics, better in 1 and undecided in 1",
        ),
        (["undecided"] * 4, "cannot be told from REF in any of 4 metrics"),
        (["worse", "undecided"], "is worse than REF in 1 of 2 metrics, undecided in 1"),
        ([], "was measured beside REF in no metric that has an interval to decide by"),
    ],
)
def test_the_answer_counts_the_verdicts(verdicts: list[str], words: str) -> None:
    assert " REF ".join(report._answer(verdicts)) == words


def test_set_metrics_without_an_interval_are_not_counted(data: dict[str, Any]) -> None:
    verdicts = [
        entry["verdict"] for entry in data["comparisons"][0]["metrics"].values() if entry.get("low") is not None
    ]
    first, rest = report._answer(verdicts)
    text = Page(render(data)).text
    assert "rfid" in data["comparisons"][0]["metrics"]
    assert f"mine {first} sd-vae-ft-mse {rest}, over 6 images." in text


def test_without_a_reference_the_best_of_each_headline_metric_is_named(data: dict[str, Any]) -> None:
    only("mine", "tiny")(data)
    text = Page(render(data)).text
    best = {vae["id"]: vae["summary"]["psnr"]["mean"] for vae in data["vaes"]}
    assert f"mine in PSNR ({best['mine']:.2f} dB)" in text and best["mine"] > best["tiny"]


def classes_of_row(html: str, title: str) -> list[str]:
    (row,) = re.findall(rf"<tr><th scope=\"row\"><details[^>]*><summary><b>{title}</b>.*?</tr>", html, flags=re.S)
    return re.findall(r'<td class="([^"]*)"><span class="narrow"><span class="vae', row)


def test_a_lead_is_tinted_only_where_the_paired_interval_shows_it(data: dict[str, Any]) -> None:
    ours, theirs = (comparison["metrics"]["psnr"] for comparison in data["comparisons"])
    ours["verdict"], theirs["verdict"] = "better", "worse"
    assert ["proven" in each for each in classes_of_row(render(data), "PSNR")] == [True, False, False]
    ours["verdict"] = "undecided"
    assert ["proven" in each for each in classes_of_row(render(data), "PSNR")] == [False, False, False]
    ours["verdict"] = "worse"
    assert ["proven" in each for each in classes_of_row(render(data), "PSNR")] == [False, False, True]


def test_where_less_is_better_the_least_is_bold_and_its_lead_points_right(data: dict[str, Any]) -> None:
    html = render(data)
    means = [vae["summary"]["l1"]["mean"] for vae in data["vaes"]]
    assert ["best" in each for each in classes_of_row(html, "L1")] == [mean == min(means) for mean in means]
    deltas = [comparison["metrics"]["l1"]["delta"] for comparison in data["comparisons"]]
    assert deltas[0] < 0 < deltas[1]
    row = html[html.index("<b>L1</b>") :].partition("</tr>")[0]
    left, right = sorted(float(x) for x in re.findall(r'class="dot" cx="([\d.]+)"', row))
    assert float(re.findall(r'class="dot" cx="([\d.]+)"', row)[0]) == right > 70 > left


def test_the_best_number_of_a_row_is_the_one_nearest_to_a_target(data: dict[str, Any]) -> None:
    for vae, mean in zip(data["vaes"], (-0.5, 0.1, 0.3), strict=True):
        vae["summary"]["bias_r"]["mean"] = mean
    assert ["best" in each for each in classes_of_row(render(data), "Bias R")] == [False, True, False]


def test_a_failed_gate_and_a_passed_one_are_told_apart(data: dict[str, Any]) -> None:
    page = Page(render(data))
    assert len(page.all("li", "fail")) == len(page.all("li", "pass")) == 1
    assert "✗ failed delta.l1>0.005 tiny: 3.04 is above 0.005" in page.text


def test_a_value_that_an_image_is_too_small_for_says_so(data: dict[str, Any]) -> None:
    reasons = [attrs["title"] for attrs in Page(render(data)).all("abbr")]
    values = data["per_image"]["values"].values()
    missing = sum(value is None for columns in values for column in columns.values() for value in column)
    assert missing and len(reasons) == missing
    assert all(reason and "too small" in reason for reason in reasons)


def test_the_pages_script_gets_the_numbers_of_the_gallery_only(data: dict[str, Any]) -> None:
    data["gallery"] = data["gallery"][2:4]
    embedded = json.loads(Page(render(data)).scripts[0])
    assert [image["key"] for image in embedded["images"]] == data["per_image"]["keys"][2:4]
    for place, image in enumerate(embedded["images"], start=2):
        for vae, columns in data["per_image"]["values"].items():
            assert image["values"][vae] == {name: column[place] for name, column in columns.items()}


# Charts


def test_a_histogram_counts_every_value_once() -> None:
    values = [0.1 * index for index in range(101)]
    edges = charts.bins(values)
    counts = charts._histogram(values, edges)
    assert sum(counts) == 101 and min(counts) > 0  # the largest value belongs to the last bin
    assert (edges[0], edges[-1]) == (0.0, pytest.approx(10.0))


@pytest.mark.parametrize(("sign", "good"), [(1.0, 3), (-1.0, 1)])
def test_a_paired_difference_is_green_on_the_better_side_of_zero(sign: float, good: int) -> None:
    svg = charts.difference_histogram([-1.0, 0.25, 0.5, 1.0], sign, "differences")
    counts = {
        name: sum(int(n) for n in re.findall(rf'<rect class="{name}"[^>]*><title>(\d+) images', svg))
        for name in ("good", "bad")
    }
    assert counts == {"good": good, "bad": 4 - good}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_better_side_of_a_difference_is_the_right_one(sign: float) -> None:
    svg = charts.delta_strip(sign * 0.5, sign * 0.5 - 0.1, sign * 0.5 + 0.1, 1.0, sign, "better", "")
    (x,) = re.findall(r'<circle class="dot" cx="([\d.]+)"', svg)
    assert float(x) == pytest.approx(70 + 65 * 0.5)


def test_the_axis_has_round_ticks_inside_its_ends() -> None:
    assert charts.nice_ticks(0.13, 0.94, 4) == pytest.approx([0.25, 0.5, 0.75])
    assert charts.nice_ticks(-3.2, 12.0, 5) == pytest.approx([0, 5, 10])


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [([20.0, 25.0], ["20", "25"]), ([0.7, 0.725, 0.75], ["0.700", "0.725", "0.750"]), ([-0.1, 0.0], ["−0.1", "0.0"])],
)
def test_the_labels_of_an_axis_are_exact_and_short(ticks: list[float], labels: list[str]) -> None:
    assert charts._labels(ticks) == labels


def test_a_line_leaves_out_what_was_not_measured() -> None:
    svg = charts.lines([("a", "v0", [(1, 2.0), (2, None), (5, 1.0)])], "label", x_title="x", x_ticks=[1, 2, 5])
    assert svg.count('<circle class="dot"') == 2
    assert charts.lines([("a", "v0", [(1, None)])], "label", x_title="x", x_ticks=[1]) == ""
