"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
// Everything from the data becomes a text node: nothing of it is ever read as HTML.
function el(tag, attributes, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  for (const child of children.flat()) node.append(child instanceof Node ? child : String(child ?? ""));
  return node;
}
const svg = (tag, attributes, ...children) => el(`svg:${tag}`, attributes, ...children);
const isShare = name => D.shares.includes(name);
const shown = (value, name) => value === null || value === undefined ? "" : isShare(name) ? (value * 100).toFixed(1) : value.toFixed(2);
const signed = (value, name) => (value > 0 ? "+" : "") + shown(value, name);
const interval = (f, name) => f.low === null ? "" : ` ${shown(f.low, name)} to ${shown(f.high, name)}`;
const clock = s => s >= 3600 ? `${(s / 3600).toFixed(1)} h` : s >= 60 ? `${(s / 60).toFixed(1)} min` : `${s.toFixed(0)} s`;
const round = value => typeof value === "number" ? +value.toPrecision(4) : value;
const kindOf = model => model.startsWith("round-") ? "round" : model.startsWith("control") ? "control" : model === "oracle" ? "oracle" : "special";
const WORDS = {"objects.f1": "Objects named, F1", "objects.recall": "Objects named, recall", "objects.precision": "Objects named, precision",
  "chair.i": "Objects made up (CHAIR-i)", "captions.relations_true": "Relations in captions", "relation.accuracy": "Relations asked",
  "reading.exact": "Signs read exactly", "pope.f1": "Presence (POPE), F1", "pope.accuracy": "Presence (POPE)", "count.accuracy": "Counts",
  "position.accuracy": "Places", "grounding.accuracy": "Boxes", "color.accuracy": "Colours"};
const main = [...new Set([...(D.recipe.saturation?.metrics || []), ...Object.keys(WORDS)])];
const title = name => WORDS[name] || name;

// A table whose columns sort by a click: numbers as numbers, everything else as text.
function grid(head, rows) {
  const body = el("tbody");
  const fill = list => body.replaceChildren(...list.map(cells => el("tr", {}, cells.map(c => el("td", {}, c)))));
  const plain = c => c instanceof Node ? c.textContent : c;
  const heads = head.map((text, i) => {
    const th = el("th", {class: "sort", scope: "col", tabindex: "0"}, text);
    th.onclick = () => {
      const down = th.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const number = c => parseFloat(String(plain(c)));
      fill([...rows].sort((a, b) => {
        const [x, y] = [a[i], b[i]], [m, n] = [number(x), number(y)];
        const by = Number.isNaN(m) || Number.isNaN(n) ? String(plain(x)).localeCompare(String(plain(y))) : m - n;
        return down ? -by : by;
      }));
    };
    th.onkeydown = event => { if (event.key === "Enter") th.onclick(); };
    return th;
  });
  fill(rows);
  return el("table", {}, el("thead", {}, el("tr", {}, heads)), body);
}

const figure = (f, name) => f ? el("span", {}, shown(f.value, name), el("span", {class: "iv"}, interval(f, name))) : "";
const roundsDone = D.models.filter(m => /^round-[1-9]/.test(m)).length;
const seedsDone = D.seeds.length < D.planned ? `${D.seeds.length} of ${D.planned}` : `${D.planned}`;
const firstSplit = Object.keys(D.metrics)[0], mainMetric = main.find(m => D.metrics[firstSplit][m]) || Object.keys(D.metrics[firstSplit])[0];

