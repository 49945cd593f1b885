// The page of `byol explore`. WebGL draws the map; everything else is plain HTML.
// An image is identified by its row in the embeddings.

const byId = (id) => document.getElementById(id);

async function get(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  return response;
}
const getJson = async (url) => (await get(url)).json();
const getBytes = async (url) => (await get(url)).arrayBuffer();

addEventListener("unhandledrejection", (event) => {
  byId("about").textContent = `Error: ${event.reason?.message ?? event.reason}`;
});

// The browser caches images by URL. The stamp keeps images of an earlier server on this port, whose
// rows were other images, out of this page.
const stamp = Date.now().toString(36);
const thumbnailUrl = (row, px) => `/thumb/${row}?px=${px}&stamp=${stamp}`;

const COLORS = [
  "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#4f5bd5",
  "#f2b134", "#12866b", "#b0413e", "#7a5195", "#a05d56", "#d0743c", "#5da5da", "#60bd68", "#b2912f", "#f15854",
];
const GRAY = "#9aa4b2";
const NO_CLASS = 65535;
const MAP_NAMES = { tsne: "t-SNE", pca: "PCA" };

const rgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
const colorOf = (index) => (index === NO_CLASS || index < 0 ? GRAY : COLORS[index % COLORS.length]);
const plural = (number, one, many = `${one}s`) => `${number.toLocaleString()} ${number === 1 ? one : many}`;

function newElement(tag, content = "", className = "") {
  return Object.assign(document.createElement(tag), { textContent: content, className });
}
function colorDot(color) {
  const dot = newElement("span", "", "dot");
  dot.style.background = color;
  return dot;
}

// Errors before the page is usable end the module and never reach the handler above.
function orShowError(promise) {
  return promise.catch((error) => {
    byId("about").textContent = `Cannot load the page: ${error.message}`;
    throw error;
  });
}

// ------------------------------------------------------------------ data

const info = await orShowError(getJson("/api/info"));
const count = info.images;
const itemName = info.sounds ? "sound" : "image";
byId("about").textContent = `${plural(count, itemName)}, loading the map …`;

const points = new DataView(await orShowError(getBytes("/api/points")));
const xs = new Float32Array(count), ys = new Float32Array(count), labels = new Int32Array(count);
for (let row = 0; row < count; row++) {
  xs[row] = points.getFloat32(12 * row, true);
  ys[row] = points.getFloat32(12 * row + 4, true);
  labels[row] = points.getUint32(12 * row + 8, true);
}
let outlierRanks = null;         // rank of each row's outlier score in [0, 1], once computed
let clusters = null;             // k-means cluster of each row, once requested
let predictions = null;          // predicted class of each row
const manualLabels = new Map();  // row -> index into classNames
const classNames = [];           // classes added by the user
let activeClass = -1;            // class that a click assigns; -1: none
let selected = new Set();        // rows inside the last lasso
let shownRow = -1;               // row in the details panel; -1: none
const hiddenClasses = new Set(); // entries of the legend that are switched off
const undoSteps = [];            // functions that take back the latest changes of labels

const summary = [plural(count, itemName)];
if (info.classes.length) summary.push(plural(info.classes.length, "class", "classes"));
const source = info.data ? ` from ${info.data}` : "";
byId("about").textContent = `${summary.join(", ")}${source} (${MAP_NAMES[info.map] ?? info.map} map)`;

// Uniform grid over the map, to find the image under the pointer without scanning all of them.
const GRID_SIDE = Math.max(1, Math.ceil(Math.sqrt(count / 4)));
const gridIndex = (v) => Math.min(GRID_SIDE - 1, Math.max(0, Math.floor((v + 1) / 2 * GRID_SIDE)));
const grid = new Map();
for (let row = 0; row < count; row++) {
  const key = gridIndex(ys[row]) * GRID_SIDE + gridIndex(xs[row]);
  if (!grid.has(key)) grid.set(key, []);
  grid.get(key).push(row);
}

// Returns the row nearest to a map position, or -1 if none lies within the radius.
function nearestRow(mapX, mapY, radius) {
  let nearest = -1, leastSquared = radius * radius;
  for (let gridY = gridIndex(mapY - radius); gridY <= gridIndex(mapY + radius); gridY++) {
    for (let gridX = gridIndex(mapX - radius); gridX <= gridIndex(mapX + radius); gridX++) {
      for (const row of grid.get(gridY * GRID_SIDE + gridX) ?? []) {
        const squared = (xs[row] - mapX) ** 2 + (ys[row] - mapY) ** 2;
        if (squared < leastSquared) [nearest, leastSquared] = [row, squared];
      }
    }
  }
  return nearest;
}

// ------------------------------------------------------------------ map

const canvas = byId("points"), overlay = byId("overlay");
const gl = canvas.getContext("webgl", { antialias: true });
const view = { x: 0, y: 0, zoom: 0.95 };
let program, positionBuffer, colorBuffer, uniforms;
let drawPending = false, lastDraw = -Infinity;
// Software rendering is slow with many points: while the map moves only every `stride`-th point is
// drawn, and all of them once it rests.
let stride = 1, restTimer = 0;

