"use strict";
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Light or dark: the system's choice until the button is pressed.
  const theme = one("#theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  });

  const gallery = one("#gallery");
  if (!gallery) return;
  const data = JSON.parse(one("#gallery-data").textContent);
  const metrics = new Map(data.metrics.map((metric) => [metric.name, metric]));
  const shots = all(".shot");
  const [show, compare, sort, order, filter] = ["#show", "#compare", "#sort", "#order", "#filter"].map((id) => one(id));
  const slice = one("#slice"); // absent without slices
  let visible = shots;

  const goodness = (metric, value) =>
    metric.better === "target" ? -Math.abs(value - metric.target) : metric.better === "higher" ? value : -value;
  const valueOf = (index, vae, name) => {
    const value = data.images[index].values[vae]?.[name];
    return value === undefined ? null : value;
  };

  // How good an image is by the chosen key; null where it has no number.
  const score = (index) => {
    const [kind, name] = sort.value.split(":");
    const ours = valueOf(index, show.value, name);
    if (ours === null) return null;
    const metric = metrics.get(name);
    if (kind === "value") return goodness(metric, ours);
    const theirs = valueOf(index, data.reference, name);
    return theirs === null ? null : goodness(metric, ours) - goodness(metric, theirs);
  };

  const arrange = () => {
    const byNumber = sort.value.includes(":");
    order.disabled = !byNumber;
    const rows = shots.map((shot) => ({ shot, index: Number(shot.dataset.index) }));
    if (byNumber) {
      const turn = order.value === "worst" ? 1 : -1;
      for (const row of rows) row.score = score(row.index);
      rows.sort((a, b) => {
        if (a.score === null || b.score === null) return (a.score === null) - (b.score === null) || a.index - b.index;
        return turn * (a.score - b.score) || a.index - b.index;
      });
    } else if (sort.value === "name") {
      const key = (row) => data.images[row.index].key;
      rows.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
    }
    one("#shots").append(...rows.map((row) => row.shot));
    const wanted = filter.value.trim().toLowerCase();
    for (const { shot, index } of rows) {
      const image = data.images[index];
      const named = image.key.toLowerCase().includes(wanted);
      shot.hidden = !named || Boolean(slice?.value && image.slice !== slice.value);
    }
    visible = rows.map((row) => row.shot).filter((shot) => !shot.hidden);
    one("#tally").textContent = `${visible.length} of ${shots.length} images`;
    one("#empty").hidden = visible.length > 0;
    const name = sort.value.split(":")[1];
    for (const row of all(".numbers tr[data-metric]", gallery)) row.classList.toggle("sorted", row.dataset.metric === name);
  };

  const nameOf = (vae) => vae || "original";
  const choosePictures = (root) => {
    for (const picture of all("img", root)) {
      picture.classList.toggle("a", picture.dataset.of === compare.value);
      picture.classList.toggle("b", picture.dataset.of === show.value);
    }
  };
  const setLabels = (root) => {
    for (const label of all(".label.left", root)) label.textContent = nameOf(compare.value);
    for (const label of all(".label.right", root)) label.textContent = nameOf(show.value);
  };
  const choose = () => {
    if (compare.value === show.value) compare.value = "";
    for (const option of compare.options) option.disabled = option.value !== "" && option.value === show.value;
    choosePictures(one("#shots"));
    setLabels(gallery);
    for (const cell of all(".numbers [data-of]", gallery)) cell.classList.toggle("shown", cell.dataset.of === show.value);
  };

  // The best number of each row of a card.
  for (const row of all(".numbers tr[data-metric]", gallery)) {
    const index = Number(row.closest(".shot").dataset.index);
    const metric = metrics.get(row.dataset.metric);
    const scores = data.vaes.map((vae) => valueOf(index, vae, metric.name)).map((value) => (value === null ? -Infinity : goodness(metric, value)));
    const top = Math.max(...scores);
    if (new Set(scores).size > 1) all("td", row).forEach((cell, place) => cell.classList.toggle("top", scores[place] === top));
  }

  const box = one("#lightbox");
  const setMode = (mode) => {
    for (const root of [gallery, box]) {
      root.dataset.mode = mode;
      for (const button of all(".modes button", root)) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    }
    if (box.open) layOut();
  };
  const setGain = (value) => {
    for (const range of all(".gain-range")) range.value = value;
    for (const output of all(".gain-value")) output.textContent = `${value}×`;
    document.documentElement.style.setProperty("--gain", value);
  };

  const wipe = (stage, range, percent) => {
    const place = Math.min(100, Math.max(0, percent));
    stage.style.setProperty("--at", `${place}%`);
    range.value = place;
  };
  const wipeTo = (stage, range, clientX) => {
    const edges = one(".pictures", stage).getBoundingClientRect();
    wipe(stage, range, (100 * (clientX - edges.left)) / edges.width);
  };

  // Cards: a drag moves the boundary, a click without one opens the picture.
  for (const shot of shots) {
    const stage = one(".stage", shot);
    const range = one(".wipe", shot);
    let from = null;
    let dragged = false;
    range.addEventListener("input", () => wipe(stage, range, Number(range.value)));
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      from = event.clientX;
      dragged = false;
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => {
      if (from === null) return;
      dragged ||= Math.abs(event.clientX - from) > 4;
      if (dragged && gallery.dataset.mode === "slider") wipeTo(stage, range, event.clientX);
    });
    stage.addEventListener("pointerup", () => { from = null; });
    stage.addEventListener("pointercancel", () => { from = null; });
    stage.addEventListener("click", () => { if (!dragged) open(shot); });
    stage.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open(shot);
    });
    const more = one(".all", shot);
    if (more) {
      const text = more.textContent;
      more.hidden = false;
      more.addEventListener("click", () => {
        const full = shot.classList.toggle("full");
        more.setAttribute("aria-expanded", String(full));
        more.textContent = full ? "Fewer numbers" : text;
      });
    }
  }

  // The lightbox: a modal dialog, so that the browser keeps the focus inside and gives it back.
  const view = one("#view");
  const bigStage = one(".stage", view);
  const bigRange = one("#lightbox-wipe");
  const ZOOMS = ["fit", "1", "2", "4", "8"];
  let zoom = "auto"; // until one is chosen: the largest whole factor that fits
  let current = null;

  const layOut = () => {
    const width = Number(bigStage.style.getPropertyValue("--w"));
    const height = Number(bigStage.style.getPropertyValue("--h"));
    const across = box.dataset.mode === "side" ? 2 : 1;
    const room = Math.min(view.clientWidth / (width * across), view.clientHeight / height);
    const whole = [8, 4, 2, 1].find((factor) => factor <= room);
    const named = zoom === "auto" ? String(whole || "fit") : zoom;
    const factor = named === "fit" ? room : Number(named);
    bigStage.style.width = `${Math.floor(width * across * factor)}px`;
    one(".pictures", bigStage).style.height = `${Math.floor(height * factor)}px`;
    view.classList.toggle("pixels", factor > 1);
    view.classList.toggle("pannable", view.scrollWidth > view.clientWidth || view.scrollHeight > view.clientHeight);
    for (const button of all("[data-zoom]", box)) button.setAttribute("aria-pressed", String(button.dataset.zoom === named));
    return named;
  };
  const setZoom = (chosen) => {
    const x = (view.scrollLeft + view.clientWidth / 2) / view.scrollWidth;
    const y = (view.scrollTop + view.clientHeight / 2) / view.scrollHeight;
    zoom = chosen;
    layOut();
    view.scrollLeft = x * view.scrollWidth - view.clientWidth / 2;
    view.scrollTop = y * view.scrollHeight - view.clientHeight / 2;
  };
  const stepZoom = (by) => {
    const place = ZOOMS.indexOf(layOut()) + by;
    if (ZOOMS[place]) setZoom(ZOOMS[place]);
  };
  const fill = (shot) => {
    current = shot;
    const small = one(".stage", shot);
    for (const name of ["--w", "--h"]) bigStage.style.setProperty(name, small.style.getPropertyValue(name));
    one(".pictures", bigStage).replaceChildren(...all("img", small).map((picture) => picture.cloneNode()));
    choosePictures(bigStage);
    setLabels(box);
    one("#lightbox-name").textContent = data.images[Number(shot.dataset.index)].key;
    one("#position").textContent = `${visible.indexOf(shot) + 1} of ${visible.length}`;
    one("#lightbox-numbers").replaceChildren(...all(".numbers", shot).map((table) => table.cloneNode(true)));
    wipe(bigStage, bigRange, Number(one(".wipe", shot).value));
    layOut();
  };
  const open = (shot) => {
    box.showModal();
    fill(shot);
    view.focus();
  };
  const step = (by) => {
    const place = visible.indexOf(current) + by;
    if (visible[place]) fill(visible[place]);
  };
  const flip = (on) => bigStage.classList.toggle("flip", on);

  one("#previous").addEventListener("click", () => step(-1));
  one("#next").addEventListener("click", () => step(1));
  one("#close").addEventListener("click", () => box.close());
  box.addEventListener("close", () => {
    flip(false);
    one(".stage", current).focus(); // the image that was looked at last
  });
  box.addEventListener("keydown", (event) => {
    const onRange = event.target.type === "range";
    const onButton = event.target instanceof HTMLButtonElement;
    if (event.key === "ArrowLeft" && !onRange) step(-1);
    else if (event.key === "ArrowRight" && !onRange) step(1);
    else if (event.key === "+" || event.key === "=") stepZoom(1);
    else if (event.key === "-") stepZoom(-1);
    else if (event.key === " " && !onButton) flip(true);
    else return;
    event.preventDefault();
  });
  box.addEventListener("keyup", (event) => { if (event.key === " ") flip(false); });
  for (const button of all("[data-zoom]", box)) button.addEventListener("click", () => setZoom(button.dataset.zoom));
  bigRange.addEventListener("input", () => wipe(bigStage, bigRange, Number(bigRange.value)));

  // In the lightbox a drag pans where the picture is larger than the view; on the handle, or elsewhere, it wipes.
  let drag = null;
  view.addEventListener("pointerdown", (event) => {
    const onHandle = event.target.classList.contains("handle");
    if (event.button !== 0 || (event.pointerType === "touch" && !onHandle)) return; // touch scrolls by itself
    const pans = view.classList.contains("pannable") && !onHandle;
    if (!pans && box.dataset.mode !== "slider") return;
    drag = { pans, x: event.clientX, y: event.clientY, left: view.scrollLeft, top: view.scrollTop };
    view.setPointerCapture(event.pointerId);
    view.classList.toggle("panning", pans);
    if (!pans) wipeTo(bigStage, bigRange, event.clientX);
  });
  view.addEventListener("pointermove", (event) => {
    if (!drag) return;
    if (!drag.pans) return wipeTo(bigStage, bigRange, event.clientX);
    view.scrollLeft = drag.left - (event.clientX - drag.x);
    view.scrollTop = drag.top - (event.clientY - drag.y);
  });
  const drop = () => {
    drag = null;
    view.classList.remove("panning");
  };
  view.addEventListener("pointerup", drop);
  view.addEventListener("pointercancel", drop);
  addEventListener("resize", () => { if (box.open) layOut(); });

  for (const root of [gallery, box]) {
    for (const button of all(".modes button", root)) button.addEventListener("click", () => setMode(button.dataset.mode));
  }
  show.addEventListener("change", () => { choose(); arrange(); });
  compare.addEventListener("change", choose);
  for (const range of all(".gain-range")) range.addEventListener("input", () => setGain(range.value));
  for (const control of [sort, order, slice]) control?.addEventListener("change", arrange);
  filter.addEventListener("input", arrange);
  one("#tools").addEventListener("submit", (event) => event.preventDefault());
  one("#tools").hidden = false;
  setGain(4);
  setMode("slider");
  choose();
  arrange();
})();