// What it came to, in a sentence or two: for who reads nothing else.
function summary() {
  const of = D.metrics[firstSplit][mainMetric] || {}, pairs = D.against[firstSplit] || [];
  const find = (model, other) => pairs.find(p => p.model === model && p.other === other)?.gains[mainMetric];
  const rounds = `${roundsDone} round${roundsDone === 1 ? "" : "s"}`, seeds = `${seedsDone} seed${D.planned === 1 ? "" : "s"}`;
  $("headline").textContent = `${rounds} of self-augmentation, ${seeds}`;
  const told = [], says = (gain, whom) => {
    if (!gain) return;
    const sure = gain.low !== null && (gain.low > 0 || gain.high < 0);
    told.push(`${signed(gain.value, mainMetric)} against ${whom}${gain.low === null ? "" : ` (${shown(gain.low, mainMetric)} to ${shown(gain.high, mainMetric)})`}` +
      (sure ? "" : ", which is within its interval"));
  };
  says(find("best round", "round-0") || find(`round-${roundsDone}`, "round-0"), "round 0");
  says(find("best round", "control-steps"), "the control with the same steps");
  const start = of["round-0"] ? `${title(mainMetric)} began at ${shown(of["round-0"].value, mainMetric)} on the ${firstSplit} split` : "";
  const best = [...new Set(Object.values(D.best))].join(" or ");
  const ends = told.length ? `; ${best ? `the best round, ${best},` : "the last round"} gained ${told.join("; ")}.` : ".";
  const special = find("vila2", "best round");
  const more = special ? ` With the specialists' answers: ${signed(special.value, mainMetric)} over that.` : "";
  $("lead").textContent = start ? start + ends + more : "";
}

function tiles() {
  const total = Object.values(D.cost).reduce((sum, c) => sum + c.seconds, 0);
  const money = Object.values(D.cost).reduce((sum, c) => sum + c.cost, 0);
  const of = D.metrics[firstSplit][mainMetric] || {};
  const best = Object.values(D.best).at(-1);
  const list = [["rounds", roundsDone], ["seeds", seedsDone], ["best round", [...new Set(Object.values(D.best))].join(", ") || "none yet"], ["of work", clock(total)]];
  for (const [model, name] of [["round-0", "round 0"], [`round-${best}`, `round ${best}`], ["oracle", "true captions"], ["vila2", "with specialists"]])
    if (of[model]) list.push([`${title(mainMetric)}, ${name}`, shown(of[model].value, mainMetric)]);
  if (money) list.push(["cost", `${money.toFixed(2)} ${D.currency}`]);
  $("tiles").replaceChildren(...list.map(([name, value]) => el("div", {class: "card tile"}, el("b", {}, value), name)));
}

function bounds(of, models) {
  const ends = models.flatMap(m => [of[m].value, of[m].low ?? of[m].value, of[m].high ?? of[m].value]);
  const [low, high] = [Math.min(...ends), Math.max(...ends)], pad = (high - low) * 0.1 || 0.05;
  return [low - pad, high + pad];
}

// One metric, small: rounds as a line with a band, the others beside it.
function small(name, of) {
  const models = D.models.filter(m => of[m] && !m.startsWith("specialist-") && !m.startsWith("vila2-"));
  const rounds = models.filter(m => kindOf(m) === "round"), others = models.filter(m => kindOf(m) !== "round");
  const [low, high] = bounds(of, models), width = 300, height = 118, left = 34, bottom = height - 22;
  const slots = rounds.length + others.length, x = i => left + 14 + i * (width - left - 28) / Math.max(1, slots - 1 + (others.length ? 0.4 : 0));
  const y = value => bottom - (value - low) / (high - low) * (bottom - 8);
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img"});
  for (const value of [low + (high - low) * 0.1, (low + high) / 2, high - (high - low) * 0.1])
    picture.append(svg("line", {class: "axis", x1: left, x2: width, y1: y(value), y2: y(value)}),
      svg("text", {class: "tick", x: left - 5, y: y(value) + 4, "text-anchor": "end"}, shown(value, name)));
  if (rounds.length > 1 && rounds.every(m => of[m].low !== null)) picture.append(svg("polygon", {class: "band", points: [
    ...rounds.map((m, i) => `${x(i)},${y(of[m].high)}`), ...rounds.map((m, i) => `${x(i)},${y(of[m].low)}`).reverse()].join(" ")}));
  picture.append(svg("polyline", {class: "line k-round", points: rounds.map((m, i) => `${x(i)},${y(of[m].value)}`).join(" ")}));
  models.forEach((model, i) => {
    const f = of[model], kind = kindOf(model), at = x(kind === "round" ? i : i + 0.4), group = svg("g", {class: `k-${kind}`});
    if (f.low !== null && kind !== "round") group.append(svg("line", {class: "whisker", x1: at, x2: at, y1: y(f.low), y2: y(f.high)}));
    if (f.seeds.length > 1) for (const one of f.seeds) if (one >= low && one <= high) group.append(svg("circle", {class: "seed", cx: at, cy: y(one), r: 2}));
    const short = {round: model.replace("round-", ""), control: model.replace("control-", "").slice(0, 6), oracle: "true", special: "VILA²"}[kind];
    group.append(svg("circle", {class: "dot", cx: at, cy: y(f.value), r: 4.5}),
      svg("text", {class: "tick", x: at, y: height - 6, "text-anchor": "middle"}, short), svg("title", {}, `${model}: ${shown(f.value, name)}${interval(f, name)}`));
    picture.append(group);
  });
  const card = el("button", {class: "card small", type: "button", "data-metric": name}, el("span", {class: "title"}, el("b", {}, title(name)),
    el("span", {class: "soft"}, D.better[name] === "lower" ? "\u2193 better" : ""), el("span", {class: "now"}, shown(of[rounds.at(-1)]?.value, name))), picture);
  card.onclick = () => { $("metric").value = name; chart(); $("chart").scrollIntoView({block: "nearest"}); };
  return card;
}

