// The page of `byol explore`. The map is drawn by WebGL; everything else is plain elements.

const $ = (id) => document.getElementById(id);
const get = async (url) => {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  return answer;
};

addEventListener("unhandledrejection", (e) => { $("about").textContent = `failed: ${e.reason?.message ?? e.reason}`; });

// Pictures are kept by the browser under their address, and the next program on this port has others under the same numbers.
const stamp = Date.now().toString(36);
const thumb = (i, px) => `/thumb/${i}?px=${px}&of=${stamp}`;

const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#4f5bd5",
  "#f2b134", "#12866b", "#b0413e", "#7a5195", "#a05d56", "#d0743c", "#5da5da", "#60bd68", "#b2912f", "#f15854"];
const GREY = "#9aa4b2";
const NONE = 65535;
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const colourOf = (i) => (i === NONE || i < 0 ? GREY : COLOURS[i % COLOURS.length]);

const must = (answer) => answer.catch((e) => { $("about").textContent = `cannot load: ${e.message}`; throw e; });
const info = await (await must(get("/api/info"))).json();
const n = info.images;
$("about").textContent = `${n.toLocaleString()} images, ${info.map} map; loading …`;

// ------------------------------------------------------------------ data

const raw = new DataView(await (await must(get("/api/points"))).arrayBuffer());
const x = new Float32Array(n), y = new Float32Array(n), label = new Int32Array(n);
for (let i = 0; i < n; i++) {
  x[i] = raw.getFloat32(12 * i, true);
  y[i] = raw.getFloat32(12 * i + 4, true);
  label[i] = raw.getUint32(12 * i + 8, true);
}
let shade = null;              // rank of each image's outlier score, once it is computed
let cluster = null;            // class of each image by k-means, once asked for
let answer = null;             // class of each image by the probe
const given = new Map();       // image -> class, by hand
const classes = [];            // names of the classes given by hand
let current = -1;              // the class that a click gives
let selected = new Set();
let chosen = -1;

$("about").textContent = `${n.toLocaleString()} images${info.classes.length ? `, ${info.classes.length} classes` : ""}${info.data ? ` of ${info.data}` : ""}, ${info.map} map`;

// A grid over the map, to find the image under the pointer without looking at all.
const SIDE = Math.max(1, Math.ceil(Math.sqrt(n / 4)));
const cell = (v) => Math.min(SIDE - 1, Math.max(0, Math.floor((v + 1) / 2 * SIDE)));
const cells = new Map();
for (let i = 0; i < n; i++) {
  const key = cell(y[i]) * SIDE + cell(x[i]);
  if (!cells.has(key)) cells.set(key, []);
  cells.get(key).push(i);
}
function nearestTo(px, py, reach) {
  let best = -1, least = reach * reach;
  for (let r = cell(py - reach); r <= cell(py + reach); r++)
    for (let c = cell(px - reach); c <= cell(px + reach); c++)
      for (const i of cells.get(r * SIDE + c) ?? []) {
        const d = (x[i] - px) ** 2 + (y[i] - py) ** 2;
        if (d < least) [best, least] = [i, d];
      }
  return best;
}

// ------------------------------------------------------------------ map

const canvas = $("points"), over = $("over");
const gl = canvas.getContext("webgl", { antialias: true });
const view = { x: 0, y: 0, zoom: 0.95 };
let program, places, colourBuffer, uniform, waiting = false;
// Where no hardware draws, every so many-th point alone while the map moves, and all of them when it rests.
let thin = 1, drawnAt = -Infinity, resting = 0;

