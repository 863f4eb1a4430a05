// The status page: asks for v1/plan once a tick and draws it. It loads nothing from elsewhere.
"use strict";

const OUTLOOK = 10; // ticks ahead
const GROUPS_SHOWN = 32;
const NODES_SHOWN = 64;
const COLOURS = ["#2f6fb0", "#d9822b", "#2e9e5b", "#a347ba", "#d0453a", "#159e9e", "#8a6d3b", "#5b5bd6"];
const at = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const charts = {};
let chosen = "total";
let answered = 0;

// --- pure: what to draw, from the plan ---

function digits(value) {
  if (value === null || value === undefined) return "-";
  const places = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return String(Number(value.toFixed(places)));
}

function clock(seconds) {
  return new Date(1000 * seconds).toTimeString().slice(0, 8);
}

function percent(value) {
  return value === null ? "-" : `${Math.round(100 * value) || 0} %`; // no -0
}

// Rows for uPlot: times in seconds, what came, what was forecast for it, its P90. The last ones are to come.
function loadRows(history, name) {
  const series = history.series[name];
  const ahead = series.outlook_mean.length;
  const times = Array.from({ length: history.ticks + ahead }, (_, k) => (history.first_ms + k * history.step_ms) / 1000);
  const more = Array(ahead).fill(null);
  const p90 = series.p90.length ? series.p90.concat(series.outlook_p90) : Array(times.length).fill(null);
  return [times, series.load.concat(more), series.mean.concat(series.outlook_mean), p90];
}

function priceRows(history) {
  const times = Array.from({ length: history.ticks }, (_, k) => (history.first_ms + k * history.step_ms) / 1000);
  return [times, ...Object.values(history.prices)];
}

// What each node is to a group: "held", "add", "drop" or "none".
function cells(group, nodes, steps) {
  const changes = new Map(steps.filter((step) => step[0] === group.group).map((step) => [step[1], step[2]]));
  return nodes.map((_, node) => {
    if (changes.has(node)) return changes.get(node) ? "add" : "drop";
    return group.holders.includes(node) ? "held" : "none";
  });
}

function stateOf(plan) {
  const table = plan.table;
  if (table === null) return ["bad", plan.problem || "no routing table was published yet"];
  const age = (plan.now_ms - table.issued_ms) / 1000;
  const told = `${plan.balancer} ${plan.software}: table ${table.fencing_epoch}:${table.counter}, ${age.toFixed(1)} s old, ` +
    `tick ${plan.ticks}, manifest ${plan.cluster_serial}`;
  const out = Object.entries(plan.series_problems).map(([name, why]) => `without the series ${name}: ${why}`);
  const problems = [plan.problem, ...out].filter(Boolean);
  return problems.length ? ["bad", `${told}; ${problems.join("; ")}`] : ["", told];
}

// --- drawing ---

function fill(body, rows) {
  body.replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    line.replaceChildren(...row.map((cell) => {
      const box = document.createElement("td");
      if (cell instanceof Node) box.append(cell);
      else box.textContent = cell;
      return box;
    }));
    return line;
  }));
}

