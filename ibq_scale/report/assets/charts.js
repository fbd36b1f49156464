"use strict";
// Draws every figure.chart from the JSON beside it, and enlarges pictures. Axis (steps, images, minutes) and theme are page-wide choices.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const AXES = [
    { name: "steps", of: (p) => p[0] },
    { name: "images", of: (p) => p[1] },
    { name: "minutes", of: (p) => p[2] / 60 },
  ];
  const MARGIN = { left: 50, right: 10, top: 8, bottom: 32 };
  let axis = AXES[0];

  const node = (name, attributes, parent) => {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.appendChild(made);
    return made;
  };

  const text = (value) => {
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    if (size !== 0 && size < 1e-3) return value.toExponential(1);
    return `${+value.toPrecision(4)}`;
  };

  const ticks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) || raw;
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(+v.toPrecision(12));
    return found;
  };

  const logTicks = (low, high) => {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of [1, 2, 5]) {
        const v = m * 10 ** e;
        if (v >= low * 0.999 && v <= high * 1.001) found.push(v);
      }
    return found.length > 7 ? found.filter((v) => String(v.toExponential())[0] === "1") : found;
  };

  class Chart {
    constructor(figure) {
      this.data = JSON.parse(figure.querySelector("script").textContent);
      this.plot = figure.querySelector(".plot");
      this.hidden = new Set();
      this.log = false;
      this.tip = document.createElement("div");
      this.tip.className = "tip";
      this.tip.hidden = true;
      this.legend(figure);
      new ResizeObserver(() => this.draw()).observe(this.plot);
      this.plot.addEventListener("pointermove", (e) => this.hover(e));
      this.plot.addEventListener("pointerleave", () => this.leave());
    }

    legend(figure) {
      const row = document.createElement("div");
      row.className = "legend";
      for (const series of this.data.series) {
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-pressed", "true");
        const mark = document.createElement("i");
        mark.style.color = `var(--s${series.slot % 8})`;
        button.append(mark, series.name);
        button.onclick = () => {
          if (!this.hidden.delete(series)) this.hidden.add(series);
          button.setAttribute("aria-pressed", String(!this.hidden.has(series)));
          this.draw();
        };
        row.append(button);
      }
      if (this.data.series.every((s) => s.points.every((p) => p[3] > 0))) {
        const log = document.createElement("button");
        log.type = "button";
        log.className = "log";
        log.textContent = "log";
        log.setAttribute("aria-pressed", "false");
        log.onclick = () => {
          this.log = !this.log;
          log.setAttribute("aria-pressed", String(this.log));
          this.draw();
        };
        row.append(log);
      }
      figure.append(row);
    }

    draw() {
      const width = this.plot.clientWidth, height = this.plot.clientHeight;
      this.shown = this.data.series.filter((s) => !this.hidden.has(s) && s.points.length);
      this.plot.replaceChildren(this.tip);
      if (!this.shown.length || !width) return;
      const svg = node("svg", { viewBox: `0 0 ${width} ${height}` });
      this.plot.prepend(svg);
      const points = this.shown.flatMap((s) => s.points);
      const xs = points.map(axis.of), ys = points.map((p) => p[3]);
      const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
      let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
      if (!this.log) {
        if (this.data.top !== null) [y0, y1] = [0, this.data.top];
        else { const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06; y0 -= room; y1 += room; if (Math.min(...ys) >= 0 && y0 < 0) y0 = 0; }
      } else if (y0 === y1) { y0 /= 2; y1 *= 2; }
      const scale = this.log ? Math.log : (v) => v;
      const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
      this.x = (v) => MARGIN.left + ((v - x0) / (x1 - x0 || 1)) * (right - MARGIN.left);
      this.y = (v) => bottom - ((scale(v) - scale(y0)) / (scale(y1) - scale(y0) || 1)) * (bottom - MARGIN.top);
      for (const v of this.log ? logTicks(y0, y1) : ticks(y0, y1, 4)) {
        node("line", { class: "grid", x1: MARGIN.left, x2: right, y1: this.y(v), y2: this.y(v) }, svg);
        node("text", { x: MARGIN.left - 6, y: this.y(v) + 4, "text-anchor": "end" }, svg).textContent = text(v);
      }
      for (const v of x1 > x0 ? ticks(x0, x1, Math.max(2, width / 110)) : [x0])
        node("text", { x: this.x(v), y: bottom + 15, "text-anchor": "middle" }, svg).textContent = text(v);
      node("text", { x: right, y: height - 3, "text-anchor": "end" }, svg).textContent = axis.name;
      if (this.data.unit) node("text", { x: MARGIN.left, y: height - 3 }, svg).textContent = this.data.unit;
      for (const s of this.shown) this.line(svg, s);
      this.cross = node("line", { class: "cross", y1: MARGIN.top, y2: bottom, visibility: "hidden" }, svg);
    }

    line(svg, s) {
      const colour = `var(--s${s.slot % 8})`;
      const at = s.points.map((p) => `${this.x(axis.of(p)).toFixed(1)},${this.y(p[3]).toFixed(1)}`);
      const style = `fill:none;stroke:${colour};stroke-width:2;stroke-linejoin:round;stroke-linecap:round`;
      if (at.length === 1) { const [cx, cy] = at[0].split(","); node("circle", { cx, cy, r: 3, style: `fill:${colour}` }, svg); }
      else node("polyline", { points: at.join(" "), style }, svg);
    }

    hover(event) {
      if (!this.shown || !this.shown.length || !this.cross) return;
      const box = this.plot.getBoundingClientRect();
      const at = event.clientX - box.left;
      const nearest = (s) => s.points.reduce((a, b) => (Math.abs(this.x(axis.of(b)) - at) < Math.abs(this.x(axis.of(a)) - at) ? b : a));
      const found = this.shown.map((s) => [s, nearest(s)]);
      const x = this.x(axis.of(found[0][1]));
      this.cross.setAttribute("x1", x);
      this.cross.setAttribute("x2", x);
      this.cross.setAttribute("visibility", "visible");
      const lines = found.map(([s, p]) => {
        const row = document.createElement("div");
        const mark = document.createElement("span");
        mark.style.color = `var(--s${s.slot % 8})`;
        mark.textContent = "■ ";
        const value = document.createElement("b");
        value.textContent = text(p[3]);
        row.append(mark, `${s.name} `, value);
        return row;
      });
      const head = document.createElement("div");
      head.textContent = `${text(axis.of(found[0][1]))} ${axis.name}`;
      this.tip.replaceChildren(head, ...lines);
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, x + 12 + wide > box.width ? x - wide - 12 : x + 12)}px`;
      this.tip.style.top = `${MARGIN.top}px`;
    }

    leave() {
      this.tip.hidden = true;
      if (this.cross) this.cross.setAttribute("visibility", "hidden");
    }
  }

  for (const picture of document.querySelectorAll("figure.picture")) {
    const image = picture.querySelector("img");
    image.tabIndex = 0;
    image.onclick = () => picture.classList.toggle("large");
    image.onkeydown = (event) => { if (event.key === "Enter") image.onclick(); };
  }

  const charts = [...document.querySelectorAll("figure.chart")].map((f) => new Chart(f));
  const choice = document.getElementById("axis");
  if (charts.length)
    for (const a of AXES) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = a.name;
      button.setAttribute("aria-pressed", String(a === axis));
      button.onclick = () => {
        axis = a;
        for (const b of choice.children) b.setAttribute("aria-pressed", String(b === button));
        charts.forEach((c) => c.draw());
      };
      choice.append(button);
    }

  const root = document.documentElement, theme = document.getElementById("theme");
  const set = (name) => { root.dataset.theme = name; theme.textContent = name === "dark" ? "light" : "dark"; };
  set(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  theme.onclick = () => set(root.dataset.theme === "dark" ? "light" : "dark");
})();