const VERTEX_SHADER = `
  attribute vec2 position; attribute vec3 color;
  uniform vec2 center, scale; uniform float size;
  varying vec3 point_color;
  void main() {
    gl_Position = vec4((position - center) * scale, 0.0, 1.0);
    gl_PointSize = size;
    point_color = color;
  }`;
const FRAGMENT_SHADER = `
  precision mediump float;
  varying vec3 point_color;
  void main() {
    float radius = length(gl_PointCoord - 0.5);
    if (radius > 0.5) discard;
    gl_FragColor = vec4(point_color * 0.8, 0.8) * (1.0 - smoothstep(0.4, 0.5, radius));
  }`;

function compileShader(kind, code) {
  const shader = gl.createShader(kind);
  gl.shaderSource(shader, code);
  gl.compileShader(shader);
  if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
  return shader;
}
function vertexAttribute(name, data, size, type, normalized) {
  const buffer = gl.createBuffer(), location = gl.getAttribLocation(program, name);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.bufferData(gl.ARRAY_BUFFER, data, gl.DYNAMIC_DRAW);
  gl.enableVertexAttribArray(location);
  const useEvery = (nth) => {
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.vertexAttribPointer(location, size, type, normalized, nth * size * data.BYTES_PER_ELEMENT, 0);
  };
  return { buffer, useEvery };
}
function setUpWebGl() {
  program = gl.createProgram();
  gl.attachShader(program, compileShader(gl.VERTEX_SHADER, VERTEX_SHADER));
  gl.attachShader(program, compileShader(gl.FRAGMENT_SHADER, FRAGMENT_SHADER));
  gl.linkProgram(program);
  gl.useProgram(program);
  const positions = new Float32Array(2 * count);
  for (let row = 0; row < count; row++) positions.set([xs[row], ys[row]], 2 * row);
  positionBuffer = vertexAttribute("position", positions, 2, gl.FLOAT, false);
  colorBuffer = vertexAttribute("color", new Uint8Array(3 * count), 3, gl.UNSIGNED_BYTE, true);
  const names = ["center", "scale", "size"];
  uniforms = Object.fromEntries(names.map((name) => [name, gl.getUniformLocation(program, name)]));
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
}

const darkMode = matchMedia("(prefers-color-scheme: dark)");
darkMode.addEventListener("change", () => recolor());

// Colors the points by the selected mode, updates the legend and redraws.
function recolor() {
  const mode = byId("color").value;
  updateLegend(mode);
  if (!gl) return;
  const palette = COLORS.map(rgb), gray = rgb(GRAY), faded = darkMode.matches ? 60 : 200;
  const classOf = classesOf(mode);
  const colors = new Uint8Array(3 * count);
  for (let row = 0; row < count; row++) {
    let color = gray;
    if (mode === "outlier") {
      if (outlierRanks) color = outlierColor(outlierRanks[row]);
    } else {
      const index = classOf(row);
      if (index !== NO_CLASS && index >= 0) color = palette[index % palette.length];
    }
    const off = mode !== "outlier" && hiddenClasses.has(classOf(row));
    if (off || selected.size && !selected.has(row)) color = color.map((v) => faded + (v - faded) * 0.15);
    colors.set(color, 3 * row);
  }
  gl.bindBuffer(gl.ARRAY_BUFFER, colorBuffer.buffer);
  gl.bufferData(gl.ARRAY_BUFFER, colors, gl.DYNAMIC_DRAW);
  draw();
}
// Class of a row in a color mode.
const classesOf = (mode) => ({
  label: (row) => labels[row],
  cluster: (row) => clusters?.[row] ?? NO_CLASS,
  prediction: (row) => manualLabels.get(row) ?? predictions?.[row] ?? NO_CLASS,
}[mode]);
// Blue for typical images (rank 0) to orange for atypical ones (rank 1).
const outlierColor = (rank) => [60 + 180 * rank, 90 + 40 * (1 - rank), 200 * (1 - rank) + 30];

function ranksOf(values) {
  const order = Array.from(values.keys()).sort((a, b) => values[a] - values[b]);
  const ranks = new Float32Array(count);
  order.forEach((row, position) => { ranks[row] = position / Math.max(1, count - 1); });
  return ranks;
}
function legendNames(mode) {
  if (mode === "label") return info.classes;
  if (mode === "prediction") return classNames;
  if (mode !== "cluster" || !clusters) return [];
  const last = clusters.reduce((a, b) => Math.max(a, b), 0);
  return Array.from({ length: last + 1 }, (_, index) => `cluster ${index + 1}`);
}
function updateLegend(mode) {
  const MAX_NAMES = 24;
  const names = legendNames(mode);
  const items = names.slice(0, MAX_NAMES).map((name, index) => legendSwitch(index, name));
  if (names.length > MAX_NAMES) items.push(newElement("li", `and ${names.length - MAX_NAMES} more`));
  if (mode === "outlier" && outlierRanks) {
    items.push(legendItem("#3c7ae6", "typical"), legendItem("#f05a1e", "atypical"));
  }
  if (mode === "outlier" && !outlierRanks || mode === "cluster" && !clusters) {
    items.push(newElement("li", "computing …"));
  }
  byId("legend").replaceChildren(...items);
}
// Entry of the legend that dims the images of its class, or shows them again.
function legendSwitch(index, name) {
  const item = newElement("li"), button = newElement("button");
  button.append(colorDot(colorOf(index)), name);
  button.setAttribute("aria-pressed", String(!hiddenClasses.has(index)));
  button.title = hiddenClasses.has(index) ? `Show ${name}` : `Dim ${name}`;
  button.addEventListener("click", () => {
    if (!hiddenClasses.delete(index)) hiddenClasses.add(index);
    recolor();
    byId("legend").children[index].firstChild.focus();
  });
  item.append(button);
  return item;
}
function legendItem(color, name) {
  const item = newElement("li");
  item.append(colorDot(color), name);
  return item;
}

