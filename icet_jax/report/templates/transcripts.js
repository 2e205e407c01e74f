// Shows the transcripts: a searchable list of rows, and the responses to the selected row at the selected exit.
// Model output only ever becomes text (textContent), never markup.

(async function transcripts() {
  const source = document.getElementById("transcript-data");
  if (!source) return;
  const byId = (id) => document.getElementById(id);
  const viewer = byId("viewer"), found = byId("found"), list = byId("rows"), slider = byId("exit"), strip = byId("strip");
  const LINE = 32, REDACTED = 1, SPLIT = 2, MOST_WORDS = 1000;
  const VERDICTS = { none: "no verdict", unsafe: "judged unsafe" };
  const PHASES = { before: "Before", after: "After" };

  if (typeof DecompressionStream === "undefined") {
    found.textContent = "This browser is too old to unpack the transcripts (it has no DecompressionStream).";
    return;
  }
  const data = await unpack(source.textContent);
  source.remove();
  const rows = data.rows;
  const exits = Array.from({ length: data.exits }, (_, index) => index + 1);
  const filters = Object.fromEntries(Array.from(document.querySelectorAll("[id^=only-]"), (select) => [select.id.slice(5), select]));
  // The two responses side by side: before and after; of a run without training, this exit and the default exit.
  const cards = data.phases.length === 2 ? data.phases.map((phase) => ({ phase })) : [{ phase: data.phases[0] }, { phase: data.phases[0], exit: data.default }];
  const state = { row: data.start.row, exit: data.start.exit, shown: [], query: "", hits: null };
  let lowerTexts = null;

  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // Returns the response of a row, or null: { text, verdict, redacted, split, scores, labels }.
  function response(row, phase, exit) {
    const packed = row[phase][exit - 1];
    if (!packed) return null;
    const [text, verdict, bits, scores, labels] = packed;
    return { text: data.texts[text], verdict: data.verdicts[verdict], redacted: bits & REDACTED, split: bits & SPLIT, scores, labels: labels || {} };
  }

  const verdictAt = (row, phase, exit) => {
    const packed = row[phase] && row[phase][exit - 1];
    return packed ? data.verdicts[packed[1]] : "none";
  };
  const differ = (a, b) => a !== "none" && b !== "none" && a !== b;

  // ---- Search and filters.

  const DIFFERENCES = {
    training: ["before and after differ", (row, exit) => differ(verdictAt(row, "before", exit), verdictAt(row, "after", exit))],
    exits: ["the exit differs from the default exit", (row, exit) => data.phases.some((phase) => differ(verdictAt(row, phase, exit), verdictAt(row, phase, data.default)))],
    judges: ["judges disagree", (row, exit) => data.phases.some((phase) => row[phase][exit - 1] && row[phase][exit - 1][2] & SPLIT)],
  };

  function matchesAt(row, exit, isNamed) {
    for (const phase of data.phases) {
      const wanted = filters[phase].value;
      if (wanted && !(row[phase][exit - 1] && verdictAt(row, phase, exit) === wanted)) return false;
    }
    if (filters.differ.value && !DIFFERENCES[filters.differ.value][1](row, exit)) return false;
    return isNamed || data.phases.some((phase) => row[phase][exit - 1] && state.hits[row[phase][exit - 1][0]]);
  }

  // Returns the exit at which a row matches all filters: the selected one, else the first; 0 if there is none.
  function matchingExit(row) {
    for (const [name, values] of [["dataset", "datasets"], ["category", "categories"], ["format", "formats"]]) {
      if (filters[name].value && data[values][row[name]] !== filters[name].value) return 0;
    }
    const isNamed = !state.query || [row.prompt, row.id, row.answer || ""].some((text) => text.toLowerCase().includes(state.query));
    const only = Number(filters.exit.value);
    const candidates = only ? [only] : [state.exit, ...exits];
    return candidates.find((exit) => matchesAt(row, exit, isNamed)) || 0;
  }

  function applyFilters() {
    state.query = byId("search").value.trim().toLowerCase();
    if (state.query) {
      lowerTexts = lowerTexts || data.texts.map((text) => text.toLowerCase());
      state.hits = lowerTexts.map((text) => text.includes(state.query));
    }
    if (filters.exit.value) state.exit = Number(filters.exit.value);
    state.shown = rows.map((_, index) => index).filter((index) => matchingExit(rows[index]));
    const count = state.shown.length;
    found.textContent = count === rows.length ? count + " rows" : count ? count + " of " + rows.length + " rows" : "No row matches.";
    byId("clear").hidden = !state.query && Object.values(filters).every((select) => !select.value);
    list.firstElementChild.style.height = count * LINE + "px";
    if (count) select(state.shown.includes(state.row) ? state.row : state.shown[0]);
    else renderList();
  }

  function fillFilter(name, options) {
    const select = filters[name];
    select.append(element("option", "", "any"));
    select.firstElementChild.value = "";
    for (const [value, text] of options) select.append(Object.assign(element("option", "", text), { value }));
    select.parentElement.hidden = options.length < 2;
    select.addEventListener("change", applyFilters);
  }

  function buildFilters() {
    const own = (values) => values.map((value) => [value, value]);
    fillFilter("dataset", own(data.datasets));
    fillFilter("category", own(data.categories.slice().sort()));
    fillFilter("format", own(data.formats.slice().sort()));
    for (const phase of ["before", "after"]) {
      const seen = new Set(rows.flatMap((row) => (row[phase] || []).map((packed) => packed && data.verdicts[packed[1]])));
      fillFilter(phase, data.verdicts.filter((verdict) => seen.has(verdict)).map((verdict) => [verdict, VERDICTS[verdict] || verdict]));
    }
    fillFilter("exit", exits.map((exit) => [String(exit), exitName(exit)]));
    const offered = Object.entries(DIFFERENCES).filter(([name, [, test]]) =>
      (name !== "training" || data.phases.length === 2) && rows.some((row) => exits.some((exit) => test(row, exit))));
    fillFilter("differ", offered.map(([name, [text]]) => [name, text]));
    filters.differ.parentElement.hidden = !offered.length;
    let timer = 0;
    byId("search").addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(applyFilters, 120);
    });
    byId("clear").addEventListener("click", () => {
      byId("search").value = "";
      Object.values(filters).forEach((select) => { select.value = ""; });
      applyFilters();
    });
  }

  // ---- The list of rows. Only those in view are elements, so that thousands of rows stay fast.

  function renderList() {
    const first = Math.max(0, Math.floor(list.scrollTop / LINE) - 4);
    const last = Math.min(state.shown.length, first + Math.ceil(list.clientHeight / LINE) + 8);
    const lines = [];
    for (let position = first; position < last; position++) {
      const index = state.shown[position], row = rows[index];
      const line = element("div", "row");
      line.id = "row-" + index;
      line.style.top = position * LINE + "px";
      line.setAttribute("role", "option");
      line.setAttribute("aria-selected", String(index === state.row));
      line.setAttribute("aria-posinset", String(position + 1));
      line.setAttribute("aria-setsize", String(state.shown.length));
      for (const card of cards) line.append(element("i", verdictAt(row, card.phase, card.exit || state.exit)));
      line.append(element("span", "", row.prompt.slice(0, 200) || row.id));
      if (data.datasets.length > 1) line.append(element("small", "", data.datasets[row.dataset]));
      lines.push(line);
    }
    list.firstElementChild.replaceChildren(...lines);
    if (document.getElementById("row-" + state.row)) list.setAttribute("aria-activedescendant", "row-" + state.row);
    else list.removeAttribute("aria-activedescendant");
  }

  function scrollToRow() {
    const top = state.shown.indexOf(state.row) * LINE;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + LINE > list.scrollTop + list.clientHeight) list.scrollTop = top + LINE - list.clientHeight;
  }

  // ---- The selected row.

  function exitName(exit) {
    const mark = exit === data.default ? " (default)" : data.planted.includes(exit) ? " (planted)" : "";
    return exit + " of " + data.exits + mark;
  }

  function scoreText(name, value) {
    if (name.startsWith("asr/")) return value >= 0.5 ? "unsafe" : "safe";
    if (/^refusal(_unsafe)?\//.test(name)) return value >= 0.5 ? "refused" : "answered";
    if (name.startsWith("accuracy/") && (value === 0 || value === 1)) return value ? "right" : "wrong";
    if (/^(degenerate|empty|truncated)/.test(name)) return "yes";
    return String(Math.round(value * 100) / 100).replace("-", "\u2212");
  }

  function buildStrip() {
    strip.style.gridTemplateColumns = "repeat(" + data.exits + ", 1fr)";
    // The slider's ends stand over the middles of the first and last column.
    slider.style.width = "calc(" + (100 * (data.exits - 1)) / data.exits + "% + 16px)";
    for (const phase of data.phases) {
      for (const exit of exits) {
        const cell = strip.appendChild(element("i"));
        cell.title = phase + ", exit " + exit;
        cell.addEventListener("click", () => selectExit(exit));
      }
    }
    for (const exit of exits) {
      const label = strip.appendChild(element("b", "", exit));
      if (exit === data.default) label.append(element("small", "", "default"));
      else if (data.planted.includes(exit)) label.append(element("small", "", "planted"));
    }
    const key = strip.appendChild(element("span", "key", data.phases.length === 2 ? "Upper row before, lower row after:" : PHASES[data.phases[0]] + " training:"));
    const seen = new Set(rows.flatMap((row) => data.phases.flatMap((phase) => row[phase].map((packed) => packed && packed[1]))));
    data.verdicts.forEach((verdict, index) => {
      if (!seen.has(index) || verdict === "none") return;
      const item = element("span", "", VERDICTS[verdict] || verdict);
      item.prepend(element("i", verdict));
      key.append(item);
    });
  }

  function renderScores(box, shown) {
    box.replaceChildren();
    data.metrics.forEach((name, index) => {
      const value = shown ? shown.scores[index] : null;
      if (value === null) return;
      const item = element("span");
      item.append(element("code", "", name), " ", element("b", "", scoreText(name, value)));
      if (shown.labels[name]) item.append(" (" + shown.labels[name] + ")");
      box.append(item);
    });
  }

  function renderCard(index, shown, pieces) {
    const box = document.querySelector('[data-card="' + index + '"]'), verdict = box.previousElementSibling.querySelector(".verdict");
    if (pieces) box.replaceChildren(...pieces);
    else box.textContent = shown ? shown.text || "[empty response]" : "Not recorded.";
    box.className = "response" + (!shown ? " absent" : shown.redacted ? " redacted" : "");
    verdict.className = "verdict " + (shown ? shown.verdict : "none");
    verdict.textContent = shown ? (VERDICTS[shown.verdict] || shown.verdict) + (shown.split ? ", judges disagree" : "") : "";
    renderScores(box.nextElementSibling, shown);
  }

  // Returns for two lists of words which words of each are in their longest common subsequence.
  function common(a, b) {
    const width = b.length + 1, lengths = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        lengths[i * width + j] = a[i] === b[j] ? lengths[(i + 1) * width + j + 1] + 1 : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
      }
    }
    const inA = new Array(a.length).fill(false), inB = new Array(b.length).fill(false);
    for (let i = 0, j = 0; i < a.length && j < b.length; ) {
      if (a[i] === b[j]) inA[i++] = inB[j++] = true;
      else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++;
      else j++;
    }
    return [inA, inB];
  }

  // Returns a text as nodes in which runs of words that the other text does not have are marked.
  function marked(words, isCommon) {
    const nodes = [];
    for (let start = 0; start < words.length; ) {
      let end = start + 1;
      while (end < words.length && isCommon[end] === isCommon[start]) end++;
      const text = words.slice(start, end).join("");
      nodes.push(isCommon[start] ? document.createTextNode(text) : element("mark", "", text));
      start = end;
    }
    return nodes;
  }

  function renderCards(row) {
    const shown = cards.map((card) => response(row, card.phase, card.exit || (card.exit === null ? 0 : state.exit)));
    const [a, b] = shown.map((each) => (each && !each.redacted && each.text ? each.text.match(/\s*\S+\s*$|\s*\S+/g) || [] : null));
    const note = byId("same");
    note.textContent = "";
    let pieces = [null, null];
    if (a && b && shown[0].text === shown[1].text) note.textContent = "Both responses are the same, word for word.";
    else if (a && b && a.length <= MOST_WORDS && b.length <= MOST_WORDS) {
      const kept = common(a.map((word) => word.trim()), b.map((word) => word.trim()));
      if (kept[0].includes(true)) pieces = [marked(a, kept[0]), marked(b, kept[1])];
      else note.textContent = "The responses have no word in common.";
    }
    shown.forEach((each, index) => renderCard(index, each, pieces[index]));
  }

  function render() {
    const row = rows[state.row];
    byId("request").textContent = row.prompt;
    byId("answer").textContent = row.answer === null ? "" : "Right answer: " + row.answer;
    const about = [["Row", row.id], ["Category", data.categories[row.category]], ["Attack format", data.formats[row.format]]];
    byId("about").textContent = about.filter(([, text]) => text !== undefined).map(([name, text]) => name + ": " + text).join(" \u00b7 ");
    byId("picture").hidden = row.picture === null;
    if (row.picture !== null) byId("picture").src = data.pictures[row.picture];
    slider.value = state.exit;
    byId("exit-name").textContent = exitName(state.exit);
    slider.setAttribute("aria-valuetext", "exit " + exitName(state.exit));
    renderCards(row);
    const cells = strip.querySelectorAll(":scope > i"), labels = strip.querySelectorAll(":scope > b");
    data.phases.forEach((phase, line) => exits.forEach((exit, column) => {
      cells[line * data.exits + column].className = verdictAt(row, phase, exit) + (exit === state.exit ? " on" : "");
    }));
    labels.forEach((label, index) => label.classList.toggle("on", index + 1 === state.exit));
    renderList();
  }

  function select(index) {
    state.row = index;
    state.exit = matchingExit(rows[index]) || state.exit;
    scrollToRow();
    render();
  }

  function selectExit(exit) {
    state.exit = Math.min(Math.max(exit, 1), data.exits);
    render();
    remember();
  }

  function move(by) {
    if (!state.shown.length) return;
    const position = state.shown.indexOf(state.row) + by;
    select(state.shown[Math.min(Math.max(position, 0), state.shown.length - 1)]);
    remember();
  }

  function remember() {
    history.replaceState(null, "", "#exit=" + state.exit + "&prompt=" + state.row);
  }

  function recall() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (!wanted.has("exit")) return;
    const exit = Number(wanted.get("exit")), row = Number(wanted.get("prompt"));
    if (Number.isInteger(exit) && exit >= 1 && exit <= data.exits) state.exit = exit;
    if (Number.isInteger(row) && row >= 0 && row < rows.length) state.row = row;
    scrollToRow();
    render();
  }

  const KEYS = {
    ArrowDown: () => move(1), j: () => move(1), ArrowUp: () => move(-1), k: () => move(-1),
    ArrowLeft: () => selectExit(state.exit - 1), ArrowRight: () => selectExit(state.exit + 1),
    PageDown: () => move(8), PageUp: () => move(-8), Home: () => move(-rows.length), End: () => move(rows.length),
  };
  viewer.addEventListener("keydown", (event) => {
    const isField = event.target.matches("select, input[type=search]");
    const isLetter = event.key === "j" || event.key === "k";
    if (isField || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    if (event.target !== list && event.target !== viewer && !isLetter) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  // Small drawings are enlarged as they are; photographs are smoothed.
  byId("picture").addEventListener("load", (event) => {
    event.target.classList.toggle("small", event.target.naturalWidth <= 96);
  });
  list.addEventListener("scroll", renderList, { passive: true });
  list.addEventListener("click", (event) => {
    const line = event.target.closest(".row");
    if (!line) return;
    select(Number(line.id.slice(4)));
    remember();
  });
  slider.addEventListener("input", () => selectExit(Number(slider.value)));
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  window.addEventListener("hashchange", recall);
  window.addEventListener("resize", renderList);
  buildFilters();
  buildStrip();
  applyFilters();
  recall();
  viewer.removeAttribute("aria-busy");
})();