function shader(kind, text) {
  const s = gl.createShader(kind);
  gl.shaderSource(s, text);
  gl.compileShader(s);
  if (!gl.getShaderParameter(s, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(s));
  return s;
}
function start() {
  program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER, `
    attribute vec2 place; attribute vec3 colour; uniform vec2 middle, scale; uniform float size; varying vec3 c;
    void main() { gl_Position = vec4((place - middle) * scale, 0.0, 1.0); gl_PointSize = size; c = colour; }`));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `
    precision mediump float; varying vec3 c;
    void main() { float r = length(gl_PointCoord - 0.5); if (r > 0.5) discard; gl_FragColor = vec4(c * 0.8, 0.8) * (1.0 - smoothstep(0.4, 0.5, r)); }`));
  gl.linkProgram(program);
  gl.useProgram(program);
  const xy = new Float32Array(2 * n);
  for (let i = 0; i < n; i++) [xy[2 * i], xy[2 * i + 1]] = [x[i], y[i]];
  const attribute = (name, data, size, kind, norm) => {
    const buffer = gl.createBuffer(), at = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(at);
    return { buffer, everyNth: (nth) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.vertexAttribPointer(at, size, kind, norm, nth * size * data.BYTES_PER_ELEMENT, 0);
    } };
  };
  places = attribute("place", xy, 2, gl.FLOAT, false);
  colourBuffer = attribute("colour", new Uint8Array(3 * n), 3, gl.UNSIGNED_BYTE, true);
  uniform = Object.fromEntries(["middle", "scale", "size"].map((u) => [u, gl.getUniformLocation(program, u)]));
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
}

const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => paint());

function paint() {
  const how = $("colour").value, colours = new Uint8Array(3 * n), faded = dark.matches ? 60 : 200;
  legend(how);
  if (!gl) return;
  const table = COLOURS.map(rgb), grey = rgb(GREY);
  for (let i = 0; i < n; i++) {
    let c = grey;
    if (how === "outlier") {
      if (shade) c = [60 + 180 * shade[i], 90 + 40 * (1 - shade[i]), 200 * (1 - shade[i]) + 30];
    } else {
      const of = how === "label" ? label[i] : how === "cluster" ? cluster?.[i] ?? NONE : given.get(i) ?? answer?.[i] ?? NONE;
      if (of !== NONE && of >= 0) c = table[of % table.length];
    }
    if (selected.size && !selected.has(i)) c = c.map((v) => faded + (v - faded) * 0.15);
    colours.set(c, 3 * i);
  }
  gl.bindBuffer(gl.ARRAY_BUFFER, colourBuffer.buffer);
  gl.bufferData(gl.ARRAY_BUFFER, colours, gl.DYNAMIC_DRAW);
  draw();
}
function ranks(values) {
  const order = Array.from(values.keys()).sort((a, b) => values[a] - values[b]), rank = new Float32Array(n);
  order.forEach((i, r) => { rank[i] = r / Math.max(1, n - 1); });
  return rank;
}
function legend(how) {
  const names = how === "label" ? info.classes : how === "answer" ? classes : how === "cluster" && cluster ? [...Array(1 + cluster.reduce((a, b) => Math.max(a, b), 0)).keys()].map((i) => `cluster ${i + 1}`) : [];
  const items = names.slice(0, 24).map((name, i) => dotted(colourOf(i), name));
  if (names.length > 24) items.push(text("li", `and ${names.length - 24} more`));
  if (how === "outlier") items.push(...(shade ? [dotted("#3c7ae6", "like others"), dotted("#f05a1e", "unlike others")] : [text("li", "computing …")]));
  if (how === "cluster" && !cluster) items.push(text("li", "computing …"));
  $("legend").replaceChildren(...items);
}
const text = (tag, words, kind) => Object.assign(document.createElement(tag), { textContent: words, className: kind ?? "" });
function dotted(colour, words) {
  const item = text("li", ""), dot = text("span", "", "dot");
  dot.style.background = colour;
  item.append(dot, words);
  return item;
}