// Map coordinates are those of the points, in [-1, 1]². Screen coordinates are CSS pixels of the
// canvas.
const aspect = () => canvas.clientWidth / Math.max(1, canvas.clientHeight);
const scale = () => (aspect() >= 1 ? [view.zoom / aspect(), view.zoom] : [view.zoom, view.zoom * aspect()]);
function toScreen(mapX, mapY) {
  const [scaleX, scaleY] = scale();
  return [
    ((mapX - view.x) * scaleX + 1) / 2 * canvas.clientWidth,
    (1 - (mapY - view.y) * scaleY) / 2 * canvas.clientHeight,
  ];
}
function toMap(screenX, screenY) {
  const [scaleX, scaleY] = scale();
  return [
    (2 * screenX / canvas.clientWidth - 1) / scaleX + view.x,
    (1 - 2 * screenY / canvas.clientHeight) / scaleY + view.y,
  ];
}
// Radius around the pointer in which an image counts as hit: 12 pixels in map coordinates.
const hitRadius = () => 12 * 2 / Math.max(canvas.clientWidth, 1) / scale()[0];

function draw() {
  if (!gl || drawPending) return;
  drawPending = true;
  requestAnimationFrame((now) => {
    drawPending = false;
    const frameTime = now - lastDraw, moving = frameTime < 300;
    lastDraw = now;
    if (moving && frameTime > 45 && count / stride > 4000) stride = Math.min(16, 2 * stride);
    else if (moving && frameTime < 20 && stride > 1) stride /= 2;
    const nth = moving ? stride : 1;
    clearTimeout(restTimer);
    if (nth > 1) restTimer = setTimeout(() => { lastDraw = -Infinity; draw(); }, 350);
    drawPoints(nth);
  });
}
function drawPoints(nth) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) {
    for (const layer of [canvas, overlay]) [layer.width, layer.height] = [width, height];
  }
  gl.viewport(0, 0, width, height);
  gl.clearColor(0, 0, 0, 0);
  gl.clear(gl.COLOR_BUFFER_BIT);
  gl.uniform2f(uniforms.center, view.x, view.y);
  gl.uniform2f(uniforms.scale, ...scale());
  // Points shrink as they get more numerous and grow, up to four times, with the zoom.
  const spacing = Math.sqrt(canvas.clientWidth * canvas.clientHeight / Math.max(1, count)) / 2.2;
  const magnification = Math.min(4, Math.max(1, Math.sqrt(view.zoom)));
  gl.uniform1f(uniforms.size, Math.min(14, Math.max(2.5, spacing) * magnification) * ratio);
  positionBuffer.useEvery(nth);
  colorBuffer.useEvery(nth);
  gl.drawArrays(gl.POINTS, 0, Math.ceil(count / nth));
  drawOverlay(ratio);
}

let lassoLine = null; // map positions while a lasso is being drawn
function drawOverlay(ratio) {
  const context = overlay.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, overlay.width, overlay.height);
  context.strokeStyle = getComputedStyle(document.body).color;
  const ring = (row, radius) => {
    const [screenX, screenY] = toScreen(xs[row], ys[row]);
    context.beginPath();
    context.arc(screenX, screenY, radius, 0, 2 * Math.PI);
    context.stroke();
  };
  drawThumbnails(context);
  context.lineWidth = 2;
  if (shownRow >= 0) ring(shownRow, 9);
  context.lineWidth = 1;
  for (const row of manualLabels.keys()) ring(row, 6);
  if (lassoLine?.length > 1) {
    context.setLineDash([5, 4]);
    context.beginPath();
    for (const corner of lassoLine) context.lineTo(...toScreen(...corner));
    context.closePath();
    context.stroke();
    context.setLineDash([]);
  }
}

