// The map explorer: reads the page's data, keeps one state, and draws it. No library, no network.
//
// Maps lie in atlases, grey PNGs of tiles: column = word, row = step (the first is the steps' mean) or head. A tile's
// bytes are its values in 255ths of its maximum. The frames of a video's map lie below each other in its tile.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const [rows, columns] = data.grid;
const frames = data.images.length; // 1 of a picture
const cells = rows * columns; // of one frame
const at = (id) => document.getElementById(id);

// At first: the best layer, and the two words with the highest maps in it.
const start = Math.max(0, data.layers.indexOf(data.chosen[0]));
const tops = data.i2t[String(data.layers[start])].max[0];
const strongest = [...data.words.keys()]
  .sort((one, other) => data.special.includes(one) - data.special.includes(other) || tops[other] - tops[one]);

const state = {
  a: strongest[0],
  b: strongest[Math.min(1, strongest.length - 1)],
  layer: start, // place in data.layers
  head: 0, // 0 is the mean over heads
  step: 0, // 0 is the mean over steps
  frame: Math.floor(frames / 2),
  strength: 65,
};

// ---- maps ----------------------------------------------------------------------------------------------------------

const decoded = new Map(); // data URL -> promise of its pixels

/** The grey values of an atlas: {width, bytes}. */
function pixels(source) {
  if (!decoded.has(source)) {
    decoded.set(
      source,
      (async () => {
        const image = new Image();
        image.src = source;
        await image.decode();
        const canvas = document.createElement("canvas");
        canvas.width = image.width;
        canvas.height = image.height;
        const context = canvas.getContext("2d", { willReadFrequently: true });
        context.drawImage(image, 0, 0);
        const rgba = context.getImageData(0, 0, image.width, image.height).data;
        const bytes = new Uint8Array(image.width * image.height);
        for (let k = 0; k < bytes.length; k++) bytes[k] = rgba[4 * k];
        return { width: image.width, bytes };
      })()
    );
  }
  return decoded.get(source);
}

/** Which atlas and row show a direction, and what is not kept: heads of some layers, steps of T2I and of heads. */
function place(direction) {
  const layer = String(data.layers[state.layer]);
  const heads = data[direction + "Heads"][layer];
  if (state.head > 0 && heads) return { atlas: heads, row: state.head - 1, missing: state.step > 0 ? "step" : "" };
  const atlas = data[direction][layer];
  const row = Math.min(state.step, atlas.max.length - 1);
  const missing = state.head > 0 ? "head" : state.step > row ? "step" : "";
  return { atlas, row, missing };
}

/** A word's map, of all frames: {values (bytes), top (its maximum), low, peak [frame, row, column]}. */
async function map(direction, word) {
  const { atlas, row } = place(direction);
  const { width, bytes } = await pixels(atlas.src);
  const values = new Uint8Array(frames * cells);
  for (let y = 0; y < frames * rows; y++) {
    const first = (row * frames * rows + y) * width + word * columns;
    values.set(bytes.subarray(first, first + columns), y * columns);
  }
  const top = atlas.max[row][word];
  let best = 0;
  let low = 255;
  values.forEach((value, k) => {
    if (value > values[best]) best = k;
    if (value < low) low = value;
  });
  const peak = [Math.floor(best / cells), Math.floor((best % cells) / columns), best % columns];
  return { values, top, low, peak };
}

/** A picture in grey, at the size of the panels: large ones smaller, small ones by whole pixels. */
function greyPicture(picture) {
  const canvas = document.createElement("canvas");
  const side = Math.max(...data.size);
  const scale = side > 512 ? 512 / side : Math.max(1, Math.floor(384 / side));
  [canvas.width, canvas.height] = data.size.map((length) => Math.max(1, Math.round(length * scale)));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let k = 0; k < image.data.length; k += 4) {
    const [red, green, blue] = image.data.subarray(k, k + 3);
    image.data.fill(0.299 * red + 0.587 * green + 0.114 * blue, k, k + 3);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Draw the shown frame of a map over its grey picture. */
function paint(canvas, found) {
  const grey = greys[state.frame];
  canvas.width = grey.width;
  canvas.height = grey.height;
  const context = canvas.getContext("2d");
  context.drawImage(grey, 0, 0);
  const small = document.createElement("canvas");
  small.width = columns;
  small.height = rows;
  const image = new ImageData(columns, rows);
  const spread = Math.max(1, 255 - found.low);
  found.values.subarray(state.frame * cells, (state.frame + 1) * cells).forEach((value, k) => {
    const colour = data.colours[Math.round((255 * (value - found.low)) / spread)];
    image.data.set([...colour, 255], 4 * k);
  });
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.globalAlpha = state.strength / 100;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
}

// ---- words ---------------------------------------------------------------------------------------------------------

function showWords() {
  for (const button of document.querySelectorAll(".tokens button")) {
    const word = Number(button.dataset.word);
    const [first, second] = [word === state.a, word === state.b];
    button.classList.toggle("first", first);
    button.classList.toggle("second", second);
    button.setAttribute("aria-pressed", String(first || second));
    const role = first && second ? "word A and word B" : first ? "word A" : second ? "word B" : "";
    button.setAttribute("aria-label", button.textContent + (role ? `, ${role}` : ""));
  }
}

// ---- places --------------------------------------------------------------------------------------------------------

const names = {
  layer: () => String(data.layers[state.layer]) + (data.chosen.includes(data.layers[state.layer]) ? " (chosen)" : ""),
  head: () => (state.head === 0 ? "mean of all" : String(state.head - 1)),
  step: () => data.steps[state.step],
  ...(frames > 1 ? { frame: () => `${state.frame} of 0 to ${frames - 1}` } : {}),
  strength: () => `${state.strength} %`,
};

function showSliders() {
  for (const [name, text] of Object.entries(names)) {
    at(name).value = state[name];
    at(name).setAttribute("aria-valuetext", text());
    at(name + "-value").textContent = text();
  }
  const missing = ["i2t", "t2i"].map((direction) => [direction.toUpperCase(), place(direction).missing]);
  at("note").textContent = missing
    .filter(([, what]) => what)
    .map(([direction, what]) =>
      what === "head"
        ? `${direction} of single heads is kept for layers ${Object.keys(data.i2tHeads).join(", ") || "none"}: ` +
          "the mean over heads is shown."
        : `${direction} of single steps is not kept here: the mean over steps is shown.`
    )
    .join(" ");
}

// ---- budget --------------------------------------------------------------------------------------------------------

function element(tag, options = {}, children = []) {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...children);
  return made;
}

