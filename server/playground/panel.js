// One answer and what was run for it.

import { light, svg } from "./picture.js";
import { count, percent } from "./words.js";

const STAGES = { queue: "waiting", image: "decoding the picture", encode: "vision tower", route: "router", prefill: "prefill", decode: "decoding" };

export class Panel {
  constructor(level, picture) {
    this.level = level;
    this.picture = picture;
    this.root = document.getElementById("panel").content.cloneNode(true).firstElementChild;
    this.root.setAttribute("aria-label", `Level ${level}`);
    this.find("h2").textContent = level;
    this.answer = this.find(".answer");
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  start() {
    this.answer.classList.add("busy");
  }

  stop() {
    this.answer.classList.remove("busy");
  }

  // What ran: the receipt with its detail.
  show({ pruning, usage }) {
    this.stop();
    this.detail = pruning.detail;
    this.total = pruning.visual_tokens_total;
    this.find("h2").textContent = this.level === pruning.level ? this.level : `${this.level}, ran at ${pruning.level}: ${pruning.reason}`;
    this.facts(pruning, usage);
    const points = this.detail.operating_points;
    const chosen = points.findIndex((point) => point.chosen);
    this.at(points[chosen]);
    if (points.length > 1) this.choices(points, chosen);
    this.find(".ran").hidden = false;
  }

  facts(pruning, usage) {
    const seconds = this.detail.seconds;
    const ms = (value) => `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms`;
    const spent = Object.keys(STAGES).filter((stage) => seconds[stage] !== undefined).map((stage) =>
      stage === "encode" && seconds.encode < 0.001 ? "picture remembered" : `${STAGES[stage]} ${ms(seconds[stage])}`);
    const frozen = pruning.frozen_layers ? `, ${pruning.frozen_layers} of them frozen for visual tokens` : "";
    const saved = 1 - pruning.flops_ratio;
    const rows = [
      ["Visual tokens", `${pruning.visual_tokens} of ${pruning.visual_tokens_total}`],
      ["Layers", `${pruning.layers} of ${pruning.layers_total}${frozen}`],
      ["FLOPs saved", saved >= 0 ? percent(saved) : `none: the router costs ${percent(-saved)}`],
      ["Answer stays", pruning.expected_agreement === null ? "" : `${percent(pruning.expected_agreement, 1)} likely, the router expects`],
      ["Tokens", `${count(usage.prompt_tokens, "token")} in, ${usage.completion_tokens} out`],
      ["Time", `${ms(Object.values(seconds).reduce((a, b) => a + b, 0))}: ${spent.join(", ")}`],
    ];
    const nodes = rows.filter(([, text]) => text).flatMap(([name, text]) => {
      const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
      dt.textContent = name;
      dd.textContent = text;
      return [dt, dd];
    });
    this.find("dl").replaceChildren(...nodes);
  }

  // Light the tokens and layers of an operating point.
  at(point) {
    const kinds = new Map(Object.entries(point.layers).flatMap(([kind, layers]) => layers.map((layer) => [layer, kind])));
    const strip = this.find(".strip");
    strip.replaceChildren(...Array.from(kinds.keys()).sort((a, b) => a - b).map((layer) => {
      const cell = document.createElement("span");
      cell.className = kinds.get(layer);
      cell.title = `Layer ${layer + 1}: ${kinds.get(layer)}`;
      return cell;
    }));
    const { run, frozen, skipped } = point.layers;
    strip.setAttribute("aria-label", `${count(run.length, "layer")} run, ${frozen.length} frozen for visual tokens, ${skipped.length} skipped`);
    const picture = this.find(".picture");
    picture.hidden = !this.total || this.detail.tiled;
    if (picture.hidden) return;
    const owners = this.detail.merged_into[point.visual_tokens] ?? Array.from({ length: this.total }, (_, token) => token);
    const say = (text) => (this.find(".token").textContent = text);
    light(picture, this.picture, this.detail.center_crop, owners, this.detail.token_scores, say);
  }

  choices(points, chosen) {
    const order = points.map((point, place) => ({ ...point, place })).sort((a, b) => a.flops_ratio - b.flops_ratio);
    const chart = this.find(".chart");
    const floor = Math.min(0.9, Math.floor(10 * Math.min(...order.map((point) => point.expected_agreement))) / 10);
    const x = (point) => 34 + 270 * Math.min(1, point.flops_ratio / 1.05);
    const y = (point) => 102 - (90 * (point.expected_agreement - floor)) / (1 - floor);
    chart.replaceChildren();
    svg("line", { x1: 34, y1: 102, x2: 310, y2: 102 }, chart);
    svg("line", { x1: 34, y1: 12, x2: 310, y2: 12 }, chart);
    const label = (text, attributes) => (svg("text", attributes, chart).textContent = text);
    label("100 %", { x: 30, y: 15, "text-anchor": "end" });
    label(percent(floor), { x: 30, y: 105, "text-anchor": "end" });
    label("answer stays, against FLOPs →", { x: 34, y: 122 });
    label("100 %", { x: x({ flops_ratio: 1 }), y: 115, "text-anchor": "middle" });
    for (const point of order) svg("circle", { cx: x(point), cy: y(point), r: point.chosen ? 6 : 3.5, class: point.chosen ? "chosen" : "" }, chart);
    const ring = svg("circle", { r: 8, class: "at" }, chart);
    chart.setAttribute("aria-label", `Expected agreement against FLOPs of ${order.length} operating points; the slider reads them out`);

    const slider = this.find("input");
    slider.max = order.length - 1;
    slider.value = order.findIndex((point) => point.place === chosen);
    const tell = () => {
      const point = order[slider.value];
      ring.setAttribute("cx", x(point));
      ring.setAttribute("cy", y(point));
      const layers = point.layers.frozen.length ? `, ${count(point.layers.frozen.length, "layer")} frozen` : "";
      const skipped = point.layers.skipped.length ? `, ${point.layers.skipped.length} skipped` : "";
      const text = `${count(point.visual_tokens, "visual token")}${layers}${skipped}: ${percent(point.flops_ratio)} of the FLOPs, the answer stays with ${percent(point.expected_agreement, 1)}`;
      this.find(".point").textContent = `${text}${point.chosen ? ". This one ran." : "."}`;
      slider.setAttribute("aria-valuetext", text);
    };
    slider.oninput = () => {
      tell();
      this.at(order[slider.value]);
    };
    tell();
    this.find(".points").hidden = false;
  }
}