// Thumbnails in place of the points where few images are in sight.
const MAX_THUMBNAILS = 60, THUMBNAIL = 48;
const thumbnails = new Map(); // row -> picture
function drawThumbnails(context) {
  if (view.zoom < 2) return;
  const [left, bottom] = toMap(0, canvas.clientHeight), [right, top] = toMap(canvas.clientWidth, 0);
  const rows = [];
  for (let gridY = gridIndex(bottom); gridY <= gridIndex(top); gridY++) {
    for (let gridX = gridIndex(left); gridX <= gridIndex(right); gridX++) {
      for (const row of grid.get(gridY * GRID_SIDE + gridX) ?? []) {
        if (xs[row] < left || xs[row] > right || ys[row] < bottom || ys[row] > top) continue;
        if (rows.push(row) > MAX_THUMBNAILS) return;
      }
    }
  }
  for (const row of rows) {
    let picture = thumbnails.get(row);
    if (!picture) {
      if (thumbnails.size > 1000) thumbnails.clear();
      picture = newElement("img");
      picture.addEventListener("load", draw);
      picture.src = thumbnailUrl(row, 96);
      thumbnails.set(row, picture);
    }
    if (!picture.complete || !picture.naturalWidth) continue;
    const size = THUMBNAIL / Math.max(picture.naturalWidth, picture.naturalHeight);
    const [width, height] = [picture.naturalWidth * size, picture.naturalHeight * size];
    const [screenX, screenY] = toScreen(xs[row], ys[row]);
    context.drawImage(picture, screenX - width / 2, screenY - height / 2, width, height);
  }
}

// Zooms so that the map position under the given screen position stays where it is.
function zoomAt(factor, screenX, screenY) {
  const before = toMap(screenX, screenY);
  view.zoom = Math.min(400, Math.max(0.5, view.zoom * factor));
  const after = toMap(screenX, screenY);
  view.x += before[0] - after[0];
  view.y += before[1] - after[1];
  draw();
}
const zoom = (factor) => zoomAt(factor, canvas.clientWidth / 2, canvas.clientHeight / 2);
function showAll() {
  Object.assign(view, { x: 0, y: 0, zoom: 0.95 });
  draw();
}

// ------------------------------------------------------------------ pointer and keyboard

// One pointer pans, clicks or draws the lasso; two pinch.
const pointers = new Map();
let moved = 0, pinchDistance = 0;
const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
function positionOf(event) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}
const lassoActive = () => byId("lasso").getAttribute("aria-pressed") === "true";

canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
canvas.addEventListener("webglcontextrestored", () => { setUpWebGl(); recolor(); });
canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || event.ctrlKey) return;
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, positionOf(event));
  byId("tip").hidden = true;
  moved = pointers.size > 1 ? Infinity : 0; // a pinch never ends in a click
  if (pointers.size === 2) {
    pinchDistance = distance(...pointers.values());
    lassoLine = null;
  } else if (pointers.size === 1 && lassoActive()) {
    lassoLine = [toMap(...positionOf(event))];
  }
});
canvas.addEventListener("pointermove", (event) => {
  // The button was released without an event, for example over a context menu.
  if (pointers.has(event.pointerId) && !event.buttons) {
    pointers.delete(event.pointerId);
    lassoLine = null;
  }
  const here = positionOf(event), before = pointers.get(event.pointerId);
  if (!before) return hover(here);
  pointers.set(event.pointerId, here);
  moved += distance(here, before);
  const [from, to] = [toMap(...before), toMap(...here)];
  if (pointers.size === 2) {
    // The midpoint of two fingers moves half as far as the one that moved.
    view.x += (from[0] - to[0]) / 2;
    view.y += (from[1] - to[1]) / 2;
    const [first, second] = [...pointers.values()], spread = distance(first, second);
    const middle = [(first[0] + second[0]) / 2, (first[1] + second[1]) / 2];
    if (pinchDistance > 0) zoomAt(spread / pinchDistance, ...middle);
    pinchDistance = spread;
  } else if (lassoLine) {
    if (distance(here, toScreen(...lassoLine.at(-1))) >= 4) {
      lassoLine.push(to);
      draw();
    }
  } else {
    view.x += from[0] - to[0];
    view.y += from[1] - to[1];
    draw();
  }
});
function releasePointer(event) {
  if (!pointers.delete(event.pointerId)) return;
  const line = lassoLine;
  lassoLine = null;
  if (line) draw();
  if (event.type !== "pointerup") return;
  if (line && moved >= 5) {
    if (line.length > 2) select(rowsInside(line));
  } else if (moved < 5) {
    const row = nearestRow(...toMap(...positionOf(event)), hitRadius());
    if (row >= 0) clickImage(row);
  }
}
canvas.addEventListener("pointerup", releasePointer);
canvas.addEventListener("pointercancel", releasePointer);
canvas.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomAt(Math.exp(-event.deltaY * 0.0015), ...positionOf(event));
}, { passive: false });
new ResizeObserver(draw).observe(canvas);

let hoveredRow = -1, hoverTimer;
function hover([screenX, screenY]) {
  const tip = byId("tip"), row = nearestRow(...toMap(screenX, screenY), hitRadius());
  tip.hidden = row < 0;
  if (row < 0) { hoveredRow = -1; return; }
  const left = screenX > canvas.clientWidth - 180 ? screenX - 130 : screenX + 14;
  const top = screenY > canvas.clientHeight - 160 ? screenY - 140 : screenY + 14;
  [tip.style.left, tip.style.top] = [`${left}px`, `${top}px`];
  if (row === hoveredRow) return;
  hoveredRow = row;
  tip.querySelector("span").textContent = "";
  tip.querySelector("img").removeAttribute("src");
  // A short delay avoids requests for every image that the pointer crosses.
  clearTimeout(hoverTimer);
  hoverTimer = setTimeout(async () => {
    if (hoveredRow !== row) return;
    tip.querySelector("img").src = thumbnailUrl(row, 96);
    const image = await getJson(`/api/row/${row}`);
    if (hoveredRow === row) tip.querySelector("span").textContent = shortName(image);
  }, 60);
}
const withLabel = (name, label) => name + (label ? ` (${label})` : "");
const shortName = (image) => withLabel(image.path.split(/[\\/]/).slice(-2).join("/"), image.label);

