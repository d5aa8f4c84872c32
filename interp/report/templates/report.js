"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // plotly's own default has a button that uploads the figure.
  const config = {displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
  const dress = (figure) => {
    const p = data.palettes[dark.matches ? "dark" : "light"];
    const meta = figure.layout.meta || {};
    // Figures that name a dark colour for each of theirs are dressed by those.
    const other = new Map(Object.entries(dark.matches && meta.dark || {}));
    const f = JSON.parse(JSON.stringify(figure), (key, value) => other.get(value) ?? value);
    f.layout.modebar = {bgcolor: "rgba(0,0,0,0)", color: p.muted, activecolor: p.ink};
    if (meta.dark) return f;
    for (const trace of f.data) trace.colorscale = p.scale;
    f.layout.font.color = p.ink;
    f.layout.plot_bgcolor = p.gap;
    f.layout.hoverlabel = {bgcolor: p.hover, bordercolor: p.muted,
      font: {...f.layout.hoverlabel.font, color: p.ink}};
    for (const shape of f.layout.shapes || []) shape.line.color = p.ring;
    return f;
  };
  const draw = (id) => {
    const f = dress(data.figures[id]);
    return Plotly.react(id, f.data, f.layout, config);
  };
  const all = () => Object.keys(data.figures).reduce(
    // One after the other, with the page responsive in between.
    (before, id) => before
      .then(() => new Promise((next) => setTimeout(next, 0)))
      .then(() => draw(id)),
    Promise.resolve());
  dark.addEventListener("change", all);
  all();
})();
