
// Adds to every figure the download of its numbers (CSV, JSON) and of its picture (SVG, PNG).
(function downloads() {
  const source = document.getElementById("chart-data");
  if (!source || typeof DecompressionStream === "undefined") return;
  const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "opacity", "font-size", "font-weight", "font-family"];
  const MARGIN = 16, HEAD = 52, GAP = 24, SCALE = 2;
  const figures = Array.from(document.querySelectorAll("figure.chart"));
  let data = null;

  const load = async () => { data = data || await unpack(source.textContent); return data; };

  function fileName(index, ending) {
    const { dataset, metric, title } = data.figures[index];
    return [dataset, metric, title].filter(Boolean).join(".").replace(/[^A-Za-z0-9.-]+/g, "_").slice(0, 120) + "." + ending;
  }

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // A spreadsheet runs a text that begins with one of =+-@ as a formula; an apostrophe prevents that.
  function cell(value) {
    if (value === null) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r\n]/.test(value) ? "'" + value : value;
    return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  }

  function csv(figure) {
    const several = figure.panels.length > 1;
    const lines = figure.panels.flatMap((panel, index) => [
      ...(index === 0 || panel.columns.join() !== figure.panels[0].columns.join() ? [several ? ["panel", ...panel.columns] : panel.columns] : []),
      ...panel.rows.map((row) => (several ? [panel.title, ...row] : row)),
    ]);
    return lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
  }

  const NAMESPACE = "http://www.w3.org/2000/svg";
  function node(name, attributes, text) {
    const made = document.createElementNS(NAMESPACE, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Copies a drawing with the styles that the page's style sheet gives it, without the areas of tooltips.
  function copy(svg) {
    const clone = svg.cloneNode(true);
    const originals = svg.querySelectorAll("*"), copies = clone.querySelectorAll("*");
    originals.forEach((original, index) => {
      const computed = getComputedStyle(original);
      for (const name of STYLES) copies[index].setAttribute(name, computed.getPropertyValue(name));
      for (const name of ["class", "data-exit", "data-depth", "data-step"]) copies[index].removeAttribute(name);
    });
    const hits = svg.querySelectorAll(".hits");
    originals.forEach((original, index) => { if (Array.from(hits).includes(original)) copies[index].remove(); });
    clone.removeAttribute("class");
    return clone;
  }

  // Returns a figure as one SVG element in the colours of the light page: title, metric, legend, panels side by side.
  function picture(index) {
    const figure = figures[index], about = data.figures[index];
    for (const [name, colour] of Object.entries(data.colours)) figure.style.setProperty("--" + name, colour);
    figure.style.setProperty("--page", "#ffffff");
    const wide = figure.querySelectorAll(".on-wide svg");
    const drawings = Array.from(wide.length ? wide : figure.querySelectorAll("svg"));
    const sizes = drawings.map((svg) => svg.viewBox.baseVal);
    const keys = Array.from(figure.querySelectorAll(".legend > span"));
    const width = Math.max(2 * MARGIN + sizes.reduce((sum, size) => sum + size.width, GAP * (sizes.length - 1)), 420);
    const titles = about.panels.some((panel) => panel.title) ? 18 : 0;
    const foot = keys.length ? 30 : 0;
    const height = HEAD + titles + Math.max(...sizes.map((size) => size.height)) + foot + MARGIN;
    const whole = node("svg", { xmlns: NAMESPACE, viewBox: "0 0 " + width + " " + height, width, height, "font-family": "sans-serif" });
    whole.append(node("rect", { width, height, fill: "#ffffff" }));
    whole.append(node("text", { x: MARGIN, y: 24, "font-size": 15, "font-weight": 600, fill: data.colours.ink }, about.title));
    whole.append(node("text", { x: MARGIN, y: 41, "font-size": 11.5, fill: data.colours.muted }, [about.metric, about.dataset].filter(Boolean).join(", ")));
    let left = MARGIN;
    drawings.forEach((svg, panel) => {
      if (titles) whole.append(node("text", { x: left, y: HEAD + 8, "font-size": 12.5, fill: data.colours.ink }, about.panels[panel].title));
      const clone = copy(svg);
      for (const [name, value] of Object.entries({ x: left, y: HEAD + titles, width: sizes[panel].width, height: sizes[panel].height })) clone.setAttribute(name, value);
      whole.append(clone);
      left += sizes[panel].width + GAP;
    });
    let start = MARGIN;
    for (const key of keys) {
      const style = getComputedStyle(key), tone = style.getPropertyValue("--tone") || style.color, y = height - MARGIN;
      whole.append(node("rect", { x: start, y: y - 9, width: 12, height: 9, fill: tone.trim() }));
      const words = key.classList.contains("ramp") ? key.parentElement.textContent.trim().replace(/\s+/g, " to ") : key.textContent;
      whole.append(node("text", { x: start + 18, y, "font-size": 12, fill: data.colours.ink }, words));
      start += 36 + 7 * words.length;
    }
    figure.removeAttribute("style");
    return whole;
  }

  const svgText = (index) => new XMLSerializer().serializeToString(picture(index));

  async function pngBlob(index) {
    const whole = picture(index), image = new Image();
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(whole));
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = SCALE * whole.getAttribute("width");
    canvas.height = SCALE * whole.getAttribute("height");
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  const FORMATS = {
    csv: async (index) => new Blob([csv(data.figures[index])], { type: "text/csv" }),
    json: async (index) => new Blob([JSON.stringify(data.figures[index], null, 1)], { type: "application/json" }),
    svg: async (index) => new Blob([svgText(index)], { type: "image/svg+xml" }),
    png: pngBlob,
  };

  figures.forEach((figure, index) => {
    const box = document.createElement("details");
    box.className = "get";
    const summary = box.appendChild(document.createElement("summary"));
    summary.textContent = "\u2913";
    summary.setAttribute("aria-label", "Download " + figure.querySelector("figcaption b").textContent);
    summary.title = "Download";
    for (const [ending, make] of Object.entries(FORMATS)) {
      const button = box.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = ending.toUpperCase();
      button.addEventListener("click", async () => {
        await load();
        save(await make(index), fileName(index, ending));
      });
    }
    figure.querySelector("figcaption").append(box);
  });
})();

