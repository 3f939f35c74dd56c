// The live page: figures from GET v1/aurora/events, and a chat. Counters in points are totals, so rates are differences.
// Whatever comes from the server becomes text nodes, never markup.

import { Fences } from "./fences.js";

const at = (id) => document.getElementById(id);
const SOURCES = ["target", "draft", "lookup", "memory"]; // the order of `sources` in points
const NAMES = { target: "target’s own", draft: "draft", lookup: "lookup", memory: "memory" };
const KINDS = { chat: "chat", completion: "text completion", fim: "fill in the middle", edit: "edit" };
const MIN_ROUNDS = 12; // fewer rounds say nothing about the accepted length; as in serve/http/history.py
const MAX_POINTS = 360;
const state = { points: [], events: [], report: null, first_lengths: {} };

// -- numbers and elements ---------------------------------------------------------------------------------------------

const number = (value, digits = 0) =>
  value == null || !Number.isFinite(value)
    ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value, digits = 0) => (value == null ? "–" : `${number(100 * value, digits)} %`);
const clock = (time) => new Date(1000 * time).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = (time) => new Date(1000 * time).toLocaleDateString("en-GB", { day: "numeric", month: "short" });
const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);
const milliseconds = (seconds) => (seconds == null ? "–" : `${number(1000 * seconds, seconds < 0.1 ? 1 : 0)} ms`);

// 1234 → "21 min"; less than ten of a unit with a digit more.
function duration(seconds) {
  const [unit, name] = [[3600, "h"], [60, "min"], [1, "s"]].find(([least]) => Math.abs(seconds) >= least) ?? [1, "s"];
  return `${number(seconds / unit, Math.abs(seconds / unit) < 9.95 ? 1 : 0)} ${name}`;
}

// A value by a name that a client chose: it may be that of a member of every object.
const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);

function make(tag, { text, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text != null) element.textContent = text;
  element.append(...children);
  return element;
}

function show(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

// -- windows of the history -------------------------------------------------------------------------------------------

// The last point that is at least `seconds` older than points[end]; the first one if there is none.
function before(end, seconds) {
  const { points } = state;
  let index = end;
  while (index > 0 && points[end].time - points[index].time < seconds) index -= 1;
  return points[index];
}

// The index of a point that leaves the smallest gap, for its age; as in serve/http/history.py.
function leastMissed(now) {
  const { points } = state;
  const gap = (index) => (points[index + 1].time - points[index - 1].time) / (now - points[index].time + 60);
  let best = 1;
  for (let index = 2; index < points.length - 1; index += 1) if (gap(index) < gap(best)) best = index;
  return best;
}

const lengthOf = (drafts, accepted) => (drafts >= MIN_ROUNDS ? 1 + accepted / drafts : null);

// Accepted length between two points; of one of the `domains` or `kinds`, or of all.
function acceptedLength(from, to, name, traffic = "domains") {
  if (name == null) return lengthOf(to.drafts - from.drafts, to.accepted - from.accepted);
  const [, drafts, accepted] = own(to[traffic], name) ?? [0, 0, 0];
  const [, draftsBefore, acceptedBefore] = own(from[traffic], name) ?? [0, 0, 0];
  return lengthOf(drafts - draftsBefore, accepted - acceptedBefore);
}

function tokensPerSecond(from, to) {
  const seconds = to.time - from.time;
  return seconds > 0 ? (sum(to.sources) - sum(from.sources)) / seconds : null;
}

function againstPlain(from, to) {
  const [plain, took] = to.against_plain.map((value, index) => value - from.against_plain[index]);
  return took > 0.3 ? plain / took : null;
}

// The accepted length of the first minute with enough rounds; of one domain, or of all.
const firstLength = (domain = "") => own(state.first_lengths, domain);

function meanLatency(from, to, name) {
  const [seconds, count] = to.latencies[name].map((value, index) => value - from.latencies[name][index]);
  return count ? seconds / count : null;
}

// -- charts -----------------------------------------------------------------------------------------------------------

function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text != null) element.textContent = text;
  return element;
}

function niceStep(span, most) {
  const rough = span / most, power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
}

const DAY = 86400;
const TIME_STEPS = [10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, DAY / 2, DAY, 2 * DAY, 7 * DAY, 30 * DAY];