function showBudget() {
  const shares = data.budget[state.layer][state.head][state.step];
  const parts = data.kinds.map(([name, colour], kind) => ({ name, colour, kind }));
  const shown = parts.filter(({ kind }) => shares.some((of) => of[kind] > 0));
  const bars = data.queries.flatMap((label, query) => {
    const bar = element("div", { className: "bar", role: "img" });
    const said = shown.map(({ name, kind }) => `${name} ${(100 * shares[query][kind]).toFixed(1)} %`);
    bar.setAttribute("aria-label", `${label}: ${said.join(", ")}`);
    for (const { name, colour, kind } of shown) {
      const part = element("span", { title: `${name} ${(100 * shares[query][kind]).toFixed(1)} %` });
      part.style.width = `${100 * shares[query][kind]}%`;
      part.style.background = colour;
      bar.append(part);
    }
    return [element("div", { className: "soft", textContent: label }), bar];
  });
  const head = element("tr", {}, ["kind of key", ...data.queries].map((text) =>
    element("th", { textContent: text, scope: "col" })));
  const body = shown.map(({ name, colour, kind }) => {
    const key = element("span", { className: "key" });
    key.style.background = colour;
    const label = element("th", { scope: "row" }, [key, name]);
    return element("tr", {}, [label, ...shares.map((of) => element("td", { textContent: of[kind].toFixed(3) }))]);
  });
  const table = element("table", { ariaLabel: "Shares of attention by kind of key" }, [element("thead", {}, [head]), element("tbody", {}, body)]);
  at("budget").replaceChildren(...bars, table);
}

// ---- all -----------------------------------------------------------------------------------------------------------

let latest = 0;

/** Draw the state. Of draws that overtake each other, the last one counts. */
async function show() {
  const mine = ++latest;
  showWords();
  showSliders();
  showBudget();
  const panels = ["a", "b"].flatMap((letter) => ["i2t", "t2i"].map((direction) => [letter, direction]));
  const found = await Promise.all(panels.map(([letter, direction]) => map(direction, state[letter])));
  if (mine !== latest) return;
  if (picture.src !== data.images[state.frame]) picture.src = data.images[state.frame];
  if (frames > 1) at("picture-name").textContent = `frame ${state.frame} of the model`;
  const said = [];
  panels.forEach(([letter, direction], k) => {
    const id = `${letter}-${direction}`;
    const { top, peak } = found[k];
    const word = data.words[state[letter]];
    const where = `${frames > 1 ? `frame ${peak[0]}, ` : ""}row ${peak[1]}, column ${peak[2]}`;
    const value = top > 0 ? `max ${top.toPrecision(3)} at ${where}`
      : direction === "t2i" ? "none: no text queries here" : "none";
    paint(at(id), found[k]);
    at(id + "-name").textContent = `${letter.toUpperCase()}: ${word}`;
    at(id + "-value").textContent = value;
    at(id).setAttribute("aria-label", `${direction.toUpperCase()} of ${word}, ${value}`);
    if (direction === "i2t") said.push(`${word}: ${value}`);
  });
  at("status").textContent =
    `Layer ${names.layer()}, head ${names.head()}, step ${names.step()}` +
    `${frames > 1 ? `, frame ${state.frame}` : ""}. I2T of ${said.join("; ")}.`;
  document.body.dataset.drawn = String(mine);
}

for (const button of document.querySelectorAll(".tokens button")) {
  button.addEventListener("click", () => {
    const which = document.querySelector("input[name=which]:checked").value; // a browser keeps it when it loads again
    state[which] = Number(button.dataset.word);
    show();
  });
}
for (const name of Object.keys(names)) {
  at(name).addEventListener("input", () => {
    state[name] = Number(at(name).value);
    show();
  });
}

at("ramp").style.background = `linear-gradient(to right, ${data.colours
  .filter((_, k) => k % 15 === 0)
  .map((colour) => `rgb(${colour.join(",")})`)
  .join(",")})`;
const picture = at("picture");
let greys = [];
Promise.all(
  data.images.map(async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    return greyPicture(image);
  })
).then((found) => {
  greys = found;
  return show();
});