// Rows inside a polygon, by the even-odd rule.
function rowsInside(polygon) {
  const rows = new Set();
  let [left, right, bottom, top] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [mapX, mapY] of polygon) {
    [left, right] = [Math.min(left, mapX), Math.max(right, mapX)];
    [bottom, top] = [Math.min(bottom, mapY), Math.max(top, mapY)];
  }
  for (let row = 0; row < count; row++) {
    const mapX = xs[row], mapY = ys[row];
    if (mapX < left || mapX > right || mapY < bottom || mapY > top) continue;
    let inside = false;
    for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
      const [ax, ay] = polygon[i], [bx, by] = polygon[j];
      if ((ay > mapY) !== (by > mapY) && mapX < (bx - ax) * (mapY - ay) / (by - ay) + ax) inside = !inside;
    }
    if (inside) rows.add(row);
  }
  return rows;
}
function select(rows) {
  selected = rows;
  byId("selection").textContent = rows.size ? `${rows.size.toLocaleString()} selected` : "";
  for (const id of ["save-selection", "label-selection", "clear-selection"]) byId(id).hidden = !rows.size;
  listSelection();
  recolor();
}
// The selected images as a grid, a page at a time.
const GRID_PAGE = 60;
function listSelection(pages = 1) {
  const rows = [...selected], shown = rows.slice(0, pages * GRID_PAGE);
  byId("selection-grid").hidden = !rows.length;
  byId("selection-images").replaceChildren(...shown.map((row) => imageButton(row, 96, `image ${row}`)));
  byId("more-selected").hidden = shown.length === rows.length;
  byId("more-selected").onclick = () => listSelection(pages + 1);
}

function pan(stepsX, stepsY) {
  view.x += 0.1 / view.zoom * stepsX;
  view.y += 0.1 / view.zoom * stepsY;
  draw();
}
// N and P walk over the images from left to right on the map.
const leftToRight = Array.from(xs.keys()).sort((a, b) => xs[a] - xs[b]), orderOf = new Int32Array(count);
leftToRight.forEach((row, position) => { orderOf[row] = position; });
function step(by) {
  showImage(leftToRight[shownRow < 0 ? 0 : (orderOf[shownRow] + by + count) % count]);
}
const shortcuts = {
  ArrowLeft: () => pan(-1, 0), ArrowRight: () => pan(1, 0), ArrowUp: () => pan(0, 1), ArrowDown: () => pan(0, -1),
  "+": () => zoom(1.3), "=": () => zoom(1.3), "-": () => zoom(1 / 1.3), 0: showAll,
  n: () => step(1), p: () => step(-1), Enter: () => shownRow >= 0 && clickImage(shownRow),
  l: () => byId("lasso").click(), Escape: () => select(new Set()), u: () => undo(), "/": () => byId("search").focus(),
};
document.addEventListener("keydown", (event) => {
  const action = shortcuts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const target = event.target, typing = target.matches?.("input, select, textarea");
  // Buttons and tabs keep the keys that they use themselves.
  const taken = target.matches?.("button, summary, a") && (event.key === "Enter" || event.key.startsWith("Arrow"));
  if (byId("map").hidden || typing || taken) return;
  if (action && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    action();
  }
});

// ------------------------------------------------------------------ one image and its neighbors

function imageButton(row, px, description) {
  const button = newElement("button"), picture = newElement("img");
  picture.src = thumbnailUrl(row, px);
  picture.alt = description;
  picture.loading = "lazy";
  button.title = description;
  button.append(picture);
  button.addEventListener("click", () => {
    openTab("map", false);
    // The button is about to be replaced: the map takes the focus, so that shortcuts work.
    canvas.focus({ preventScroll: true });
    showImage(row);
  });
  return button;
}
function soundPlayer(row) {
  const player = newElement("audio", "", "large");
  Object.assign(player, { src: `/sound/${row}?stamp=${stamp}`, controls: true, preload: "none" });
  return player;
}
async function showImage(row, remember = true) {
  shownRow = row;
  if (remember) setAddress(`map/${row}`);
  const [screenX, screenY] = toScreen(xs[row], ys[row]);
  const visible = screenX >= 0 && screenY >= 0 && screenX <= canvas.clientWidth && screenY <= canvas.clientHeight;
  if (!visible) [view.x, view.y] = [xs[row], ys[row]];
  draw();
  const [image, neighbors] = await Promise.all([
    getJson(`/api/row/${row}`), getJson(`/api/neighbors/${row}?n=24`),
  ]);
  if (shownRow !== row) return; // another image was chosen meanwhile
  const large = newElement("a"), picture = newElement("img", "", "large");
  picture.src = thumbnailUrl(row, 512);
  picture.alt = shortName(image);
  Object.assign(large, { href: `/image/${row}?stamp=${stamp}`, target: "_blank", title: "Open in full size" });
  large.append(picture);
  const buttons = newElement("div", "", "grid");
  for (const { cosine, image: neighbor } of neighbors) {
    const button = imageButton(neighbor.row, 96, `${shortName(neighbor)}, cosine ${cosine.toFixed(3)}`);
    button.append(cosine.toFixed(3));
    buttons.append(button);
  }
  byId("image-path").textContent = withLabel(image.path, image.label);
  const parts = [large, newElement("p", "Nearest neighbors"), buttons];
  if (info.sounds) parts.splice(1, 0, soundPlayer(row));
  byId("neighbors").replaceChildren(...parts);
}