// A step of the time axis of at least so many seconds.
const timeStepOf = (least) =>
  TIME_STEPS.find((seconds) => seconds >= least) ?? 30 * DAY * 2 ** Math.ceil(Math.log2(least / (30 * DAY)));

function timeLabel(time, step) {
  if (step >= DAY || clock(time) === "00:00:00") return day(time);
  return step < 60 ? clock(time) : clock(time).slice(0, 5);
}

// series: {name, label, kind, values: [[time, value or null]]}; the last one is drawn on top. marks: [[time, text]].
function drawChart(id, { series, marks = [], base, digits, empty, summary }) {
  const box = at(id), width = box.clientWidth, height = box.clientHeight;
  const known = series.flatMap(({ values }) => values).filter(([, value]) => value != null);
  if (known.length < 2 || !width) {
    box.replaceChildren(make("p", { class: "empty", text: empty }));
    return;
  }
  const labels = series.some(({ label }) => label);
  const left = 34, right = width - (labels ? Math.min(110, width / 4) : 4), top = 18, bottom = height - 22;
  const first = state.points[0].time, span = Math.max(1, state.points.at(-1).time - first);
  const values = known.map(([, value]) => value);
  let low = base === 0 ? 0 : Math.min(...values), high = Math.max(...values);
  const step = niceStep(Math.max(high - low, base === 0 ? 1 : 0.2), height > 180 ? 5 : 3);
  low = Math.floor(low / step) * step;
  high = Math.max(low + step, Math.ceil(high / step) * step);
  const x = (time) => left + ((time - first) / span) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  const svg = drawn("svg", { role: "img", "aria-label": summary, viewBox: `0 0 ${width} ${height}` });
  for (let value = low; value < high + step / 2; value += step) {
    svg.append(drawn("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, number(value, digits(step))));
  }
  const timeStep = timeStepOf((90 * span) / Math.max(1, right - left));
  const zone = (time) => 60 * new Date(1000 * time).getTimezoneOffset(); // not the same in summer and winter
  for (let local = Math.ceil((first - zone(first)) / timeStep) * timeStep; local + zone(local) <= first + span; local += timeStep) {
    const time = local + zone(local), anchor = x(time) > width - 30 ? "end" : x(time) < left + 10 ? "start" : "middle";
    svg.append(drawn("text", { x: x(time), y: height - 4, "text-anchor": anchor }, timeLabel(time, timeStep)));
  }
  let lastText = -Infinity;
  for (const [time, text] of marks) {
    svg.append(drawn("line", { class: "swap", x1: x(time), x2: x(time), y1: top - 4, y2: bottom }));
    if (x(time) - lastText < 28) continue;
    svg.append(drawn("text", { class: "strong", x: x(time), y: top - 8, "text-anchor": "middle" }, text));
    lastText = x(time);
  }
  const ends = [];
  for (const { kind, values: points, label } of series) {
    let path = "", area = "", begun = null, last = null;
    for (const [time, value] of points) {
      if (value == null) {
        if (begun != null) area += `L${last[0]},${bottom}L${begun},${bottom}Z`;
        begun = null;
        continue;
      }
      const point = [x(time).toFixed(1), y(value).toFixed(1)];
      path += `${begun == null ? "M" : "L"}${point}`;
      area += `${begun == null ? "M" : "L"}${point}`;
      begun ??= point[0];
      last = point;
    }
    if (last == null) continue;
    if (begun != null) area += `L${last[0]},${bottom}L${begun},${bottom}Z`;
    if (kind === "main" && base === 0) svg.append(drawn("path", { class: "area", d: area }));
    svg.append(drawn("path", { class: kind, d: path }));
    if (label) ends.push({ at: Number(last[1]), label, kind });
  }
  ends.sort((one, other) => one.at - other.at);
  ends.forEach((end, index) => {
    if (index) end.at = Math.max(end.at, ends[index - 1].at + 15); // labels do not cover each other
    svg.append(drawn("text", { class: end.kind === "main" ? "strong" : "name", x: right + 8, y: end.at + 4 }, end.label));
  });
  box.replaceChildren(svg);
}

// What `measure(from, to)` gives in a sliding window that ends at each point.
function course(measure, window) {
  return state.points.map((point, index) => [point.time, index ? measure(before(index, window), point) : null]);
}

const versionNumber = (version) => Number(version?.match(/^draft-(\d+)$/)?.[1] ?? 0); // 0: the starting draft

function drawCharts(domains) {
  const { points, events } = state, span = points.at(-1).time - points[0].time;
  const marks = events
    .filter(({ kind }) => kind === "swapped" || kind === "rolled_back")
    .map(({ kind, time, version, to }) => [time, kind === "swapped" ? versionNumber(version) : `↩${versionNumber(to)}`]);
  const smooth = Math.min(120, Math.max(15, span / 12));
  const cut = (name) => (name.length > 14 ? `${name.slice(0, 13)}…` : name);
  const all = course((from, to) => acceptedLength(from, to), smooth);
  const now = all.at(-1)[1] ?? all.findLast(([, value]) => value != null)?.[1];
  drawChart("length-chart", {
    series: [
      ...domains.slice(0, 5).map(({ name }) => ({ kind: "other", label: cut(name), values: course((from, to) => acceptedLength(from, to, name), smooth) })),
      { kind: "main", label: "all traffic", values: all },
    ],
    marks,
    digits: (step) => (step < 0.1 ? 2 : step < 1 ? 1 : 0),
    empty: "No rounds with proposals yet. Ask something in the chat.",
    summary: `Accepted length over ${number(span / 60, 1)} minutes, now ${number(now, 2)}; ${marks.length} drafts were swapped in.`,
  });
  const speed = course(tokensPerSecond, Math.max(4, span / 120));
  const plain = course((from, to) => {
    const ratio = againstPlain(from, to) ?? againstPlain(state.points[0], to); // where few rounds can be compared
    return ratio == null ? null : tokensPerSecond(from, to) / ratio;
  }, Math.max(10, span / 60));
  const peak = Math.max(0, ...speed.map(([, value]) => value ?? 0));
  drawChart("speed-chart", {
    series: [{ kind: "main", values: speed }, { kind: "other dashed", values: plain }],
    base: 0,
    digits: () => 0,
    empty: "Nothing was generated yet.",
    summary: `Tokens a second over ${number(span / 60, 1)} minutes, at most ${number(peak)}.`,
  });
}

// -- figures ----------------------------------------------------------------------------------------------------------

// The last minute if it has what `measure` needs, else all that is remembered.
function recent(measure, seconds = 60) {
  const end = state.points.length - 1, minute = measure(before(end, seconds), state.points[end]);
  return minute == null ? [measure(state.points[0], state.points[end]), "since the start"] : [minute, "last minute"];
}

function showFigures() {
  const { points, report } = state, last = points.length - 1;
  const speed = tokensPerSecond(before(last, 5), points[last]) ?? 0;
  const [ratio, when] = recent(againstPlain);
  show("speed", number(speed));
  const isIdle = speed < 0.5;
  show("speed-note", isIdle ? "idle now" : ratio ? `plain decoding: about ${number(speed / ratio)}` : "over 5 seconds");
  show("plain", ratio == null ? "–" : `${number(ratio, 2)}×`);
  show("plain-note", ratio == null ? "no plain round was timed yet" : `in decoding, ${when}`);
  const { savings } = report, money = (amount) => number(amount, 2);
  show("saved", duration(savings.seconds_today));
  const since = day(Date.parse(`${savings.since}T00:00`) / 1000); // without a time it would be UTC's day
  show("saved-note", savings.price_per_hour == null
    ? `${duration(savings.seconds)} since ${since}`
    : `worth ${money(savings.worth_today)}; ${duration(savings.seconds)} since ${since}, worth ${money(savings.worth)}`);
  const [length, lengthWhen] = recent((from, to) => acceptedLength(from, to));
  const first = firstLength();
  show("length", number(length, 2));
  show("length-note", length == null ? "tokens a round" : `tokens a round, ${lengthWhen}` + (first == null ? "" : `; ${number(first, 2)} at first`));
  const { draft, learner } = report;
  const serving = versionNumber(draft.version), learned = `${number(learner.positions)} positions learned`;
  show("version", draft.version ? `No. ${serving}` : "none");
  show("version-note", serving ? `${learned}, ${draft.swaps} swap${draft.swaps === 1 ? "" : "s"}` : `the starting draft; ${learned}`);
}

function showSources() {
  const { points } = state;
  const counted = (from, to) => {
    const counts = to.sources.map((value, index) => value - from.sources[index]);
    return sum(counts) ? counts : null;
  };
  const [counts, when] = recent(counted);
  const since = points.at(-1).sources, total = sum(since);
  show("source-note", counts == null ? "nothing generated yet" : `${when}, of ${number(sum(counts))} tokens`);
  const bar = at("source-bar"), list = at("sources");
  if (!bar.children.length) {
    for (const source of ["draft", "lookup", "memory", "target"]) {
      bar.append(make("i", { class: source }));
      list.append(make("div", {}, make("dt", {}, make("i", { class: `swatch ${source}` }), NAMES[source]), make("dd", { id: `share-${source}` })));
    }
  }
  [...bar.children].forEach((part) => {
    const index = SOURCES.indexOf(part.className);
    const share = counts == null ? 0 : counts[index] / sum(counts);
    part.style.flexGrow = share;
    at(`share-${part.className}`).replaceChildren(
      counts == null ? "–" : percent(share), " ", make("span", { text: total ? `${percent(since[index] / total)} in all` : "" }));
  });
}

// Rows of a table of `domains` or `kinds`, whose totals are `served`.
function trafficRows(traffic, served) {
  const { points } = state;
  const [shares, when] = recent((from, to) => {
    const tokens = Object.entries(to[traffic]).map(([name, [count]]) => [name, count - (own(from[traffic], name)?.[0] ?? 0)]);
    const total = sum(tokens.map(([, count]) => count));
    return total ? new Map(tokens.map(([name, count]) => [name, count / total])) : null;
  });
  const heat = points.at(-1).heat;
  const rows = Object.keys(served).map((name) => {
    const [length, lengthWhen] = recent((from, to) => acceptedLength(from, to, name, traffic));
    return { name, share: shares?.get(name) ?? 0, length, lengthWhen, heat: own(heat, name)?.[1] };
  });
  rows.sort((one, other) => other.share - one.share || (other.length ?? 0) - (one.length ?? 0));
  return { rows, when: shares ? when : "" };
}

const gauge = (value, label) => make("meter", { min: 0, max: 1, value, "aria-label": label });

// The cells that both tables begin with: name, share of tokens, accepted length.
const trafficCells = (name, { share, length, lengthWhen }, when) => [
  make("th", { scope: "row", text: name, title: name }),
  make("td", {}, gauge(share, `share of ${name}`), percent(share)),
  make("td", { class: "number" },
    make("span", { class: "muted", text: length == null || lengthWhen === when ? "" : `${lengthWhen} ` }), number(length, 2)),
];

function showDomains({ rows, when }) {
  show("domain-note", rows.length ? when : "no request has been answered yet");
  at("domains").replaceChildren(
    ...rows.slice(0, 12).map((row) =>
      make("tr", {}, ...trafficCells(row.name, row, when),
        make("td", { class: "number muted", text: number(firstLength(row.name), 2) }),
        make("td", {}, ...(row.heat == null ? ["–"] : [gauge(row.heat, `heat of ${row.name}`), number(row.heat, 2)])),
      )),
  );
}

function showKinds() {
  const served = Object.fromEntries(Object.entries(state.report.kinds).filter(([, { requests }]) => requests));
  const { rows, when } = trafficRows("kinds", served);
  show("kind-note", rows.length ? when : "no request has been answered yet");
  at("kinds").replaceChildren(
    ...rows.map((row) =>
      make("tr", {}, ...trafficCells(KINDS[row.name], row, when),
        make("td", { class: "number", text: number(served[row.name].requests) }))),
  );
}

const score = ({ challenger, champion }) =>
  challenger == null ? "" : `gate: ${number(challenger, 3)} against ${number(champion, 3)} tokens a round`;
const DESCRIPTIONS = {
  published: (event) => [`${event.version} passed the gate`, score(event)],
  held_back: (event) => ["A challenger was held back", score(event)],
  swapped: (event) => [`${event.version} serves`, event.count > 1 ? `${event.count} swaps` : "swapped in between two rounds"],
  rolled_back: (event) => [`${event.version} was rolled back`, event.reason],
  refused: (event) => [`${event.version} could not be served`, event.reason],
  alarm: (event) => [`${event.version} is worse for one client`, event.reason],
  shift: (event) => ["Traffic shifted", event.reason],
  learner: (event) => [`The learner is ${event.state}`, event.reason],
  worker: (event) => [`The engine is ${event.state}`, event.reason],
};

// With the date, unless that is today's.
const moment = (time) => (day(time) === day(Date.now() / 1000) ? clock(time) : `${day(time)} ${clock(time).slice(0, 5)}`);

function showEvents() {
  const { events, report } = state, { draft, learner } = report;
  show("drafts-note", `${learner.gate.published} published, ${learner.gate.refused} held back, ${draft.rollbacks} rolled back${draft.gain ? `; ${draft.gain}` : ""}`);
  const shown = events.slice(-40).reverse();
  // Numbers begin again when the server starts anew; times get a date at midnight.
  const newest = [shown[0]?.number, shown[0]?.time, day(Date.now() / 1000)].join();
  const list = at("events");
  if (list.dataset.newest === newest) return;
  list.dataset.newest = newest;
  const bad = new Set(["rolled_back", "refused", "alarm"]);
  list.replaceChildren(
    ...(shown.length
      ? shown.map((event) => {
          const [what, why] = DESCRIPTIONS[event.kind](event);
          return make("li", { class: `${event.kind} ${bad.has(event.kind) ? "bad" : ""}` },
            make("time", { text: moment(event.time), datetime: new Date(1000 * event.time).toISOString() }),
            make("span", { class: "mark", "aria-hidden": "true" }),
            make("span", {}, what, make("span", { class: "muted", text: why ? `  ${why}` : "" })));
        })
      : [make("li", { class: "muted", text: "" }, make("span"), make("span"), "Nothing yet. A draft is published when it beats the served one on held-out requests.")]),
  );
}

function facts(id, rows) {
  at(id).replaceChildren(...rows.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]));
}