const aspect = () => canvas.clientWidth / Math.max(1, canvas.clientHeight);
const scale = () => (aspect() >= 1 ? [view.zoom / aspect(), view.zoom] : [view.zoom, view.zoom * aspect()]);
const toScreen = (px, py) => { const [sx, sy] = scale(); return [((px - view.x) * sx + 1) / 2 * canvas.clientWidth, (1 - (py - view.y) * sy) / 2 * canvas.clientHeight]; };
const toMap = (px, py) => { const [sx, sy] = scale(); return [(2 * px / canvas.clientWidth - 1) / sx + view.x, (1 - 2 * py / canvas.clientHeight) / sy + view.y]; };
const reach = () => 12 * 2 / Math.max(canvas.clientWidth, 1) / scale()[0];

function draw() {
  if (!gl || waiting) return;
  waiting = true;
  requestAnimationFrame((now) => {
    waiting = false;
    const took = now - drawnAt, moving = took < 300;
    drawnAt = now;
    if (moving && took > 45 && n / thin > 4000) thin = Math.min(16, 2 * thin);
    else if (moving && took < 20 && thin > 1) thin /= 2;
    const nth = moving ? thin : 1;
    clearTimeout(resting);
    if (nth > 1) resting = setTimeout(() => { drawnAt = -Infinity; draw(); }, 350);
    const ratio = window.devicePixelRatio || 1, w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== w || canvas.height !== h) for (const c of [canvas, over]) [c.width, c.height] = [w, h];
    gl.viewport(0, 0, w, h);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform2f(uniform.middle, view.x, view.y);
    gl.uniform2f(uniform.scale, ...scale());
    const crowd = Math.sqrt(canvas.clientWidth * canvas.clientHeight / Math.max(1, n)) / 2.2;
    gl.uniform1f(uniform.size, Math.min(14, Math.max(2.5, crowd) * Math.min(4, Math.max(1, Math.sqrt(view.zoom)))) * ratio);
    places.everyNth(nth);
    colourBuffer.everyNth(nth);
    gl.drawArrays(gl.POINTS, 0, Math.ceil(n / nth));
    marks(ratio);
  });
}
let lassoLine = null;
function marks(ratio) {
  const ink = over.getContext("2d");
  ink.setTransform(ratio, 0, 0, ratio, 0, 0);
  ink.clearRect(0, 0, over.width, over.height);
  ink.strokeStyle = getComputedStyle(document.body).color;
  ink.lineWidth = 2;
  const ring = (i, r) => { const [sx, sy] = toScreen(x[i], y[i]); ink.beginPath(); ink.arc(sx, sy, r, 0, 2 * Math.PI); ink.stroke(); };
  if (chosen >= 0) ring(chosen, 9);
  ink.lineWidth = 1;
  for (const i of given.keys()) ring(i, 6);
  if (lassoLine?.length > 1) {
    ink.setLineDash([5, 4]);
    ink.beginPath();
    lassoLine.forEach(([px, py], k) => { const s = toScreen(px, py); k ? ink.lineTo(...s) : ink.moveTo(...s); });
    ink.closePath();
    ink.stroke();
    ink.setLineDash([]);
  }
}
function zoomAt(factor, px, py) {
  const before = toMap(px, py);
  view.zoom = Math.min(400, Math.max(0.5, view.zoom * factor));
  const after = toMap(px, py);
  view.x += before[0] - after[0];
  view.y += before[1] - after[1];
  draw();
}
const zoom = (factor) => zoomAt(factor, canvas.clientWidth / 2, canvas.clientHeight / 2);
const whole = () => { Object.assign(view, { x: 0, y: 0, zoom: 0.95 }); draw(); };