// ------------------------------------------------------------------ labeling

function clickImage(row) {
  if (activeClass >= 0) setLabels([row], manualLabels.get(row) === activeClass ? -1 : activeClass);
  showImage(row);
}
// Gives all rows a class, or none for -1. Can be undone.
function setLabels(rows, index) {
  const before = rows.map((row) => [row, manualLabels.get(row)]);
  const set = (row, value) => (value >= 0 ? manualLabels.set(row, value) : manualLabels.delete(row));
  rows.forEach((row) => set(row, index));
  undoSteps.push(() => before.forEach(([row, value]) => set(row, value ?? -1)));
  labelsChanged();
}
function deleteClass(index) {
  const classes = [...classNames], before = new Map(manualLabels);
  classNames.splice(index, 1);
  for (const [row, value] of before) {
    if (value === index) manualLabels.delete(row);
    else if (value > index) manualLabels.set(row, value - 1);
  }
  if (activeClass === index) activeClass = -1;
  else if (activeClass > index) activeClass -= 1;
  undoSteps.push(() => {
    classNames.splice(0, classNames.length, ...classes);
    manualLabels.clear();
    before.forEach((value, row) => manualLabels.set(row, value));
    activeClass = -1;
  });
  labelsChanged();
}
function undo() {
  undoSteps.pop()?.();
  labelsChanged();
}
byId("undo").addEventListener("click", undo);

// Labels are saved on the server a moment after the last change.
let saveTimer = 0, unsaved = false;
function labelsChanged() {
  unsaved = true;
  clearTimeout(saveTimer);
  saveTimer = setTimeout(saveLabels, 300);
  updatePredictions();
}
async function saveLabels() {
  const response = await fetch("/api/labels", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ classes: classNames, rows: [...manualLabels] }),
  }).catch(() => null);
  unsaved = !response?.ok;
  const reason = response ? await response.text() : "no answer from byol explore";
  byId("label-status").textContent = unsaved ? `Labels are not saved: ${reason}` : "";
}
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
async function loadLabels() {
  const saved = await getJson("/api/labels");
  if (!saved.rows.length) return;
  classNames.push(...saved.classes);
  for (const [row, index] of saved.rows) manualLabels.set(row, index);
  updatePredictions();
}
byId("new-class").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("class-name").value.trim();
  if (!name) return;
  let index = classNames.indexOf(name);
  if (index < 0 && classNames.length < 256) index = classNames.push(name) - 1;
  activeClass = index;
  byId("class-name").value = "";
  listClasses();
});
function listClasses() {
  const labeled = [...manualLabels.values()];
  byId("classes").replaceChildren(...classNames.map((name, index) => {
    const item = newElement("li"), button = newElement("button");
    button.append(colorDot(colorOf(index)), `${name} (${labeled.filter((v) => v === index).length})`);
    button.setAttribute("aria-pressed", String(index === activeClass));
    button.addEventListener("click", () => {
      activeClass = activeClass === index ? -1 : index;
      listClasses();
      byId("classes").children[index].firstChild.focus();
    });
    const remove = newElement("button", "×", "delete");
    remove.title = `Delete the class ${name} and its labels`;
    remove.setAttribute("aria-label", remove.title);
    remove.addEventListener("click", () => deleteClass(index));
    item.append(button, remove);
    return item;
  }));
  byId("undo").hidden = !undoSteps.length;
}

let latestRequest = 0;
async function updatePredictions() {
  const request = ++latestRequest, status = byId("probe-status");
  listClasses();
  byId("save-labels").hidden = byId("save-predictions").hidden = !manualLabels.size;
  if (!manualLabels.size) {
    predictions = null;
    status.textContent = "";
    updateColorModes();
    return recolor();
  }
  const response = await fetch("/api/probe", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ rows: [...manualLabels] }),
  }).catch(() => null);
  if (request !== latestRequest) return;
  if (!response?.ok) {
    status.textContent = "Prediction failed";
    return recolor();
  }
  const received = (await response.json()).predictions;
  if (request !== latestRequest) return;
  predictions = received;
  const totals = classNames.map((name, index) =>
    `${name} ${predictions.filter((v) => v === index).length.toLocaleString()}`);
  status.textContent = `Predicted: ${totals.join(", ")}.${accuracy()}`;
  updateColorModes();
  byId("color").value = "prediction";
  recolor();
}
// Modes without data are not offered.
function updateColorModes() {
  const [select, available] = [byId("color"), { label: info.classes.length, prediction: predictions }];
  for (const [mode, data] of Object.entries(available)) select.querySelector(`[value=${mode}]`).disabled = !data;
  if (select.selectedOptions[0].disabled) select.value = info.classes.length ? "label" : "outlier";
}
// Accuracy on images with a label in the data and none by hand, over the classes that have the same
// name in both. Empty if there are no such images.
function accuracy() {
  const dataClasses = classNames.map((name) => info.classes.indexOf(name));
  let correct = 0, total = 0;
  for (let row = 0; row < count; row++) {
    if (manualLabels.has(row) || !dataClasses.includes(labels[row])) continue;
    total++;
    correct += dataClasses[predictions[row]] === labels[row];
  }
  return total ? ` Accuracy: ${(100 * correct / total).toFixed(1)}\u00a0% (${plural(total, "labeled image")}).` : "";
}
function download(file, content) {
  const link = newElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "text/plain" }));
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
let allPaths; // fetched when first needed
async function pathsOf(rows) {
  allPaths ??= (await getJson("/api/paths")).paths;
  return rows.map((row) => allPaths[row]);
}
const csvQuoted = (value) => `"${String(value).replaceAll('"', '""')}"`;

