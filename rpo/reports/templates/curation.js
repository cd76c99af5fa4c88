"use strict";
(() => {
  const { words, severities, amplification, records } = JSON.parse(document.getElementById("data").textContent);
  const form = document.querySelector("form.filters");
  if (!form) return;
  const list = document.querySelector(".index ul");
  const index = document.querySelector(".index");
  const leaf = document.getElementById("leaf");
  const said = document.getElementById("said");
  const output = form.querySelector("output");
  const LOT = 40;
  let visible = records;
  let place = 0;
  let showsDifference = true;

  // Elements are only ever made here, and texts only ever set as text: nothing of a record becomes HTML.
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== "") made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== ""));
    return made;
  }

  const isKept = (record) => record.outcome.startsWith("kept_");
  const tone = (record) => (isKept(record) ? "better" : record.faults.length ? "worse" : "unclear");

  const texts = new Map(records.map((record) => {
    const critique = record.critique;
    const parts = [record.id, record.caption, ...(record.instructions || [])];
    if (critique) parts.push(...critique.problems.flatMap((one) => [one.what, one.where]), ...critique.keep);
    parts.push(...record.faults.map((fault) => fault.message));
    return [record.id, parts.join("\n").toLowerCase()];
  }));

  const filters = {
    outcome: (record, value) =>
      value === "kept" ? isKept(record)
        : value === "dropped" ? !isKept(record) && record.outcome !== "undecided"
          : record.outcome === value,
    fault: (record, value) => record.faults.some((fault) => value === "any" || fault.kind === value),
    starts: (record, value) => record.starts.includes(value),
    q: (record, value) => value.toLowerCase().split(/\s+/).every((word) => texts.get(record.id).includes(word)),
  };

  function picture(record, kind) {
    const names = { source: "Source", edit: "Edit", difference: `Difference × ${amplification}` };
    const address = record.images[kind];
    const won = record.outcome === `kept_${kind}`;
    const described = {
      source: `Source image for the caption: ${record.caption}`,
      edit: `The same image after: ${(record.instructions || []).join("; ")}`,
      difference: "Where source and edit differ; black where they are the same",
    };
    const [width, height] = record.images.size;
    const image = address
      ? element("img", { src: address, width, height, alt: described[kind], class: record.images.has_pixels ? "pixels" : "" })
      : element("div", { class: "no-image", style: `aspect-ratio:${width}/${height}` }, kind === "edit" ? "no edit" : "nothing to compare");
    return element("figure", { class: won ? `${kind} won` : kind }, image,
      element("figcaption", {}, names[kind], won ? element("b", {}, "★ preferred") : ""));
  }

  function block(title, ...children) {
    return element("section", { class: "block" }, element("h4", {}, title), ...children);
  }

  function critiqueBlock(record) {
    const critique = record.critique;
    if (!critique) return null;
    const problems = critique.problems.map((problem) => element("li", {},
      element("span", { class: `severity s${problem.severity}`, title: severities[problem.severity] },
        "●".repeat(problem.severity) + "○".repeat(3 - problem.severity)),
      element("span", { class: "hidden" }, ` severity ${problem.severity} of 3, ${severities[problem.severity]}: `),
      element("span", {}, problem.what, problem.where ? element("span", { class: "quiet" }, ` · ${problem.where}`) : "")));
    const keep = critique.keep.length
      ? element("p", { class: "keep" }, element("b", {}, "Keep: "), critique.keep.join("; ")) : null;
    return block("Critique",
      element("p", { class: "overall" }, element("b", {}, String(critique.overall)), " of 10 overall"),
      problems.length ? element("ul", { class: "problems" }, ...problems) : element("p", { class: "quiet" }, "No problem found."), keep);
  }

  function instructionsBlock(record) {
    if (!record.instructions) return null;
    return block("Instructions", record.instructions.length
      ? element("ol", { class: "instructions" }, ...record.instructions.map((text) => element("li", {}, text)))
      : element("p", { class: "quiet" }, "Nothing that an editor could do."));
  }

  function scoresBlock(record) {
    if (!record.scores.length) return null;
    const marks = { up: "▲", down: "▼", same: "=" };
    const tones = { up: "better", down: "worse", same: "unclear" };
    const rows = record.scores.map((score) => element("tr", {},
      element("th", { scope: "row" }, score.name, element("span", { class: "range" }, score.role)),
      element("td", { class: "figure" }, score.source),
      element("td", { class: "figure" }, score.edit || "–"),
      element("td", { class: `figure ${tones[score.direction] || ""}` },
        score.change ? `${marks[score.direction]} ${score.change}` : "–")));
    const head = element("tr", {}, element("th", { scope: "col" }, "Reward"),
      ...["source", "edit", "change"].map((name) => element("th", { scope: "col", class: "figure" }, name)));
    return block("Scores",
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores" },
        element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))),
      ...record.measures.map(([name, value]) => element("p", { class: "quiet" }, `${name}: ${value}`)));
  }

  function faultBlocks(record) {
    return record.faults.map((fault) => element("section", { class: "block fault" },
      element("h4", {}, `Fault: ${fault.of}`, element("span", { class: "quiet" }, ` ${fault.words} (${fault.kind})`)),
      element("p", {}, fault.message),
      fault.raw ? element("details", {},
        element("summary", {}, `What was really said (${fault.raw.length.toLocaleString("en")} characters)`),
        element("pre", { tabindex: "0" }, fault.raw)) : null));
  }

  function facts(pairs) {
    return element("dl", {}, ...pairs.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  function stepButton(label, mark, by) {
    const button = element("button", { type: "button", class: "step-button", "aria-label": label, disabled: !visible[place + by] }, mark);
    button.addEventListener("click", () => { go(place + by); leaf.querySelector(`[aria-label="${label}"]`).focus({ preventScroll: true }); });
    return button;
  }

  function showLeaf() {
    const record = visible[place];
    if (!record) {
      leaf.replaceChildren(element("p", { class: "empty" }, "No record fits these filters."));
      said.textContent = "";
      return;
    }
    const [name, sentence] = words[record.outcome];
    const toggle = element("input", { type: "checkbox", checked: showsDifference });
    toggle.addEventListener("change", () => setDifference(toggle.checked));
    const others = record.others.length
      ? block("Across the given pair", element("ul", {}, ...record.others.map((text) => element("li", {}, text)))) : null;
    leaf.replaceChildren(
      element("div", { class: "leafing" },
        stepButton("Previous record", "←", -1),
        element("span", { class: "quiet" }, `${place + 1} of ${visible.length}`),
        stepButton("Next record", "→", 1),
        element("label", { class: "toggle" }, toggle, "difference")),
      element("h3", {}, record.caption),
      element("p", { class: "decision" },
        element("span", { class: `pill ${tone(record)}` }, (isKept(record) ? "✓ " : record.outcome === "undecided" ? "… " : "✗ ") + name),
        " ", sentence.replace(/\.$/, ""), record.because ? ` (${record.because})` : "", "."),
      element("div", { class: "sides" }, ...["source", "edit", "difference"].map((kind) => picture(record, kind))),
      element("div", { class: "blocks" },
        ...[...faultBlocks(record), critiqueBlock(record), instructionsBlock(record), scoresBlock(record), others]
          .filter((one) => one !== null)),
      element("details", { class: "provenance" }, element("summary", {}, "Where it comes from"), facts(record.provenance)));
    setDifference(showsDifference);
    said.textContent = `${place + 1} of ${visible.length}: ${record.caption}; ${name}`;
  }

  function setDifference(isShown) {
    showsDifference = isShown;
    leaf.classList.toggle("without-difference", !isShown);
    const toggle = leaf.querySelector(".toggle input");
    if (toggle) toggle.checked = isShown;
  }

  function entry(record, number) {
    const button = element("button", { type: "button", tabindex: "-1", "data-place": String(number) },
      element("img", { src: record.images.source, alt: "", width: 48, height: 48, loading: "lazy", decoding: "async", class: record.images.has_pixels ? "pixels" : "" }),
      element("span", { class: "entry" }, element("span", { class: "entry-caption" }, record.caption),
        element("span", { class: `entry-outcome ${tone(record)}` }, words[record.outcome][0])));
    return element("li", {}, button);
  }

  // The list grows in lots, as far as it is looked at or leafed to.
  const end = element("li", { class: "end", "aria-hidden": "true" });
  function growTo(count) {
    let length = list.children.length - (end.parentNode === list ? 1 : 0);
    if (length >= visible.length) { end.remove(); return; }
    const made = [];
    for (; length < Math.min(count, visible.length); length += 1) made.push(entry(visible[length], length));
    end.remove();
    list.append(...made);
    if (length < visible.length) list.append(end);
  }
  new IntersectionObserver((seen) => {
    if (seen.some((one) => one.isIntersecting)) growTo(list.children.length + LOT);
  }, { root: index, rootMargin: "300px" }).observe(end);

  function mark() {
    growTo(place + LOT);
    const old = list.querySelector("[aria-current]");
    if (old) { old.removeAttribute("aria-current"); old.tabIndex = -1; }
    const current = list.querySelector(`[data-place="${place}"]`);
    if (!current) return;
    current.setAttribute("aria-current", "true");
    current.tabIndex = 0;
    // Scrolls the list only; scrollIntoView would move the page as well.
    const box = current.getBoundingClientRect();
    const frame = index.getBoundingClientRect();
    if (box.top < frame.top) index.scrollTop -= frame.top - box.top;
    if (box.bottom > frame.bottom) index.scrollTop += box.bottom - frame.bottom;
    if (box.left < frame.left) index.scrollLeft -= frame.left - box.left;
    if (box.right > frame.right) index.scrollLeft += box.right - frame.right;
  }

  function remember() {
    const kept = new URLSearchParams();
    if (visible[place]) kept.set("record", visible[place].id);
    for (const name of Object.keys(filters)) if (form.elements[name].value) kept.set(name, form.elements[name].value);
    history.replaceState(null, "", `#${kept}`);
  }

  function go(to) {
    if (!visible[to]) return;
    place = to;
    showLeaf();
    mark();
    remember();
  }

  function filter(wanted) {
    const set = Object.entries(filters).map(([name, fits]) => [fits, form.elements[name].value.trim()]).filter(([, value]) => value);
    visible = records.filter((record) => set.every(([fits, value]) => fits(record, value)));
    place = Math.max(visible.findIndex((record) => record.id === wanted), 0);
    output.textContent = set.length ? `${visible.length} of ${records.length} shown fit` : `${records.length} shown`;
    list.replaceChildren();
    index.scrollTop = index.scrollLeft = 0;
    showLeaf();
    mark();
    remember();
  }

  function recall() {
    const kept = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(filters)) {
      form.elements[name].value = kept.get(name) || "";
      if (form.elements[name].selectedIndex === -1) form.elements[name].value = "";
    }
    filter(kept.get("record"));
  }

  const current = () => visible[place] && visible[place].id;
  form.addEventListener("input", () => filter(current()));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => filter(current())));
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) go(Number(button.dataset.place));
  });
  document.querySelectorAll(".lost button").forEach((button) => {
    const choice = form.elements.outcome;
    if (![...choice.options].some((option) => option.value === button.dataset.outcome)) { button.disabled = true; return; }
    button.addEventListener("click", () => {
      form.reset();
      choice.value = button.dataset.outcome;
      setTimeout(() => { filter(null); form.scrollIntoView(); leaf.focus({ preventScroll: true }); });
    });
  });
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); form.scrollIntoView(); leaf.focus({ preventScroll: true }); });
  window.addEventListener("hashchange", recall);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input[type=search], select, pre, .scroll")) return;
    const isInList = index.contains(document.activeElement);
    const steps = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1, ...(isInList ? { ArrowDown: 1, ArrowUp: -1 } : {}) };
    if (event.key in steps) go(place + steps[event.key]);
    else if (event.key === "d") setDifference(!showsDifference);
    else if (event.key === "/") form.elements.q.focus();
    else return;
    if (isInList && event.key in steps) list.querySelector("[aria-current]").focus({ preventScroll: true });
    event.preventDefault();
  });

  recall();
})();