function many() {
  const of = D.metrics[$("split").value], names = main.filter(n => of[n]).slice(0, 9);
  $("many").replaceChildren(...names.map(n => small(n, of[n])));
  const kinds = {round: "rounds", control: "controls: original captions, as many steps or words", oracle: "trained on true captions", special: "with specialists"};
  const there = new Set(D.models.map(kindOf));
  $("legend").replaceChildren(...Object.entries(kinds).filter(([kind]) => there.has(kind)).map(([kind, text]) => el("span", {}, el("i", {class: `k-${kind}`}), text)));
}

function chart() {
  const split = $("split").value, name = $("metric").value, of = D.metrics[split][name] || {};
  for (const card of document.querySelectorAll(".small")) card.classList.toggle("on", card.dataset.metric === name);
  const models = D.models.filter(m => of[m]), [low, high] = bounds(of, models);
  const left = 190, width = 760, step = 30, height = models.length * step + 58;
  const x = value => left + (value - low) / (high - low) * width;
  const picture = svg("svg", {viewBox: `0 0 ${left + width + 190} ${height}`, role: "img", width: "100%"}, svg("text", {x: 0, y: 16, "font-weight": 600}, title(name)));
  for (let i = 0; i <= 4; i++) {
    const value = low + (high - low) * i / 4;
    picture.append(svg("line", {class: "axis", x1: x(value), x2: x(value), y1: 28, y2: height - 24}),
      svg("text", {class: "tick", x: x(value), y: height - 8, "text-anchor": "middle"}, shown(value, name)));
  }
  if (of["round-0"]) picture.append(svg("line", {x1: x(of["round-0"].value), x2: x(of["round-0"].value), y1: 28, y2: height - 24,
    stroke: "currentColor", "stroke-dasharray": "3 4", opacity: 0.5}));
  models.forEach((model, i) => {
    const f = of[model], y = i * step + 46, group = svg("g", {class: `k-${kindOf(model)}`});
    if (f.low !== null) group.append(svg("line", {class: "whisker", x1: x(f.low), x2: x(f.high), y1: y, y2: y}));
    if (f.seeds.length > 1) for (const one of f.seeds) group.append(svg("circle", {class: "seed", cx: x(one), cy: y, r: 3}));
    group.append(svg("circle", {class: "dot", cx: x(f.value), cy: y, r: 6}));
    picture.append(svg("text", {x: 0, y: y + 4}, model), group, svg("text", {x: left + width + 14, y: y + 4}, shown(f.value, name),
      svg("tspan", {class: "tick", dx: 8}, interval(f, name))));
  });
  $("chart").replaceChildren(picture);
}