byId("save-selection").addEventListener("click", async () => {
  download("selection.txt", `${(await pathsOf([...selected])).join("\n")}\n`);
});
byId("label-selection").addEventListener("click", () => {
  if (activeClass >= 0) setLabels([...selected], activeClass);
  else byId("label-status").textContent = "Add or choose a class first.";
});
// One file of the labels given by hand, another of the predictions for all other images.
async function saveTable(file, column, classOf) {
  const rows = [...Array(count).keys()].filter((row) => classOf.has(row));
  const names = rows.map((row) => classNames[classOf.get(row)]); // before the paths are fetched
  const paths = await pathsOf(rows);
  const lines = paths.map((path, i) => `${csvQuoted(path)},${csvQuoted(names[i])}`);
  download(file, `${[`path,${column}`, ...lines].join("\n")}\n`);
}
byId("save-labels").addEventListener("click", () => saveTable("labels.csv", "label", manualLabels));
byId("save-predictions").addEventListener("click", () => {
  if (!predictions) return;
  const others = [...predictions.entries()].filter(([row]) => !manualLabels.has(row));
  saveTable("predictions.csv", "predicted", new Map(others));
});
byId("find").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = byId("search").value.trim().toLowerCase();
  if (!text) return select(new Set());
  await pathsOf([]);
  const found = allPaths.flatMap((path, row) => (path.toLowerCase().includes(text) ? [row] : []));
  select(new Set(found));
  if (!found.length) byId("selection").textContent = "no image with this name";
});
byId("clear-selection").addEventListener("click", () => select(new Set()));
byId("lasso").addEventListener("click", () => {
  byId("lasso").setAttribute("aria-pressed", String(!lassoActive()));
});
byId("zoom-in").addEventListener("click", () => zoom(1.3));
byId("zoom-out").addEventListener("click", () => zoom(1 / 1.3));
byId("show-all").addEventListener("click", showAll);
byId("color").addEventListener("change", async () => {
  hiddenClasses.clear();
  recolor();
  if (byId("color").value === "cluster" && !clusters) {
    clusters = (await getJson("/api/clusters")).clusters;
    recolor();
  }
});

// ------------------------------------------------------------------ duplicates and outliers

let isSearching = false, isSearched = false;
// How an image of a group is known to be a copy.
function evidenceText({ copy_of, is_of_first, verified, evidence }) {
  if (copy_of === undefined) return "";
  const of = is_of_first ? "" : ` (of ${copy_of.split("/").pop()})`;
  return (verified ? evidence.text : "unverified") + of;
}
async function showDuplicates() {
  if (isSearching || isSearched) return;
  isSearching = true;
  const status = byId("duplicates-status");
  let found = {};
  do {
    status.textContent = `Searching … ${Math.round(100 * (found.done ?? 0))} %`;
    if (found.done !== undefined) await new Promise((resolve) => setTimeout(resolve, 500));
    const response = await fetch("/api/duplicates").catch(() => null);
    found = response?.ok ? await response.json() : { error: "no response" };
  } while (found.done !== undefined);
  isSearching = false;
  if (found.error !== undefined) {
    status.textContent = `Search failed: ${found.error}`;
    return;
  }
  isSearched = true;
  const { groups, total, unreadable } = found;
  const shown = total > groups.length ? ` (first ${groups.length} shown)` : "";
  const unverified = found.unverified ? `; ${plural(found.unverified, "pair")} found by embeddings alone` : "";
  const missing = unreadable ? `; ${plural(unreadable, "image")} cannot be read` : "";
  status.textContent = (total ? `${plural(total, "group")}${shown}` : "No duplicates") + unverified + missing;
  const copies = groups.flatMap((images) => images.slice(1).map((image) => image.row));
  byId("select-copies").hidden = !copies.length;
  byId("select-copies").onclick = () => {
    openTab("map");
    select(new Set(copies));
  };
  byId("groups").replaceChildren(...groups.map((images) => {
    const group = newElement("div", "", "group");
    group.append(...images.map((image) => {
      const button = imageButton(image.row, 96, shortName(image));
      button.append(newElement("span", evidenceText(image), "evidence"));
      return button;
    }));
    return group;
  }));
}
async function showOutliers() {
  const outliers = await getJson("/api/outliers?n=120");
  byId("select-outliers").onclick = () => {
    openTab("map");
    select(new Set(outliers.map(({ image }) => image.row)));
  };
  byId("outlier-grid").replaceChildren(...outliers.map(({ score, image }) => {
    const button = imageButton(image.row, 96, shortName(image));
    button.append(score.toFixed(2));
    return button;
  }));
}