// Pointers: one pans or draws, two pinch.
const pointers = new Map();
let moved = 0, pinch = 0;
const at = (e) => { const box = canvas.getBoundingClientRect(); return [e.clientX - box.left, e.clientY - box.top]; };
const lassoing = () => $("lasso").getAttribute("aria-pressed") === "true";
canvas.addEventListener("webglcontextlost", (e) => e.preventDefault());
canvas.addEventListener("webglcontextrestored", () => { start(); paint(); });
canvas.addEventListener("pointerdown", (e) => {
  if (e.button !== 0 || e.ctrlKey) return;
  canvas.setPointerCapture(e.pointerId);
  pointers.set(e.pointerId, at(e));
  $("tip").hidden = true;
  moved = pointers.size > 1 ? Infinity : 0; // behind a pinch nothing is a click
  if (pointers.size === 2) { const [a, b] = [...pointers.values()]; pinch = Math.hypot(a[0] - b[0], a[1] - b[1]); lassoLine = null; }
  else if (pointers.size === 1 && lassoing()) lassoLine = [toMap(...at(e))];
});
canvas.addEventListener("pointermove", (e) => {
  // Lifted where we were not told, as over a menu.
  if (pointers.has(e.pointerId) && !e.buttons) { pointers.delete(e.pointerId); lassoLine = null; }
  const here = at(e), before = pointers.get(e.pointerId);
  if (!before) return hover(here);
  pointers.set(e.pointerId, here);
  moved += Math.hypot(here[0] - before[0], here[1] - before[1]);
  if (pointers.size === 2) {
    // The middle of the fingers moves by half of what this one does.
    const [p, q] = [toMap(...before), toMap(...here)];
    view.x += (p[0] - q[0]) / 2;
    view.y += (p[1] - q[1]) / 2;
    const [a, b] = [...pointers.values()], wide = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (pinch > 0) zoomAt(wide / pinch, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    pinch = wide;
  } else if (lassoLine) {
    const [ax, ay] = toScreen(...lassoLine.at(-1));
    if (Math.hypot(here[0] - ax, here[1] - ay) >= 4) { lassoLine.push(toMap(...here)); draw(); }
  } else {
    const [a, b] = [toMap(...before), toMap(...here)];
    view.x += a[0] - b[0];
    view.y += a[1] - b[1];
    draw();
  }
});
const lift = (e) => {
  if (!pointers.delete(e.pointerId)) return;
  const line = lassoLine;
  lassoLine = null;
  if (line) draw();
  if (line && moved >= 5) {
    if (e.type === "pointerup" && line.length > 2) select(inside(line));
  } else if (moved < 5 && e.type === "pointerup") {
    const i = nearestTo(...toMap(...at(e)), reach());
    if (i >= 0) click(i);
  }
};
canvas.addEventListener("pointerup", lift);
canvas.addEventListener("pointercancel", lift);
canvas.addEventListener("pointerleave", () => { $("tip").hidden = true; });
canvas.addEventListener("wheel", (e) => { e.preventDefault(); zoomAt(Math.exp(-e.deltaY * 0.0015), ...at(e)); }, { passive: false });
new ResizeObserver(draw).observe(canvas);

let hovered = -1, soon;
function hover([px, py]) {
  const tip = $("tip"), i = nearestTo(...toMap(px, py), reach());
  tip.hidden = i < 0;
  if (i < 0) { hovered = -1; return; }
  const left = px > canvas.clientWidth - 180 ? px - 130 : px + 14, top = py > canvas.clientHeight - 160 ? py - 140 : py + 14;
  [tip.style.left, tip.style.top] = [`${left}px`, `${top}px`];
  if (i === hovered) return;
  hovered = i;
  tip.querySelector("span").textContent = "";
  tip.querySelector("img").removeAttribute("src");
  // Not for every image that the pointer crosses.
  clearTimeout(soon);
  soon = setTimeout(async () => {
    if (hovered !== i) return;
    tip.querySelector("img").src = thumb(i, 96);
    const row = await (await get(`/api/row/${i}`)).json();
    if (hovered === i) tip.querySelector("span").textContent = name(row);
  }, 60);
}
const name = (row) => row.path.split(/[\\/]/).slice(-2).join("/") + (row.label ? ` (${row.label})` : "");

function inside(line) {
  const found = new Set();
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [a, b] of line) [x0, x1, y0, y1] = [Math.min(x0, a), Math.max(x1, a), Math.min(y0, b), Math.max(y1, b)];
  for (let i = 0; i < n; i++) {
    if (x[i] < x0 || x[i] > x1 || y[i] < y0 || y[i] > y1) continue;
    let within = false;
    for (let a = 0, b = line.length - 1; a < line.length; b = a++) {
      const [ax, ay] = line[a], [bx, by] = line[b];
      if ((ay > y[i]) !== (by > y[i]) && x[i] < (bx - ax) * (y[i] - ay) / (by - ay) + ax) within = !within;
    }
    if (within) found.add(i);
  }
  return found;
}
function select(rows) {
  selected = rows;
  $("selection").textContent = rows.size ? `${rows.size.toLocaleString()} selected` : "";
  $("save").hidden = $("clear").hidden = !rows.size;
  paint();
}