function metrics() {
  const split = $("split").value, of = D.metrics[split];
  const models = D.models.filter(m => Object.values(of).some(f => f[m]));
  $("metrics").replaceChildren(grid(["metric", ...models], Object.keys(of).map(n => [n, ...models.map(m => figure(of[n][m], n))])));
  // One row a pair of models, one column a metric; what lies beyond its interval is coloured, the more the stronger.
  const pairs = D.against[split], names = main.filter(n => pairs.some(p => p.gains[n]));
  const reach = Math.max(...pairs.flatMap(p => names.filter(n => isShare(n) && p.gains[n]).map(n => Math.abs(p.gains[n].value))), 0.02);
  const cell = (f, name) => {
    if (!f) return "";
    const sure = f.low !== null && (f.low > 0 || f.high < 0), kind = sure ? (f.low > 0 ? "good" : "bad") : "unsure";
    const strong = sure && isShare(name) ? Math.round(10 + 40 * Math.min(1, Math.abs(f.value) / reach)) : 0;
    return el("span", {class: `gain ${kind}`, style: `--strong:${strong}%`}, signed(f.value, name), el("span", {class: "iv"}, interval(f, name)));
  };
  $("gains").replaceChildren(grid(["", ...names.map(title)], pairs.map(p => [`${p.model} over ${p.other}`, ...names.map(n => cell(p.gains[n], n))])));
}

function captions() {
  const keys = [...new Set(Object.values(D.captions).flatMap(c => Object.keys(c)))];
  const most = Object.fromEntries(keys.map(k => [k, Math.max(...Object.values(D.captions).map(c => c[k] ?? 0))]));
  const cell = (c, k) => !(k in c) ? "" : k === "captions" ? c[k] : el("span", {}, round(c[k]), el("span", {class: "meter", style: `width:${most[k] ? 60 * c[k] / most[k] : 0}px`}));
  $("captions").replaceChildren(grid(["written by", ...keys.map(k => k.replace("_", "-"))], Object.entries(D.captions).map(([name, c]) => [name, ...keys.map(k => cell(c, k))])));
}

const lastRound = item => item.texts.filter(t => t.by.startsWith("round-")).at(-1);
function changes(item) {
  const first = item.texts[0], last = lastRound(item);
  if (!last || last.right === null || first.right === null) return {right: [], wrong: []};
  return {right: last.right.filter(n => !first.right.includes(n)), wrong: last.wrong.filter(n => !first.wrong.includes(n))};
}

// The text with the names in it marked where they stand; a name said by another word shows in its chip alone.
function marked(told) {
  const kinds = new Map([...(told.right || []).map(n => [n.toLowerCase(), "good"]), ...(told.wrong || []).map(n => [n.toLowerCase(), "bad"])]);
  if (!kinds.size) return [told.text];
  const names = [...kinds.keys()].sort((a, b) => b.length - a.length).map(n => n.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const pieces = told.text.split(new RegExp(`\\b(${names.join("|")})(?=e?s?\\b)`, "i"));
  return pieces.map((piece, i) => i % 2 ? el("mark", {class: kinds.get(piece.toLowerCase())}, piece) : piece);
}

const ROW = 272;
let items = [];
function row(item, index) {
  const first = item.texts[0];
  const chip = (told, n, kind) => {
    const fresh = told !== first && first[kind === "good" ? "right" : "wrong"] !== null && !first[kind === "good" ? "right" : "wrong"].includes(n);
    return el("span", {class: `chip ${kind}${fresh ? " new" : ""}`}, kind === "good" ? n : el("s", {}, n));
  };
  const texts = item.texts.map(t => el("div", {class: "text"}, el("div", {class: "by"}, t.by, t.status === "ok" ? "" : ` (${t.status})`),
    (t.right || []).map(n => chip(t, n, "good")), (t.wrong || []).map(n => chip(t, n, "bad")), el("p", {}, marked(t))));
  const image = item.image.startsWith("data:image/jpeg;base64,") ? el("img", {src: item.image, alt: ""}) : el("div", {class: "none"});
  return el("div", {class: "row", style: `top:${index * ROW}px`},
    el("div", {class: "pic"}, image, el("div", {class: "key"}, item.truth), el("div", {class: "key soft"}, item.key)), el("div", {class: "texts"}, texts));
}
// Only the rows in sight are in the document, so ten thousand scroll like ten; those that stay in sight are kept.
const inSight = new Map();
function paint() {
  const box = $("gallery"), first = Math.max(0, Math.floor(box.scrollTop / ROW) - 2);
  const end = Math.min(items.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 2);
  for (const [index, node] of inSight) if (index < first || index >= end) { node.remove(); inSight.delete(index); }
  for (let i = first; i < end; i++) if (!inSight.has(i)) { inSight.set(i, row(items[i], i)); $("sizer").append(inSight.get(i)); }
}
// Looked through at every key stroke: made lower case and counted once.
const looked = D.gallery.map(item => {
  const changed = changes(item), last = lastRound(item);
  return {item, text: [item.key, item.truth, ...item.texts.map(t => t.text)].join("\n").toLowerCase(), right: changed.right.length, wrong: changed.wrong.length,
    bad: item.texts.some(t => t.status !== "ok") ? 1 : 0, errs: last?.wrong?.length || 0, long: last?.text.length || 0};
}).sort((a, b) => a.item.key < b.item.key ? -1 : a.item.key > b.item.key ? 1 : 0);
function choose() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), kind = $("filter").value, order = $("order").value;
  const found = looked.filter(one => words.every(w => one.text.includes(w)) && (!kind || one[kind] > 0));
  const by = {right: "right", wrong: "errs", long: "long"}[order];
  if (by) found.sort((a, b) => b[by] - a[by]);
  items = found.map(one => one.item);
  $("count").textContent = `${items.length} of ${D.gallery.length}`;
  $("sizer").style.height = `${items.length * ROW}px`;
  $("sizer").replaceChildren();
  inSight.clear();
  $("gallery").scrollTop = 0;
  paint();
}

