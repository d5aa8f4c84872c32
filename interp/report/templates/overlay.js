"use strict";
// Pictures under their heads: the weights of each head over the picture, on one scale.
(() => {
  const all = JSON.parse(document.getElementById("overlay-data").textContent);
  const el = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const parts = (colour) => colour.match(/[\d.]+/g).map(Number);
  const colour = (scale, share) => {
    const x = Math.max(0, Math.min(1, share));
    let j = 0;
    while (j < scale.length - 2 && x > scale[j + 1][0]) j += 1;
    const [a, one] = scale[j], [b, two] = scale[j + 1], s = (x - a) / (b - a), c = parts(two);
    const mixed = parts(one).map((v, k) => v + (c[k] - v) * s);
    return `rgba(${mixed.slice(0, 3).map(Math.round).join(",")},${mixed[3].toFixed(3)})`;
  };
  for (const [id, {source, width, height, top, scale, panels}] of Object.entries(all)) {
    const holder = document.getElementById(id);
    for (const {title, layers} of panels) {
      const figure = el("figure"), frame = el("div", "frame"), picture = el("img");
      frame.style.aspectRatio = `${width} / ${height}`;
      picture.src = source;
      picture.alt = "";
      frame.append(picture);
      if (layers.length) {
        const canvas = el("canvas"), ratio = 2;
        canvas.width = width * ratio;
        canvas.height = height * ratio;
        const c = canvas.getContext("2d");
        const cell = ({box, weights}, r, k) => {
          const [left, above, right, below] = box;
          const w = (right - left) * canvas.width / weights[0].length;
          const h = (below - above) * canvas.height / weights.length;
          return [left * canvas.width + k * w, above * canvas.height + r * h, w, h];
        };
        for (const layer of layers) {
          layer.weights.forEach((row, r) => row.forEach((value, k) => {
            c.fillStyle = colour(scale, value / (top || 1));
            c.fillRect(...cell(layer, r, k));
          }));
          c.strokeStyle = "#ff2d55";
          c.lineWidth = 2 * ratio;
          for (const [r, k] of layer.sinks) {
            const [x, y, w, h] = cell(layer, r, k), s = Math.min(w, h) / 4;
            for (const way of [-1, 1]) {
              c.beginPath();
              c.moveTo(x + w / 2 - s, y + h / 2 - way * s);
              c.lineTo(x + w / 2 + s, y + h / 2 + way * s);
              c.stroke();
            }
          }
        }
        canvas.addEventListener("pointermove", (e) => {
          const shot = canvas.getBoundingClientRect();
          const x = (e.clientX - shot.left) / shot.width, y = (e.clientY - shot.top) / shot.height;
          canvas.title = "";
          for (const {box: [left, above, right, below], weights} of layers) {
            const k = Math.floor((x - left) / (right - left) * weights[0].length);
            const r = Math.floor((y - above) / (below - above) * weights.length);
            if (weights[r] && weights[r][k] !== undefined) canvas.title = `weight ${weights[r][k]}`;
          }
        });
        frame.append(canvas);
      }
      figure.append(el("figcaption", "", title), frame);
      holder.append(figure);
    }
  }
})();