canvas.addEventListener("keydown", (e) => {
  const step = 0.1 / view.zoom, keys = {
    ArrowLeft: () => { view.x -= step; draw(); }, ArrowRight: () => { view.x += step; draw(); },
    ArrowUp: () => { view.y += step; draw(); }, ArrowDown: () => { view.y -= step; draw(); },
    "+": () => zoom(1.3), "=": () => zoom(1.3), "-": () => zoom(1 / 1.3), 0: whole,
    n: () => walk(1), p: () => walk(-1), Enter: () => chosen >= 0 && click(chosen), l: () => $("lasso").click(),
    Escape: () => select(new Set()),
  };
  const act = keys[e.key.length === 1 ? e.key.toLowerCase() : e.key];
  if (act && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); act(); }
});
// From left to right, as they lie on the map.
const order = Array.from(x.keys()).sort((a, b) => x[a] - x[b]), place = new Int32Array(n);
order.forEach((i, k) => { place[i] = k; });
function walk(by) { show(order[chosen < 0 ? 0 : (place[chosen] + by + n) % n]); }

// ------------------------------------------------------------------ one image and its neighbours

function picture(i, px, words) {
  const button = document.createElement("button"), img = document.createElement("img");
  img.src = thumb(i, px);
  img.alt = words;
  img.loading = "lazy";
  button.title = words;
  button.append(img);
  // The button may go away: the map keeps the focus.
  button.addEventListener("click", () => { tab("map"); canvas.focus({ preventScroll: true }); show(i); });
  return button;
}
async function show(i) {
  chosen = i;
  const [sx, sy] = toScreen(x[i], y[i]);
  if (sx < 0 || sy < 0 || sx > canvas.clientWidth || sy > canvas.clientHeight) [view.x, view.y] = [x[i], y[i]];
  draw();
  const [row, near] = await Promise.all([get(`/api/row/${i}`), get(`/api/near/${i}?n=24`)].map(async (a) => (await a).json()));
  if (chosen !== i) return;
  const large = document.createElement("img");
  large.className = "large";
  large.src = thumb(i, 256);
  large.alt = name(row);
  const grid = text("div", "", "grid");
  for (const { cosine, of } of near) {
    const button = picture(of.row, 96, `${name(of)}, cosine ${cosine.toFixed(3)}`);
    button.append(cosine.toFixed(2));
    grid.append(button);
  }
  $("said").textContent = row.path + (row.label ? `  (${row.label})` : "");
  $("chosen").replaceChildren(large, text("p", "Nearest"), grid);
}

// ------------------------------------------------------------------ labelling