// A row of facts whose name says of what time its value is.
const dated = (name, [value, when], format) => [value == null ? name : `${name}, ${when}`, format(value)];

function showLearner() {
  const { report } = state, { learner, traces } = report;
  const rate = recent((from, to) => (to.time - from.time > 3 && from.learner[2] > 0 ? (60 * (to.learner[0] - from.learner[0])) / (to.time - from.time) : null));
  const activity = learner.activity && learner.state === "running" ? `: ${learner.activity}` : "";
  show("learner-note", learner.state + activity + (learner.error ? `; ${learner.error}` : ""));
  facts("learner", [
    ["Share of the processor", percent(learner.compute_share, 1)],
    ["Learning rate", `×${number(learner.domains.rate_factor, 2)}`],
    dated("Positions a minute", rate, number),
    ["Optimiser steps", number(learner.steps)],
    ["Shifts of traffic", number(learner.domains.shifts)],
    ["Traces waiting", number(traces.ring?.queued)],
  ]);
}

function showService() {
  const { report } = state, { queue, round_ms: round, memory } = report;
  const mean = (name) => recent((from, to) => meanLatency(from, to, name));
  facts("service", [
    ["Running, waiting", `${queue.running}, ${queue.waiting}`],
    ["In flight, of at most", `${queue.in_flight} / ${queue.max_queue}`],
    dated("First token", mean("time_to_first_token"), milliseconds),
    dated("Each further token", mean("inter_token_latency"), milliseconds),
    ["Round, median and p99, last 2,048", `${number(round.p50, 1)}, ${number(round.p99, 1)} ms`],
    ["Memory", memory.capacity_tokens ? `${number(memory.answers)} answers, ${percent(memory.tokens / memory.capacity_tokens)} full` : "off"],
  ]);
}

