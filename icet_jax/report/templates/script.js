"use strict";
// Adds to a page that reads without it: tooltips on charts, and the transcripts' prompt and exit selectors.
// Model output only ever becomes text (textContent), never markup.

(function tooltips() {
  const tip = document.getElementById("tip");
  const columns = Array.from(document.querySelectorAll(".hits rect, .cells rect"));
  for (const column of columns) {
    const title = column.querySelector("title");
    column.tipText = title.textContent;
    title.remove();
  }
  function samePlace(column) {
    const axis = ["exit", "depth"].find((name) => column.dataset[name] !== undefined);
    return axis === undefined ? [column] : columns.filter((other) => other.dataset[axis] === column.dataset[axis]);
  }
  function show(event) {
    const column = event.target;
    if (column.tipText === undefined) return;
    tip.textContent = column.tipText;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above < 8 ? event.clientY + 16 : above) + "px";
  }
  function hide() {
    tip.hidden = true;
    columns.forEach((column) => column.classList.remove("on"));
  }
  for (const svg of document.querySelectorAll("figure svg")) {
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerover", (event) => {
      columns.forEach((column) => column.classList.remove("on"));
      if (event.target.tipText !== undefined) samePlace(event.target).forEach((column) => column.classList.add("on"));
    });
    svg.addEventListener("pointerleave", hide);
  }
  window.addEventListener("scroll", hide, { passive: true });
})();

(function transcripts() {
  const source = document.getElementById("transcript-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const byId = (id) => document.getElementById(id);
  const slider = byId("exit");
  const picker = byId("prompt");
  const strip = byId("strip");
  const cells = { before: [], after: [] };
  const labels = [];

  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function exitName(exit) {
    const mark = exit === data.default ? " (default)" : data.planted.includes(exit) ? " (planted)" : "";
    return exit + " of " + data.exits + mark;
  }

  function state(response) {
    if (!response) return "";
    if (response.unsafe) return "unsafe";
    const names = Object.keys(response.scores);
    if (names.some((name) => name.startsWith("refusal/") && response.scores[name] >= 0.5)) return "refused";
    return names.some((name) => /^(asr|refusal)\//.test(name)) ? "safe" : "";
  }

  function scoreText(name, value) {
    if (name.startsWith("asr/")) return value >= 0.5 ? "unsafe" : "safe";
    if (/^refusal(_unsafe)?\//.test(name)) return value >= 0.5 ? "refused" : "answered";
    if (name.startsWith("accuracy/") && (value === 0 || value === 1)) return value ? "right" : "wrong";
    if (/^(degenerate|empty|truncated)/.test(name)) return "yes";
    return String(Math.round(value * 100) / 100).replace("-", "\u2212");
  }

  function buildPicker() {
    const groups = new Map();
    data.prompts.forEach((prompt, index) => {
      if (!groups.has(prompt.dataset)) {
        const group = element("optgroup");
        group.label = prompt.dataset;
        groups.set(prompt.dataset, picker.appendChild(group));
      }
      const option = element("option", "", prompt.prompt.slice(0, 120) || prompt.id);
      option.value = index;
      groups.get(prompt.dataset).append(option);
    });
  }

  function buildStrip() {
    strip.style.gridTemplateColumns = "repeat(" + data.exits + ", 1fr)";
    // The slider's ends stand over the middles of the first and last column.
    slider.style.width = "calc(" + (100 * (data.exits - 1)) / data.exits + "% + 16px)";
    for (const side of ["before", "after"]) {
      for (let exit = 1; exit <= data.exits; exit++) {
        const cell = strip.appendChild(element("i"));
        cell.title = side + ", exit " + exit;
        cell.addEventListener("click", () => select(exit));
        cells[side].push(cell);
      }
    }
    for (let exit = 1; exit <= data.exits; exit++) {
      const label = strip.appendChild(element("b", "", exit));
      if (exit === data.default) label.append(element("small", "", "default"));
      else if (data.planted.includes(exit)) label.append(element("small", "", "planted"));
      labels.push(label);
    }
    const key = strip.appendChild(element("span", "key", "Upper row before, lower row after:"));
    for (const [name, text] of [["safe", "safe"], ["unsafe", "judged unsafe"], ["refused", "refused (benign)"]]) {
      const item = element("span", "", text);
      item.prepend(element("i", name));
      key.append(item);
    }
  }

  function render() {
    const prompt = data.prompts[Number(picker.value)];
    const exit = Number(slider.value);
    byId("request").textContent = prompt.prompt;
    byId("answer").textContent = prompt.answer === null ? "" : "Right answer: " + prompt.answer;
    byId("category").textContent = prompt.category === null ? "" : "Category: " + prompt.category;
    byId("format").textContent = prompt.format === null ? "" : "Attack format: " + prompt.format;
    byId("picture").hidden = !prompt.image;
    if (prompt.image) byId("picture").src = prompt.image;
    byId("exit-name").textContent = exitName(exit);
    slider.setAttribute("aria-valuetext", "exit " + exitName(exit));
    for (const side of ["before", "after"]) {
      const response = prompt[side][exit];
      const text = document.querySelector('[data-side="' + side + '"]');
      text.textContent = response ? response.text || "[empty response]" : "Not recorded.";
      text.className = "response" + (!response ? " absent" : response.redacted ? " redacted" : "");
      const scores = document.querySelector('[data-scores="' + side + '"]');
      scores.replaceChildren();
      for (const [name, value] of Object.entries(response ? response.scores : {})) {
        const item = element("span");
        item.append(element("code", "", name), " ", element("b", "", scoreText(name, value)));
        if (response.labels[name]) item.append(" (" + response.labels[name] + ")");
        scores.append(item);
      }
      cells[side].forEach((cell, index) => {
        cell.className = state(prompt[side][index + 1]) + (index + 1 === exit ? " on" : "");
      });
    }
    labels.forEach((label, index) => label.classList.toggle("on", index + 1 === exit));
  }

  function select(exit) {
    slider.value = exit;
    render();
    remember();
  }

  function step(by) {
    const count = data.prompts.length;
    picker.value = (Number(picker.value) + by + count) % count;
    render();
    remember();
  }

  function remember() {
    history.replaceState(null, "", "#exit=" + slider.value + "&prompt=" + picker.value);
  }

  function recall() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (!wanted.has("exit")) return;
    slider.value = Number(wanted.get("exit")) || slider.value;
    const prompt = Number(wanted.get("prompt"));
    if (Number.isInteger(prompt) && prompt >= 0 && prompt < data.prompts.length) picker.value = prompt;
    render();
  }

  // Small drawings are enlarged as they are; photographs are smoothed.
  byId("picture").addEventListener("load", (event) => {
    event.target.classList.toggle("small", event.target.naturalWidth <= 96);
  });
  buildPicker();
  buildStrip();
  picker.value = 0;
  render();
  recall();
  slider.addEventListener("input", () => { render(); remember(); });
  picker.addEventListener("change", () => { render(); remember(); });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  window.addEventListener("hashchange", recall);
})();