// ------------------------------------------------------------------ training curves

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
// Figure with a curve over epochs, from [epoch, value] pairs.
function chart(title, curve) {
  const width = 420, height = 200, left = 44, right = width - 10, top = 8, bottom = height - 24;
  const svg = document.createElementNS(SVG_NAMESPACE, "svg");
  const append = (tag, attributes, content = "") => {
    const child = document.createElementNS(SVG_NAMESPACE, tag);
    for (const [name, value] of Object.entries(attributes)) child.setAttribute(name, value);
    child.textContent = content;
    svg.append(child);
  };
  const latest = curve.at(-1)?.[1].toPrecision(4);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}: ${latest ?? "no value"}`);
  const lastEpoch = Math.max(1, ...curve.map(([epoch]) => epoch));
  const values = curve.map(([, value]) => value);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 1e-9) [low, high] = [low - 1, high + 1];
  const toX = (epoch) => left + epoch / lastEpoch * (right - left);
  const toY = (value) => bottom - (value - low) / (high - low) * (bottom - top);
  for (let tick = 0; tick <= 3; tick++) {
    const value = low + (high - low) * tick / 3;
    append("line", { x1: left, x2: right, y1: toY(value), y2: toY(value) });
    const rounded = Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
    append("text", { x: left - 6, y: toY(value) + 4, "text-anchor": "end" }, rounded);
  }
  append("text", { x: left, y: height - 6 }, "0");
  append("text", { x: right, y: height - 6, "text-anchor": "end" }, `epoch ${Number(lastEpoch.toFixed(1))}`);
  if (curve.length) {
    const corner = ([epoch, value]) => `${toX(epoch).toFixed(1)} ${toY(value).toFixed(1)}`;
    append("path", { d: `M${curve.map(corner).join("L")}` });
  }
  const figure = newElement("figure");
  figure.append(svg, newElement("figcaption", latest ? `${title}: ${latest}` : title));
  return figure;
}
async function showTraining() {
  const { epochs, loss } = await getJson("/api/curves");
  const text = epochs.length ? plural(epochs.at(-1).epoch, "epoch")
    : info.run ? "No epoch has finished yet" : "No training run is attached to these embeddings";
  // Screen readers announce every assignment.
  const status = byId("training-status");
  if (status.textContent !== text) status.textContent = text;
  const metric = (key, factor) =>
    epochs.filter((epoch) => epoch[key] != null).map((epoch) => [epoch.epoch, factor * epoch[key]]);
  const curves = [
    ["Loss", loss],
    ["kNN accuracy (%)", metric("knn", 100)],
    ["RankMe", metric("rankme", 1)],
    ["Projection std", metric("projection_std", 1)],
    ["Mean cosine of projections", metric("projection_cosine", 1)],
  ];
  const drawable = curves.filter(([, curve]) => curve.length > 1);
  byId("curves").replaceChildren(...drawable.map(([title, curve]) => chart(title, curve)));
}

// ------------------------------------------------------------------ tabs

const onOpen = { map: draw, duplicates: showDuplicates, outliers: showOutliers, training: showTraining };
const tabs = Object.keys(onOpen);
function openTab(name, remember = true) {
  if (remember) setAddress(name);
  for (const tab of tabs) {
    byId(tab).hidden = tab !== name;
    byId(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    byId(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
  }
  onOpen[name]();
}
tabs.forEach((tab, position) => {
  byId(`tab-${tab}`).addEventListener("click", () => openTab(tab));
  byId(`tab-${tab}`).addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = tabs[(position + by + tabs.length) % tabs.length];
    byId(`tab-${next}`).focus();
    openTab(next);
  });
});
setInterval(() => { if (!byId("training").hidden) showTraining(); }, 5000);

// ------------------------------------------------------------------ addresses

// `#duplicates`, or `#map/12` for the image in row 12, so that Back and links work.
function setAddress(address) {
  if (location.hash !== `#${address}`) history.pushState(null, "", `#${address}`);
}
function openAddress() {
  const [tab, row] = location.hash.slice(1).split("/");
  openTab(tabs.includes(tab) ? tab : "map", false);
  if (/^\d+$/.test(row ?? "") && Number(row) < count) showImage(Number(row), false);
}
addEventListener("popstate", openAddress);

// ------------------------------------------------------------------ start

updateColorModes();
if (gl) setUpWebGl();
else byId("neighbors").replaceChildren(newElement("p", "The map needs WebGL, which this browser does not offer."));
recolor();
getBytes("/api/scores").then((bytes) => {
  outlierRanks = ranksOf(new Float32Array(bytes));
  if (byId("color").value === "outlier") recolor();
});
orShowError(loadLabels());
if (location.hash) openAddress();