function render() {
  if (!state.points.length || document.hidden) return;
  const domains = trafficRows("domains", state.report.domains.served);
  show("model", state.report.model);
  showFigures();
  drawCharts(domains.rows);
  showSources();
  showDomains(domains);
  showKinds();
  showEvents();
  showLearner();
  showService();
}

// -- streams ----------------------------------------------------------------------------------------------------------

const KEY = "aurora-api-key";
const SILENCE_S = 10; // samples and heartbeats come every second or more often
const authorized = () => {
  const key = sessionStorage.getItem(KEY);
  // Headers are bytes, a character each; the server reads them as UTF-8.
  return key ? { Authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}` } : {};
};

// The events of a response: [name, data as text]. Calls `heard` for each part that comes.
async function* serverEvents(response, heard = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const field = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      yield [field("event"), field("data")];
    }
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

function say(kind, text) {
  document.body.className = kind;
  show("state-text", text);
}

function askForKey(message) {
  at("key-form").hidden = false;
  at("main").hidden = true;
  show("key-error", message);
  at("key").focus();
  return new Promise((resolve) => {
    at("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, at("key").value);
      at("key").value = "";
      resolve();
    };
  });
}

// What is wrong with the engine; null: nothing.
function troubleOf({ state, error, heartbeat_age_s: age_s }) {
  if (state === "ready" && age_s < SILENCE_S) return null;
  if (error != null || state !== "ready") return error ?? `the engine is ${state}`;
  return `the engine gave no sign of life for ${10 * Math.floor(age_s / 10)} s`; // screen readers read each new text
}

async function watch() {
  let wait_s = 1;
  for (;;) {
    let problem = "the server closed the connection";
    const connection = new AbortController();
    let timer;
    const heard = () => { // a connection may die without a close
      clearTimeout(timer);
      timer = setTimeout(() => connection.abort(), 1000 * SILENCE_S);
    };
    try {
      heard();
      const response = await fetch("v1/aurora/events", { headers: authorized(), cache: "no-store", signal: connection.signal });
      if (response.status === 401) {
        const message = sessionStorage.getItem(KEY) ? await errorOf(response) : "";
        say("lost", "locked");
        await askForKey(message);
        continue;
      }
      if (!response.ok) throw new Error(await errorOf(response));
      at("key-form").hidden = true;
      at("main").hidden = false;
      for await (const [name, data] of serverEvents(response, heard)) {
        const message = JSON.parse(data);
        if (name === "history") Object.assign(state, message);
        else {
          state.points.push(message.point);
          if (state.points.length > MAX_POINTS) state.points.splice(leastMissed(message.point.time), 1);
          state.events = [...state.events, ...message.events].slice(-200);
          state.report = message.report;
          state.first_lengths = message.first_lengths;
        }
        const trouble = troubleOf(state.report.worker);
        say(trouble == null ? "live" : "lost", trouble ?? "live");
        wait_s = 1;
        queueMicrotask(render); // outside of this try: its errors are not the connection's
      }
    } catch (error) {
      problem = connection.signal.aborted ? `nothing came for ${SILENCE_S} s` : error.message;
    } finally {
      clearTimeout(timer);
      connection.abort(); // else one whose events cannot be read stays open
    }
    say("lost", `no connection (${problem}); trying again`);
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait_s));
    wait_s = Math.min(2 * wait_s, 15);
  }
}

// -- chat -------------------------------------------------------------------------------------------------------------

const IDEAS = ["Write SQL that counts orders per customer.", "Write a short poem about autumn.", "Explain photosynthesis to a child."];
const conversation = [];
let running = null; // the AbortController of the answer that is being received

function showIdeas() {
  const ideas = IDEAS.map((text) => {
    const button = make("button", { class: "idea", type: "button", text });
    button.onclick = () => ask(text);
    return button;
  });
  at("log").replaceChildren(make("div", { class: "ideas" }, make("p", { class: "muted", text: "Each token gets the colour of its source." }), ...ideas));
}

function randomSalt() {
  return btoa(String.fromCharCode(...crypto.getRandomValues(new Uint8Array(24))));
}

function bodyOf(messages) {
  return {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    return_token_sources: true,
    temperature: Number(at("temperature").value),
    max_tokens: 400,
    speculate: at("speculate").checked,
    ...(at("memory").checked ? {} : { cache_salt: randomSalt() }),
  };
}

// A block of code with a button that copies it; where the browser does not let it (no HTTPS), it selects the code.
function codeBlock(language) {
  const code = make("code"), copy = make("button", { type: "button", class: "quiet", text: "Copy" });
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  };
  const head = make("div", { class: "head" }, make("span", { class: "muted", text: language }), copy);
  return [make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, code)), code];
}

// An answer as it arrives: its text in spans by source, code in blocks, and what it came to.
class Answer {
  constructor(log) {
    this.text = "";
    this.counts = { draft: 0, lookup: 0, memory: 0, target: 0 };
    this.element = make("div", { class: "answer" });
    this.block = this.element; // where text goes now
    this.fences = new Fences((text, source) => this.write(text, source), (language) => this.turn(language));
    this.meta = make("p", { class: "meta", text: "reading the prompt" });
    log.append(this.element, this.meta);
  }

  add(sources) {
    this.started ??= performance.now();
    if (this.text === "" && this.firstTokens == null) this.firstTokens = sources.length;
    for (const { text, source } of sources) {
      this.counts[source] += 1;
      this.text += text;
      this.fences.push(text, source);
    }
    this.describe();
  }

  write(text, source) {
    const last = this.block.lastChild;
    if (last?.className === source) last.append(text);
    else this.block.append(make("span", { class: source, title: NAMES[source], text }));
  }

  // Code begins, or has ended (null).
  turn(language) {
    this.block = this.element;
    if (language == null) return;
    const [block, code] = codeBlock(language);
    this.element.append(block);
    this.block = code;
  }

  describe(metrics) {
    const total = sum(Object.values(this.counts)), seconds = (performance.now() - this.started) / 1000;
    const speed = seconds > 0 ? (total - this.firstTokens) / seconds : null; // the first tokens came with the prompt's end
    const parts = [make("b", { text: `${number(speed)} tokens/s` })];
    if (metrics) parts.push(`, ${number(total)} tokens`);
    if (metrics?.num_spec_steps) parts.push(", accepted length ", make("b", { text: number(metrics.mean_acceptance_length, 2) }));
    if (metrics) {
      const shares = Object.entries(this.counts).filter(([, count]) => count);
      parts.push(make("br"), shares.map(([source, count]) => `${NAMES[source]} ${count}`).join(" · "));
    }
    this.meta.replaceChildren(...parts);
  }

  fail(message) {
    this.meta.replaceChildren(make("span", { class: "warn", role: "alert", text: message }));
  }
}

async function ask(text) {
  if (running || !text.trim()) return;
  const log = at("log");
  if (!conversation.length) log.replaceChildren();
  const turn = { role: "user", content: text };
  conversation.push(turn);
  log.append(make("p", { class: "user", text }));
  const answer = new Answer(log);
  const follow = () => { log.scrollTop = log.scrollHeight; };
  follow();
  running = new AbortController();
  at("send").textContent = "Stop";
  log.setAttribute("aria-busy", "true");
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorized() },
      body: JSON.stringify(bodyOf(conversation)),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const [, data] of serverEvents(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const sources = chunk.choices[0]?.token_sources ?? [];
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      if (sources.length) answer.add(sources);
      if (chunk.metrics) answer.describe(chunk.metrics.speculative_decoding);
      if (isAtEnd) follow();
    }
    show("spoken", `Answer: ${answer.text}`);
  } catch (error) {
    if (error.name === "AbortError") answer.meta.append(", stopped");
    else answer.fail(error.message);
  }
  answer.fences.end();
  // Templates want turns that alternate, so a question without an answer goes. All may have been cleared meanwhile.
  if (conversation.at(-1) === turn) {
    if (answer.text) conversation.push({ role: "assistant", content: answer.text });
    else conversation.pop();
  }
  log.setAttribute("aria-busy", "false");
  at("send").textContent = "Send";
  running = null;
}

at("chat-form").onsubmit = (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = at("prompt").value;
  at("prompt").value = "";
  ask(text);
};
at("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !running) {
    event.preventDefault();
    at("chat-form").requestSubmit();
  }
};
at("clear").onclick = () => {
  running?.abort();
  conversation.length = 0;
  showIdeas();
  at("prompt").focus();
};
document.addEventListener("visibilitychange", render);
new ResizeObserver(render).observe(at("length-chart"));
showIdeas();
watch();