function click(i) {
  if (current >= 0) {
    given.get(i) === current ? given.delete(i) : given.set(i, current);
    ask();
  }
  show(i);
}
$("new-class").addEventListener("submit", (e) => {
  e.preventDefault();
  const named = $("class-name").value.trim();
  if (!named) return;
  let at = classes.indexOf(named);
  if (at < 0 && classes.length < 256) at = classes.push(named) - 1;
  current = at;
  $("class-name").value = "";
  list();
});
function list() {
  $("given").replaceChildren(...classes.map((c, k) => {
    const item = document.createElement("li"), button = document.createElement("button"), dot = text("span", "", "dot");
    dot.style.background = colourOf(k);
    button.append(dot, `${c} (${[...given.values()].filter((v) => v === k).length})`);
    button.setAttribute("aria-pressed", String(k === current));
    button.addEventListener("click", () => { current = current === k ? -1 : k; list(); $("given").children[k].firstChild.focus(); });
    item.append(button);
    return item;
  }));
}
let asked = 0;
async function ask() {
  const mine = ++asked;
  list();
  $("save-labels").hidden = !given.size;
  if (!given.size) { answer = null; $("probe-says").textContent = ""; return paint(); }
  const reply = await fetch("/api/probe", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ rows: [...given] }) }).catch(() => null);
  if (mine !== asked) return;
  if (!reply?.ok) { $("probe-says").textContent = "the probe has no answer"; return paint(); }
  const got = (await reply.json()).answers;
  if (mine !== asked) return;
  answer = got;
  const counts = classes.map((c, k) => `${c} ${answer.filter((v) => v === k).length.toLocaleString()}`);
  $("probe-says").textContent = `All images: ${counts.join(", ")}.${agreement()}`;
  $("colour").value = "answer";
  paint();
}
// Where the classes given by hand are called as the data's own, how many answers are right.
function agreement() {
  const own = classes.map((c) => info.classes.indexOf(c));
  let right = 0, all = 0;
  for (let i = 0; i < n; i++) if (!given.has(i) && own.includes(label[i])) { all++; right += own[answer[i]] === label[i]; }
  return all ? ` ${(100 * right / all).toFixed(1)} % of ${all.toLocaleString()} right by the data's labels.` : "";
}
function download(file, words) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([words], { type: "text/plain" }));
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
let known;
async function paths(rows) {
  known ??= (await (await get("/api/paths")).json()).paths;
  return rows.map((i) => known[i]);
}
const quoted = (s) => `"${String(s).replaceAll('"', '""')}"`;
$("save").addEventListener("click", async () => download("selection.txt", (await paths([...selected])).join("\n") + "\n"));
$("save-labels").addEventListener("click", async () => {
  const by = new Map(given), said = answer, rows = [...Array(n).keys()];
  if (!said) return;
  const all = await paths(rows);
  const lines = rows.map((i) => [quoted(all[i]), quoted(classes[by.get(i) ?? said[i]]), by.has(i) ? "given" : "answer"].join(","));
  download("labels.csv", ["path,label,by", ...lines].join("\n") + "\n");
});
$("clear").addEventListener("click", () => select(new Set()));
$("lasso").addEventListener("click", () => $("lasso").setAttribute("aria-pressed", String(!lassoing())));
$("closer").addEventListener("click", () => zoom(1.3));
$("farther").addEventListener("click", () => zoom(1 / 1.3));
$("whole").addEventListener("click", whole);
$("colour").addEventListener("change", async () => {
  paint();
  if ($("colour").value === "cluster" && !cluster) {
    cluster = (await (await get("/api/clusters")).json()).clusters;
    paint();
  }
});

// ------------------------------------------------------------------ other pages