function tables() {
  const asked = D.ledger.filter(line => line.kind === "recaption");
  $("errors").replaceChildren(grid(["step", "captions", "ok", "truncated", "repetitive", "errors", "retried", "kinds of error", "captions/s"],
    asked.map(({step, metrics: m}) => [step, m.captions, m.status.ok || 0, m.status.truncated || 0, m.status.repetitive || 0,
      m.status.error || 0, m.rates ? round(m.rates.retried) : "", Object.entries(m.errors).map(([k, n]) => `${k} ${n}`).join(", "),
      m.captions_per_s ? round(m.captions_per_s) : ""])));
  const counted = asked.filter(line => line.metrics.captioner?.images_encoded !== undefined);
  $("encodes-said").textContent = (D.encodes || []).map(text => `${text[0].toUpperCase()}${text.slice(1)}.`).join(" ");
  $("encodes").replaceChildren(grid(["step, in its last sitting", "prompts", "images encoded", "captions from an encode made for another"],
    counted.map(({step, settings, metrics: {captioner: c}}) => [step, (settings?.prompt || []).join(", "), c.images_encoded, c.images_shared])));
  const gpu = Object.values(D.cost).some(c => c.gpu_hours);
  $("cost").replaceChildren(grid(["steps of kind", "number", "time", gpu ? "GPU hours" : "CPU hours", "images", "per 1,000 images (h)", D.currency],
    Object.entries(D.cost).map(([kind, c]) => {
      const hours = gpu ? c.gpu_hours : c.cpu_hours;
      return [kind, c.steps, clock(c.seconds), round(hours), c.images, c.images ? round(hours / c.images * 1000) : "", round(c.cost)];
    })));
  $("ledger").replaceChildren(grid(["step", "finished", "seconds", "device", "came out"],
    D.ledger.map(line => [line.step, line.finished, line.seconds, line.device, line.digest.slice(0, 12)])));
  $("recipe").textContent = JSON.stringify(D.recipe, null, 1);
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
}
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
$("where").textContent = D.out;
for (const split of Object.keys(D.metrics)) $("split").append(el("option", {value: split}, split));
function options() {
  const kept = $("metric").value, names = Object.keys(D.metrics[$("split").value]);
  $("metric").replaceChildren(...names.map(n => el("option", {value: n}, n)));
  $("metric").value = [kept, mainMetric, names[0]].find(n => names.includes(n));
  many(); chart(); metrics();
}
$("split").onchange = options; $("metric").onchange = chart;
for (const id of ["search", "filter", "order"]) $(id).oninput = choose;
$("gallery").onscroll = paint; window.onresize = paint;
summary(); tiles(); options(); captions(); tables(); choose();
