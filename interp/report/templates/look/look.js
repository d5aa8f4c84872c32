"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const {tokens, wide} = data, n = tokens.length;
  const NONE = wide ? 0xFFFFFFFF : 0xFFFF;
  const WINDOW = 1200; // tokens that are shown as text at once
  const $ = (id) => document.getElementById(id);

  // Numbers: base64 of little-endian integers
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const shares = (text) => Float32Array.from(new Uint16Array(bytes(text)), (x) => x / 0xFFFF);
  const places = (text) => wide ? new Uint32Array(bytes(text)) : new Uint16Array(bytes(text));
  const unpacked = (v) => {
    const out = {k: v.k, r: v.r};
    for (const name of ["keys", "value_keys", "queries"]) out[name] = places(v[name]);
    for (const name of ["weights", "values", "first", "value_first", "from_weights"])
      out[name] = shares(v[name]);
    for (const [name, scale] of Object.entries(v.scales))
      out[name] = shares(v[name]).map((x) => x * scale);
    return out;
  };
  const views = Object.fromEntries(
    Object.entries(data.views).map(([name, v]) => [name, unpacked(v)]));

  // What is chosen
  // at rest the last token, from which a model goes on; Escape: none
  const state = {view: "own", way: "from", by: "weight", token: n - 1, rest: n - 1, pinned: false,
    start: 0, from: 0, to: n};
  const view = () => views[state.view];

  // (place, weight) pairs, strongest first
  const row = (index, weights, size, t) => {
    const found = [];
    for (let j = t * size; j < (t + 1) * size; j++)
      if (index[j] !== NONE && weights[j] > 0) found.push([index[j], weights[j]]);
    return found;
  };
  const looksAt = (t) => {
    const v = view();
    return state.by === "value" ? row(v.value_keys, v.values, v.k, t)
      : row(v.keys, v.weights, v.k, t);
  };
  const lookedAtBy = (t) => row(view().queries, view().from_weights, view().r, t);

  const shown = (x) => x >= 9.95 ? x.toFixed(1) : x >= 0.995 ? x.toFixed(2) : x < 0.005 ? "<.01"
    : x.toFixed(2).slice(1);
  // the fewest tokens that the strip shows, and the colour of the smallest weight
  const LEAST = 8, FAINT = .06;
  const special = (text) => /^<.*>$|^\[[A-Z]+\]$/.test(text.trim());
  const visible = (text) => text === "" ? "⋯" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
  const around = (t) => {
    // a token with its neighbours, itself apart
    const cut = (a, b) => tokens.slice(Math.max(0, a), Math.min(n, b)).join("");
    return [cut(t - 3, t).slice(-14), visible(tokens[t]), cut(t + 1, t + 4).slice(0, 14)]
      .map((x) => x.replace(/\s*\n\s*/g, "↵"));
  };

  // The text, or the part of it around the chosen token
  let spans = [];
  const write = () => {
    const stop = Math.min(n, state.start + WINDOW);
    const holder = $("text");
    holder.textContent = "";
    spans = [];
    for (let t = state.start; t < stop; t++) {
      const span = document.createElement("span");
      span.textContent = tokens[t] === "" ? "" : tokens[t];
      span.dataset.t = t;
      if (special(tokens[t])) span.className = "special";
      holder.append(span);
      spans.push(span);
    }
  };
  const window_to = (t) => {
    if (t >= state.start && t < state.start + WINDOW) return;
    state.start = Math.max(0, Math.min(n - WINDOW, t - Math.floor(WINDOW / 3)));
    write();
  };

  const paint = () => {
    const v = view(), t = state.token;
    const colour = getComputedStyle(document.documentElement)
      .getPropertyValue(state.way === "from" && t >= 0 ? "--from" : "--to");
    const heat = new Map();
    let most = 1;
    if (t >= 0) {
      for (const [place, w] of state.way === "from" ? looksAt(t) : lookedAtBy(t))
        heat.set(place, w);
    } else {
      most = 0;
      const stop = Math.min(n, state.start + WINDOW);
      for (let i = 1; i < n; i++) most = Math.max(most, v.received[i]);
      for (let i = state.start; i < stop; i++) heat.set(i, v.received[i]);
    }
    for (const span of spans) {
      const at = +span.dataset.t, w = Math.min(1, (heat.get(at) || 0) / (most || 1));
      span.style.background = w > 0.004 ? `rgba(${colour}, ${(FAINT + .79 * w).toFixed(3)})` : "";
      span.classList.toggle("chosen", at === t);
    }
    $("hint").textContent = t < 0
      ? "Point at a token to see where the head looks from it; click to keep it, arrow keys to walk. "
        + "Now: what each token receives, the mean weight of the tokens that see it."
      : state.pinned ? "Kept: Escape or another click lets it go. Arrow keys walk."
        : "Point at a token to see where the head looks from it; click to keep it, arrow keys to walk, "
          + "Escape for what every token receives.";
    // which way it looks is a question about a token
    for (const input of document.querySelectorAll("input[name=way]")) input.disabled = t < 0;
    if (n > WINDOW)
      $("hint").textContent += ` Tokens ${state.start.toLocaleString("en")} to `
        + `${Math.min(n, state.start + WINDOW).toLocaleString("en")} of ${n.toLocaleString("en")}.`;
  };

  const table = (rows, kind) => {
    const made = document.createElement("table");
    made.className = kind;
    const most = kind === "mean" ? rows.reduce((a, [, w]) => Math.max(a, w), 0) : 1;
    for (const [place, w] of rows.slice(0, 10)) {
      const tr = made.insertRow();
      tr.addEventListener("click", () => choose(place, true));
      const cell = (name, text) => {
        const td = tr.insertCell();
        td.className = name;
        td.textContent = text;
        return td;
      };
      cell("n", place.toLocaleString("en"));
      const [before, own, after] = around(place);
      const t = cell("t", before);
      const b = document.createElement("b");
      b.textContent = own;
      t.append(b, after);
      t.title = before + own + after;
      cell("w", shown(w));
      const bar = cell("bar", "");
      const i = document.createElement("i");
      i.style.width = `${Math.max(2, 100 * w / (most || 1))}%`;
      bar.append(i);
    }
    return made;
  };
  const aside = () => {
    const side = $("side"), t = state.token, v = view();
    side.textContent = "";
    const add = (tag, text) => {
      const e = document.createElement(tag);
      e.textContent = text;
      side.append(e);
    };
    if (t < 0) {
      add("h2", "Most looked at");
      add("p", "What it receives: the mean weight of the tokens that see it. The first token apart: "
        + `${shown(v.received[0])}.`);
      const order = Array.from({length: n}, (_, i) => i).slice(1)
        .sort((a, b) => v.received[b] - v.received[a]).slice(0, 10);
      side.append(table(order.map((i) => [i, v.received[i]]), "mean"));
      return;
    }
    add("h2", `${visible(tokens[t])}  (token ${t.toLocaleString("en")})`);
    const first = state.by === "value" ? v.value_first[t] : v.first[t];
    add("p", `First token ${shown(first)} · entropy ${v.entropy[t].toFixed(2)} nats`);
    add("h3", state.by === "value" ? "Looks at, share of what moves the stream"
      : "Looks at, weight");
    side.append(table(looksAt(t), "from"));
    add("h3", "Is looked at by, weight");
    const by = lookedAtBy(t);
    if (by.length) side.append(table(by, "to")); else add("p", "no later token");
  };

  // The strip: the whole text in three lanes
  const LANES = [["received", "receives"],
    ["first", "on the first token"], ["entropy", "entropy, nats"]];
  const strip = () => {
    const canvas = $("strip"), ratio = window.devicePixelRatio || 1;
    const w = canvas.clientWidth, h = canvas.clientHeight;
    canvas.width = w * ratio;
    canvas.height = h * ratio;
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    const css = getComputedStyle(document.documentElement);
    const ink = css.getPropertyValue("--ink"), muted = css.getPropertyValue("--muted");
    const v = view(), {from, to} = state, span = to - from, lane = h / LANES.length;
    const x = (t) => (t - from) / span * w;
    if (n > WINDOW) {
      c.fillStyle = `rgba(${css.getPropertyValue("--from")}, .12)`;
      c.fillRect(x(state.start), 0, Math.max(2, WINDOW / span * w), h);
    }
    LANES.forEach(([name], j) => {
      const values = v[name], [low, high] = [Math.max(1, from), Math.max(to, 2)];
      let most = name === "first" ? 1 : 0;
      if (name !== "first") // what the first token receives would flatten the rest
        for (let t = low; t < high && t < n; t++) most = Math.max(most, values[t]);
      const cut = from === 0 && values[0] > most ? `; first token ${shown(values[0])}, cut` : "";
      c.fillStyle = j === 0 ? `rgb(${css.getPropertyValue("--to")})` : muted;
      for (let p = 0; p < w; p++) {
        const a = Math.floor(from + p / w * span);
        const b = Math.max(a + 1, Math.floor(from + (p + 1) / w * span));
        let top = 0;
        for (let t = a; t < b && t < n; t++) top = Math.max(top, values[t]);
        const height = Math.min(1, top / (most || 1)) * (lane - 14);
        c.fillRect(p, (j + 1) * lane - height - 1, 1, height);
      }
      c.fillStyle = ink;
      c.font = "11px system-ui, sans-serif";
      c.fillText(`${LANES[j][1]}: 0 to ${shown(most)}${cut}`, 4, j * lane + 11);
    });
    if (state.token >= 0) {
      c.fillStyle = `rgb(${css.getPropertyValue("--from")})`;
      for (const [place, weight] of looksAt(state.token)) {
        const size = 4 + 10 * weight;
        c.fillRect(x(place + .5) - 1, h - size, 2, size);
      }
      c.fillStyle = css.getPropertyValue("--accent");
      c.fillRect(x(state.token + .5) - .75, 0, 1.5, h);
    }
  };

  const draw = () => { paint(); aside(); strip(); };
  const choose = (t, pinned = state.pinned) => {
    if (t >= n) return;
    state.token = t;
    state.pinned = pinned && t >= 0;
    if (t >= 0) window_to(t);
    draw();
    if (pinned && t >= 0) {
      const span = spans[t - state.start], holder = $("text");
      if (!span) return;
      const top = span.offsetTop - holder.offsetTop;
      if (top < holder.scrollTop || top > holder.scrollTop + holder.clientHeight - 30)
        holder.scrollTop = Math.max(0, top - holder.clientHeight / 3);
    }
  };
  const zoom = (factor, middle) => {
    const span = Math.max(Math.min(n, LEAST), Math.min(n, Math.round((state.to - state.from) * factor)));
    const share = (middle - state.from) / (state.to - state.from);
    state.from = Math.round(Math.max(0, Math.min(n - span, middle - share * span)));
    state.to = state.from + span;
    strip();
  };
  const middle = () => state.token >= 0 ? state.token : (state.from + state.to) / 2;

  const text = $("text"), canvas = $("strip");
  text.addEventListener("pointerover", (e) => {
    const t = e.target.dataset && e.target.dataset.t;
    if (t !== undefined && !state.pinned && e.pointerType === "mouse") choose(+t);
  });
  text.addEventListener("pointerleave", () => { if (!state.pinned) choose(state.rest); });
  text.addEventListener("click", (e) => {
    const t = e.target.dataset && e.target.dataset.t;
    if (t === undefined) return;
    choose(state.pinned && state.token === +t ? state.rest : +t, !(state.pinned && state.token === +t));
  });
  const walk = (e) => {
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10,
      PageUp: -500, PageDown: 500}[e.key];
    if (e.key === "Escape") { state.rest = -1; choose(-1, false); }
    else if (e.key === "Home") choose(0, true);
    else if (e.key === "End") choose(n - 1, true);
    else if (e.key === "+" || e.key === "=") zoom(.5, middle());
    else if (e.key === "-") zoom(2, middle());
    else if (step !== undefined)
      choose(Math.max(0, Math.min(n - 1, (state.token < 0 ? state.start - Math.sign(step)
        : state.token) + step)), true);
    else return;
    e.preventDefault();
  };
  text.addEventListener("keydown", walk);
  canvas.addEventListener("keydown", walk);
  const place = (e) => {
    const box = canvas.getBoundingClientRect();
    const t = state.from + (e.clientX - box.left) / box.width * (state.to - state.from);
    return Math.max(0, Math.min(n - 1, Math.floor(t)));
  };
  canvas.addEventListener("pointerdown", (e) => {
    canvas.setPointerCapture(e.pointerId);
    choose(place(e), true);
  });
  canvas.addEventListener("pointermove", (e) => { if (e.buttons) choose(place(e), true); });
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    zoom(e.deltaY > 0 ? 1.25 : .8, place(e));
  }, {passive: false});
  $("in").addEventListener("click", () => zoom(.5, middle()));
  $("out").addEventListener("click", () => zoom(2, middle()));
  for (const input of document.querySelectorAll("input[type=radio]"))
    input.addEventListener("change", () => { state[input.name] = input.value; draw(); });
  window.addEventListener("resize", strip);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  window_to(state.token);
  write();
  choose(state.token, true);
  state.pinned = false;
  draw();
})();