function draw(id, series, rows) {
  const shape = series.map((each) => each.label).join("\n");
  let chart = charts[id];
  if (chart && chart.shape === shape) {
    chart.plot.setData(rows);
    return;
  }
  if (chart) chart.plot.destroy();
  const line = dark ? "#333c46" : "#e4e9ef";
  const axis = { stroke: dark ? "#98a5b3" : "#5d6b7a", grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
  const plot = new uPlot({
    width: at(id).clientWidth || 900,
    height: 240,
    series: [{ label: "at", value: (_, time) => (time === null ? "-" : clock(time)) }, ...series],
    axes: [{ ...axis, space: 90, values: (_, times) => times.map(clock) }, { ...axis, size: 64 }],
    scales: { y: { range: (_, low, high) => [0, (high || 1) * 1.1] } },
  }, rows, at(id));
  charts[id] = { plot, shape };
}

function drawLoad(plan) {
  const names = Object.keys(plan.history.series);
  const select = at("class");
  if (names.join("\n") !== [...select.options].map((each) => each.value).join("\n")) {
    if (!names.includes(chosen)) chosen = "total";
    select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  }
  draw("load", [
    { label: "load /s", stroke: COLOURS[0], width: 2 },
    { label: "forecast /s", stroke: COLOURS[1], width: 2, dash: [6, 4] },
    { label: "P90 /s", stroke: COLOURS[1], width: 1, dash: [2, 3] },
  ], loadRows(plan.history, chosen));
  fill(at("classes").tBodies[0], plan.classes.map((each) => [
    each.name, digits(each.load), digits(each.mean), digits(each.p90), digits(each.outlook_mean[OUTLOOK - 1]), each.model,
    digits(each.error.mase), percent(each.error.coverage), percent(each.error.bias),
  ]));
}

function drawNodes(plan) {
  const names = Object.keys(plan.history.prices);
  draw("prices", names.map((name, k) => ({ label: name, stroke: COLOURS[k % COLOURS.length], width: 1.5 })),
    priceRows(plan.history));
  fill(at("nodes").tBodies[0], plan.nodes.map((each) => [
    each.name, each.up ? "up" : "silent", String(each.queue), digits(each.price), percent(each.utilisation),
  ]));
  for (const row of at("nodes").tBodies[0].rows) row.cells[1].className = row.cells[1].textContent === "up" ? "" : "bad";
}

function drawMatrix(plan) {
  const { groups, steps, text } = plan.placement;
  const nodes = plan.nodes.slice(0, NODES_SHOWN);
  const less = [
    groups.length > GROUPS_SHOWN ? `the ${GROUPS_SHOWN} hottest of ${groups.length} groups` : "",
    plan.nodes.length > NODES_SHOWN ? `the first ${NODES_SHOWN} of ${plan.nodes.length} nodes` : "",
  ].filter(Boolean);
  at("plan").textContent = less.length ? `${text}. Shown: ${less.join(", ")}.` : text;
  const head = document.createElement("tr");
  for (const name of ["group", "load /s", ...nodes.map((each) => each.name)]) {
    const box = document.createElement("th");
    box.textContent = name;
    if (head.cells.length > 1) box.className = "node";
    head.append(box);
  }
  at("matrix").tHead.replaceChildren(head);
  fill(at("matrix").tBodies[0], groups.slice(0, GROUPS_SHOWN).map((group) => [
    String(group.group), digits(group.load),
    ...cells(group, nodes, steps).map((kind, node) => {
      const box = document.createElement("i");
      box.className = `cell ${kind}`;
      box.title = `group ${group.group}, ${nodes[node].name}: ${kind}`;
      return box;
    }),
  ]));
}

function drawTable(plan) {
  const table = plan.table;
  const left = (table.expires_ms - plan.now_ms) / 1000;
  const moved = table.groups.length ? `${table.groups.length} groups are not where the manifest has them` : "all groups are where the manifest has them";
  at("table").textContent = `Service times in microseconds. Expires in ${left.toFixed(0)} s; ${moved}.`;
  const nodes = plan.nodes.slice(0, NODES_SHOWN);
  const head = document.createElement("tr");
  for (const name of ["class", "cap", ...nodes.map((each) => each.name)]) {
    const box = document.createElement("th");
    box.textContent = name;
    head.append(box);
  }
  at("service").tHead.replaceChildren(head);
  fill(at("service").tBodies[0], table.classes.map((name, row) => [
    name, percent(table.caps[row]), ...table.service_us[row].slice(0, NODES_SHOWN).map(digits),
  ]));
}

function show(plan) {
  const [kind, text] = stateOf(plan);
  at("state").className = kind;
  at("state").textContent = text;
  at("cluster").textContent = plan.cluster;
  if (plan.history !== null) {
    drawLoad(plan);
    drawNodes(plan);
    drawMatrix(plan);
    drawTable(plan);
  }
  answered += 1;
  document.body.dataset.frames = String(answered);
  window.plan = plan;
}

async function follow() {
  let wait = 1000;
  try {
    // Not relative to the document: its address may have a user and password in it, which fetch refuses.
    const answer = await fetch(`${location.origin}/v1/plan`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`the balancer answers ${answer.status}`);
    const plan = await answer.json();
    wait = Math.max(1000, plan.tick_ms);
    show(plan);
  } catch (error) {
    at("state").className = "bad";
    at("state").textContent = `The balancer does not answer, what is shown is old (${error.message})`;
    document.body.dataset.away = "1";
  }
  setTimeout(follow, wait);
}

at("class").addEventListener("change", (event) => {
  chosen = event.target.value;
  if (window.plan && window.plan.history) drawLoad(window.plan);
});
addEventListener("resize", () => {
  for (const [id, { plot }] of Object.entries(charts)) plot.setSize({ width: at(id).clientWidth, height: 240 });
});
follow();
