"use strict";
// Adds to a page that reads without it: here tooltips of charts; in downloads.js their files; in transcripts.js the rows.

// Returns the JSON value of a gzip stream in base64 (icet_jax.report.packing).
async function unpack(text) {
  const binary = atob(text.trim()), bytes = new Uint8Array(binary.length);
  for (let index = 0; index < bytes.length; index++) bytes[index] = binary.charCodeAt(index);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

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