let duplicatesTimer, searched;
async function duplicates() {
  const share = Number($("threshold").value);
  if (share === searched) return;
  searched = share;
  $("duplicates-say").textContent = "searching …";
  const answer = await fetch(`/api/duplicates?threshold=${share}`).catch(() => null);
  if (share !== searched) return;
  if (!answer?.ok) {
    searched = undefined;
    // Another search is under way.
    if (answer?.status === 429) { clearTimeout(duplicatesTimer); duplicatesTimer = setTimeout(duplicates, 1000); return; }
    $("duplicates-say").textContent = "the search failed";
    return;
  }
  const { groups, all } = await answer.json();
  if (share !== searched) return;
  $("duplicates-say").textContent = all ? `${all.toLocaleString()} groups${all > groups.length ? `, the first ${groups.length}` : ""}` : "none";
  $("groups").replaceChildren(...groups.map((g) => {
    const line = text("div", "", "group");
    line.append(...g.map((row) => picture(row.row, 96, name(row))));
    return line;
  }));
}
$("threshold").addEventListener("input", () => {
  $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
  clearTimeout(duplicatesTimer);
  duplicatesTimer = setTimeout(duplicates, 300);
});
async function strange() {
  const rows = await (await get("/api/outliers?n=120")).json();
  $("strange").replaceChildren(...rows.map(({ score, of }) => {
    const button = picture(of.row, 96, name(of));
    button.append(score.toFixed(2));
    return button;
  }));
}
const NS = "http://www.w3.org/2000/svg";
function chart(title, points) {
  const figure = document.createElement("figure"), svg = document.createElementNS(NS, "svg");
  const [W, H, L, B, T, R] = [420, 200, 44, 24, 8, 10];
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.setAttribute("role", "img");
  const last = points[points.length - 1];
  svg.setAttribute("aria-label", `${title}: ${last ? last[1].toPrecision(4) : "no value"}`);
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x0, x1] = [0, Math.max(1, ...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (y1 - y0 < 1e-9) [y0, y1] = [y0 - 1, y1 + 1];
  const px = (v) => L + (v - x0) / (x1 - x0) * (W - L - R), py = (v) => H - B - (v - y0) / (y1 - y0) * (H - B - T);
  const put = (tag, attributes, words) => {
    const e = document.createElementNS(NS, tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (words) e.textContent = words;
    svg.append(e);
  };
  for (let k = 0; k <= 3; k++) {
    const v = y0 + (y1 - y0) * k / 3;
    put("line", { x1: L, x2: W - R, y1: py(v), y2: py(v) });
    put("text", { x: L - 6, y: py(v) + 4, "text-anchor": "end" }, Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(3));
  }
  put("text", { x: L, y: H - 6 }, "0");
  put("text", { x: W - R, y: H - 6, "text-anchor": "end" }, `epoch ${Number(x1.toFixed(1))}`);
  if (points.length) put("path", { d: points.map(([a, b], k) => `${k ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`).join("") });
  figure.append(svg, text("figcaption", `${title}${last ? `, now ${last[1].toPrecision(4)}` : ""}`));
  return figure;
}
async function training() {
  const { epochs, loss } = await (await get("/api/curves")).json();
  const says = epochs.length ? `${epochs.at(-1).epoch} epochs` : info.run ? "No epoch has ended yet." : "These embeddings are of no run: no curves.";
  if ($("training-says").textContent !== says) $("training-says").textContent = says;
  const of = (key, factor) => epochs.filter((e) => e[key] != null).map((e) => [e.epoch, factor * e[key]]);
  const all = [["loss", loss], ["kNN, %", of("knn", 100)], ["RankMe", of("rankme", 1)],
    ["deviation of the projections", of("projection_std", 1)], ["cosine of different images' projections", of("projection_cosine", 1)]];
  $("curves").replaceChildren(...all.filter(([, p]) => p.length > 1).map(([t, p]) => chart(t, p)));
}
const opened = { map: draw, duplicates, outliers: strange, training };
const tabs = Object.keys(opened);
function tab(which) {
  for (const t of tabs) {
    $(t).hidden = t !== which;
    $(`tab-${t}`).setAttribute("aria-selected", String(t === which));
    $(`tab-${t}`).tabIndex = t === which ? 0 : -1;
  }
  opened[which]();
}
tabs.forEach((t, k) => {
  $(`tab-${t}`).addEventListener("click", () => tab(t));
  $(`tab-${t}`).addEventListener("keydown", (e) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (by) { const next = tabs[(k + by + tabs.length) % tabs.length]; $(`tab-${next}`).focus(); tab(next); }
  });
});
setInterval(() => { if (!$("training").hidden) training(); }, 5000);

if (!info.classes.length) $("colour").value = "outlier";
if (gl) start();
paint();
get("/api/scores").then((a) => a.arrayBuffer()).then((b) => { shade = ranks(new Float32Array(b)); if ($("colour").value === "outlier") paint(); });
if (!gl) $("chosen").replaceChildren(text("p", "This browser has no WebGL: the map cannot be drawn; the other pages work."));
