"""The report in a browser: a headless Chromium opens the file and works it as a reader would."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdvae.report.html import render_report
from sdvae.report.result import load_result

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

DATA = Path(__file__).parent / "data"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        launched = api.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(load_result(DATA / "result.json")), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Any]:
    """Opens the report; afterwards the console must be empty and nothing but the file have been asked for."""
    pages: list[Any] = []
    said: list[str] = []
    requests: list[str] = []

    def opened(width: int = 1280, height: int = 900, **options: Any) -> Page:
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(5000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert said == []
    assert {each for each in requests if not each.startswith("data:")} == {url}


@pytest.fixture
def page(open_page: Any) -> Page:
    return open_page()


def names(page: Page) -> list[str]:
    return page.locator(".shot:visible h3").all_inner_texts()


def sorted_names(vae: str, metric: str, reverse: bool = False, minus: str | None = None) -> list[str]:
    """Names by a metric of which more is better, the smallest first."""
    per_image = load_result(DATA / "result.json").per_image
    values = per_image["values"]
    scores = [value - (values[minus][metric][place] if minus else 0) for place, value in enumerate(values[vae][metric])]
    order = sorted(range(len(scores)), key=lambda place: scores[place], reverse=reverse)
    return [per_image["keys"][place] for place in order]


def clip(page: Page, selector: str) -> str:
    value: str = page.locator(selector).evaluate("each => getComputedStyle(each).clipPath")
    return value


def test_the_picture_is_cut_where_the_slider_stands(page: Page) -> None:
    shot = ".shot >> nth=0"
    assert clip(page, f"{shot} >> img.b") == "inset(0px 0px 0px 50%)"
    page.locator(f"{shot} >> .wipe").fill("20")
    assert clip(page, f"{shot} >> img.b") == "inset(0px 0px 0px 20%)"
    page.locator(f"{shot} >> .wipe").focus()
    page.keyboard.press("ArrowRight")
    assert clip(page, f"{shot} >> img.b") == "inset(0px 0px 0px 20.5%)"


def test_a_drag_across_the_picture_moves_the_boundary_and_opens_nothing(page: Page) -> None:
    pictures = page.locator(".shot .pictures").first
    pictures.scroll_into_view_if_needed()
    box = pictures.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=4)
    page.mouse.up()
    assert float(page.locator(".shot .wipe").first.input_value()) == pytest.approx(80, abs=1)
    assert not page.locator("#lightbox").is_visible()


def test_the_worst_images_of_the_shown_vae_come_first_and_sorting_follows_the_choice(page: Page) -> None:
    assert names(page) == sorted_names("mine", "psnr")
    page.select_option("#order", "best")
    assert names(page) == sorted_names("mine", "psnr", reverse=True)
    page.select_option("#order", "worst")
    page.select_option("#sort", "delta:ssim")
    assert names(page) == sorted_names("mine", "ssim", minus="sd-vae-ft-mse")
    page.select_option("#show", "tiny")
    assert names(page) == sorted_names("tiny", "ssim", minus="sd-vae-ft-mse")
    page.select_option("#sort", "name")
    assert names(page) == sorted(names(page))


def test_images_without_the_number_come_last_in_both_orders(page: Page) -> None:
    page.select_option("#sort", "value:sharpness")
    assert names(page)[-1] == "outdoors/rocket.jpg"
    page.select_option("#order", "best")
    assert names(page)[-1] == "outdoors/rocket.jpg"


def test_the_filters_hide_what_does_not_match(page: Page) -> None:
    page.fill("#filter", "ROCK")
    assert names(page) == ["outdoors/rocket.jpg"]
    assert page.locator("#tally").inner_text() == "1 of 6 images"
    page.fill("#filter", "")
    page.select_option("#slice", "outdoors")
    assert len(names(page)) == 3
    page.fill("#filter", "no such name")
    assert names(page) == [] and page.locator("#empty").is_visible()


def test_choosing_vaes_changes_the_pictures_and_never_compares_one_with_itself(page: Page) -> None:
    shown = page.locator(".shot img.b").first
    page.select_option("#compare", "tiny")
    assert page.locator(".shot img.a").first.get_attribute("data-of") == "tiny"
    page.select_option("#show", "tiny")
    assert shown.get_attribute("data-of") == "tiny"
    assert page.locator("#compare").input_value() == ""
    assert page.locator(".shot .label.right").first.inner_text() == "tiny"


def test_the_difference_is_blended_and_amplified(page: Page) -> None:
    page.locator("#gallery .modes >> text=Difference").click()
    page.locator("#gain").fill("16")
    picture = page.locator(".shot img.b").first
    assert picture.evaluate("each => getComputedStyle(each).mixBlendMode") == "difference"
    pictures = page.locator(".shot .pictures").first
    assert pictures.evaluate("each => getComputedStyle(each).filter") == "brightness(16)"


def test_side_by_side_shows_the_two_next_to_each_other(page: Page) -> None:
    page.locator("#gallery .modes >> text=Side by side").click()
    left = page.locator(".shot img.a").first.bounding_box()
    right = page.locator(".shot img.b").first.bounding_box()
    assert left["y"] == right["y"] and right["x"] >= left["x"] + left["width"]


def test_the_lightbox_is_worked_by_keys_and_gives_the_focus_back(page: Page) -> None:
    order = names(page)
    page.locator(".shot .stage").first.focus()
    page.keyboard.press("Enter")
    title = page.locator("#lightbox-name")
    assert title.inner_text() == order[0]
    page.keyboard.press("ArrowLeft")
    assert title.inner_text() == order[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == order[2]
    page.keyboard.down("Space")
    upper = page.locator("#lightbox img.b")
    assert upper.evaluate("each => getComputedStyle(each).visibility") == "hidden"
    page.keyboard.up("Space")
    assert upper.evaluate("each => getComputedStyle(each).visibility") == "visible"
    page.keyboard.press("Escape")
    assert not page.locator("#lightbox").is_visible()
    focused = page.evaluate("document.activeElement.closest('.shot').querySelector('h3').textContent")
    assert focused == order[2]


def test_the_lightbox_keeps_to_the_filtered_images(page: Page) -> None:
    page.select_option("#slice", "outdoors")
    page.locator(".shot:visible .stage").first.click()
    assert page.locator("#position").inner_text() == "1 of 3"
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.locator("#position").inner_text() == "3 of 3"


def test_zoom_shows_pixels_and_a_drag_pans(page: Page) -> None:
    page.set_viewport_size({"width": 700, "height": 320})
    page.locator(".shot .stage").first.click()
    stage = page.locator("#lightbox .stage")
    page.locator("[data-zoom='2']").click()
    small = stage.bounding_box()["width"]
    page.locator("[data-zoom='8']").click()
    assert stage.bounding_box()["width"] == pytest.approx(4 * small, abs=1)
    picture = page.locator("#lightbox img.b")
    assert picture.evaluate("each => getComputedStyle(each).imageRendering") == "pixelated"
    view = page.locator("#view")
    view.evaluate("each => { each.scrollTop = 0 }")
    box = view.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] - 5)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] + box["height"] - 17, steps=4)
    page.mouse.up()
    assert view.evaluate("each => each.scrollTop") == 12
    page.keyboard.press("-")
    assert stage.bounding_box()["width"] == pytest.approx(2 * small, abs=1)


def test_the_button_turns_dark_into_light_and_back(open_page: Any) -> None:
    page = open_page(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.locator("#theme").click()
    light = page.evaluate(paper)
    assert dark == "rgb(18, 19, 21)" and light == "rgb(250, 249, 247)"
    page.locator("#theme").click()
    assert page.evaluate(paper) == dark


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_never_scrolls_sideways(width: int, open_page: Any) -> None:
    page = open_page(width=width, height=844)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".shot .stage").first.click()
    assert page.locator("#lightbox .lightbox-bar").evaluate("each => each.scrollWidth") <= width


def test_a_hostile_name_is_text(page: Page) -> None:
    name = "<script>alert(\"1\")</script> & 'cat'.jpg"
    assert name in names(page)
    page.fill("#filter", "<script>")
    page.locator(".shot:visible .stage").first.click()
    assert page.locator("#lightbox-name").inner_text() == name


def test_without_scripts_the_page_still_shows_originals_beside_reconstructions(browser: Any, url: str) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(url)
    assert page.locator(".shot img.a").first.is_visible() and page.locator(".shot img.b").first.is_visible()
    assert not page.locator("#tools").is_visible()
    page.close()


def test_a_request_would_be_refused(browser: Any, url: str) -> None:
    """The check of requests above sees nothing because nothing is asked for; this one sees that the policy holds."""
    page = browser.new_page()
    page.goto(url)
    refused = page.evaluate(
        "fetch('https://example.invalid/').then(() => false, () => true)"
        ".then(failed => new Promise(done => { const i = new Image(); i.onerror = () => done(failed);"
        " i.onload = () => done(false); i.src = 'https://example.invalid/x.png'; }))"
    )
    assert refused is True
    page.close()
