"use strict";
// All scores as maps on one frame, a table of heads, and the card of the chosen head.
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const {panels, names, heads, scores, cards, opens} = data;
  const $ = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const el = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const shown = (x, digits = 2) => {
    if (x === null || x === undefined) return "–";
    const size = Math.abs(x), least = 10 ** -digits;
    if (size === 0) return "0";
    if (size < least) return `${x > 0 ? "<" : ">−"}${least}`;
    return (size < 10 ? x.toFixed(digits) : size < 100 ? x.toFixed(1) : Math.round(x).toLocaleString("en"))
      .replace("-", "−");
  };

  // Places: panel → the size of its grid, and (layer, head) → row
  const grids = panels.map(() => ({layers: 0, heads: 0, at: new Map()}));
  heads.forEach(([panel, layer, head], row) => {
    const g = grids[panel];
    g.layers = Math.max(g.layers, layer + 1);
    g.heads = Math.max(g.heads, head + 1);
    g.at.set(`${layer},${head}`, row);
  });
  // Ranks, highest first, within a panel
  for (const s of scores) {
    s.rank = new Array(names.length).fill(null);
    s.of = panels.map(() => 0);
    s.ties = panels.map(() => new Map());
    const order = names.map((_, i) => i).filter((i) => s.values[i] !== null)
      .sort((a, b) => s.values[b] - s.values[a]);
    const seen = panels.map(() => 0), last = panels.map(() => [null, 0]);
    for (const i of order) {
      const panel = heads[i][0];
      seen[panel] += 1;
      if (last[panel][0] !== s.values[i]) last[panel] = [s.values[i], seen[panel]];
      s.rank[i] = last[panel][1];
      s.of[panel] = seen[panel];
      s.ties[panel].set(s.values[i], (s.ties[panel].get(s.values[i]) || 0) + 1);
    }
  }

  // Colours: from nothing to much, and for signed scores from blue over nothing to orange
  const SCALES = {
    light: {gap: "#d5d9df", up: ["#f5f7fa", "#c4d3e4", "#7d9cc0", "#3d6494", "#122f55"],
      both: ["#1f4e8c", "#7fa6d6", "#f5f7fa", "#f0a878", "#b4430c"]},
    dark: {gap: "#3a414c", up: ["#151b24", "#1d3550", "#2b5680", "#437cb0", "#6ba3d8"],
      both: ["#8fbbee", "#33598a", "#151b24", "#8a4a22", "#ffb27a"]},
  };
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const table_of = (stops) => {
    const out = [];
    for (let i = 0; i < 256; i++) {
      const x = i / 255 * (stops.length - 1), j = Math.min(stops.length - 2, Math.floor(x));
      const a = rgb(stops[j]), b = rgb(stops[j + 1]);
      out.push(`rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * (x - j))).join(",")})`);
    }
    return out;
  };
  const colours = {};
  for (const [theme, s] of Object.entries(SCALES))
    colours[theme] = {gap: s.gap, up: table_of(s.up), both: table_of(s.both)};
  const colour = (s, value) => {
    const c = colours[dark.matches ? "dark" : "light"];
    if (value === null) return c.gap;
    const most = Math.max(Math.abs(s.low), Math.abs(s.high)) || 1;
    const share = s.signed ? .5 + value / most / 2 : (value - s.low) / ((s.high - s.low) || 1);
    return (s.signed ? c.both : c.up)[Math.round(255 * Math.max(0, Math.min(1, share)))];
  };

  // The maps
  const maps = [];
  const state = {row: -1, hover: -1, sort: null, down: true, filter: "", all: false, panel: 0};
  const draw_map = (m) => {
    const {canvas, s, grid, panel} = m, ratio = window.devicePixelRatio || 1;
    const w = canvas.clientWidth, h = canvas.clientHeight;
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    const cw = w / grid.heads, ch = h / grid.layers, gap = cw > 6 && ch > 5 ? 1 : 0;
    heads.forEach(([p, layer, head], row) => {
      if (p !== panel) return;
      c.fillStyle = colour(s, s.values[row]);
      c.fillRect(head * cw, layer * ch, Math.max(1, cw - gap), Math.max(1, ch - gap));
    });
    for (const row of [state.hover, state.row]) {
      if (row < 0 || heads[row][0] !== panel) continue;
      const css = getComputedStyle(document.documentElement);
      for (const [name, width] of [["--paper", 5], ["--accent", 2.5]]) { // seen on any colour
        c.strokeStyle = css.getPropertyValue(name);
        c.lineWidth = width;
        c.strokeRect(heads[row][2] * cw - .5, heads[row][1] * ch - .5, Math.max(4, cw),
          Math.max(4, ch));
      }
    }
  };
  // under a map: the ends of its colours
  const draw_scale = ({s, bar}) => {
    const c = colours[dark.matches ? "dark" : "light"], most = Math.max(Math.abs(s.low), Math.abs(s.high));
    const [low, high] = s.signed ? [-most, most] : [s.low, s.high];
    const stops = s.signed ? c.both : c.up, some = [0, 64, 128, 192, 255].map((i) => stops[i]);
    bar.children[0].textContent = shown(low);
    bar.children[1].style.background = `linear-gradient(to right, ${some.join(", ")})`;
    bar.children[2].textContent = shown(high) + (s.unit ? ` ${s.unit}` : "");
  };
  const draw = () => maps.forEach((m) => { draw_map(m); draw_scale(m); });
  // the first, the middle and the last of so many
  const ticks = (name, n) => {
    const box = el("span", name);
    const at = n > 8 ? [0, Math.floor((n - 1) / 2), n - 1] : n > 1 ? [0, n - 1] : [0];
    for (const i of at) {
      const mark = el("i", "", String(i));
      mark.style[name === "layers" ? "top" : "left"] = `${100 * (i + .5) / n}%`;
      box.append(mark);
    }
    box.setAttribute("aria-hidden", "true");
    return box;
  };
  // what a value belongs to: a head, or its key/value head or layer
  const place = (s, row) => s.grain === "layer" ? names[row].replace(/H\d+$/, "")
    : s.grain === "key/value head" && heads[row][3] >= 0
      ? names[row].replace(/H\d+$/, `KV${heads[row][3]}`) : names[row];
  const said = (s, row) => s.values[row] === null ? "not measured"
    : `${shown(s.values[row], 3)}${s.errors && s.errors[row] ? ` ± ${shown(s.errors[row], 3)}` : ""}`
      + `${s.unit ? ` ${s.unit}` : ""}`;
  const row_at = (m, e) => {
    const box = m.canvas.getBoundingClientRect();
    const head = Math.floor((e.clientX - box.left) / box.width * m.grid.heads);
    const layer = Math.floor((e.clientY - box.top) / box.height * m.grid.layers);
    const row = m.grid.at.get(`${layer},${head}`);
    return row === undefined ? -1 : row;
  };
  const hover = (row) => {
    if (state.hover === row) return;
    state.hover = row;
    for (const m of maps) {
      const at = row >= 0 && heads[row][0] === m.panel ? row : state.row;
      m.note.textContent = at >= 0 && heads[at][0] === m.panel
        ? `${place(m.s, at)} ${shown(m.s.values[at])}` : m.rest;
      m.note.title = at >= 0 && heads[at][0] === m.panel ? said(m.s, at) : "";
    }
    draw();
  };
  const holder = $("maps");
  if (data.columns) {
    holder.classList.add("rows");
    holder.style.gridTemplateColumns = `repeat(${data.columns}, minmax(0, 1fr))`;
  }
  for (const s of scores) {
    panels.forEach((label, panel) => {
      const grid = grids[panel];
      if (!s.values.some((v, i) => v !== null && heads[i][0] === panel)) return;
      const figure = el("figure", "map");
      const caption = el("figcaption");
      const link = el("a", "", s.title + (label ? `, ${label}` : ""));
      link.href = `#about-${s.name.replace(/[^A-Za-z0-9_-]/g, (c) => `_${c.codePointAt(0).toString(16)}_`)}`;
      const note = el("span", "value");
      caption.append(link, note);
      const canvas = el("canvas");
      const best = names.map((_, i) => i)
        .filter((i) => s.values[i] !== null && heads[i][0] === panel)
        .sort((a, b) => s.values[b] - s.values[a])[0];
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label",
        `${s.title} by layer (down) and head (across); highest: ${place(s, best)} `
        + `${said(s, best)}. Arrow keys choose a head.`);
      const size = Math.max(2, Math.min(14, 300 / grid.layers));
      canvas.style.height = `${Math.round(size * grid.layers)}px`;
      const bar = el("div", "bar");
      bar.append(el("span"), el("i"), el("span"));
      const m = {canvas, s, grid, panel, note, bar,
        rest: `${place(s, best)} ${shown(s.values[best])}`};
      note.textContent = m.rest;
      canvas.addEventListener("pointermove", (e) => hover(row_at(m, e)));
      canvas.addEventListener("pointerleave", () => hover(-1));
      canvas.addEventListener("click", (e) => {
        choose(row_at(m, e));
        // in one column the card stands below the maps
        if (matchMedia("(max-width: 64rem)").matches) $("card").scrollIntoView({block: "nearest"});
      });
      canvas.addEventListener("keydown", (e) => {
        const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1],
          ArrowRight: [0, 1]}[e.key];
        if (!step) return;
        e.preventDefault();
        const at = state.row >= 0 && heads[state.row][0] === panel ? heads[state.row]
          : [panel, -step[0], -step[1]];
        const row = grid.at.get(`${at[1] + step[0]},${at[2] + step[1]}`);
        if (row !== undefined) choose(row);
      });
      const frame = el("div", "grid");
      frame.append(ticks("layers", grid.layers), canvas, ticks("heads", grid.heads));
      figure.append(caption, frame, bar);
      holder.append(figure);
      maps.push(m);
    });
  }

  // The card of the chosen head
  const part = (title) => {
    const box = el("div", "part");
    box.append(el("h3", "", title));
    $("card").append(box);
    return box;
  };
  const to_head = (name) => {
    const row = names.indexOf(name);
    const button = el("button", "link", name);
    button.type = "button";
    button.addEventListener("click", () => choose(row));
    return button;
  };
  const passage = (parts) => {
    const p = el("p", "passage");
    for (const [text, role] of parts) {
      const clean = text.replace(/\s*\n\s*/g, " ↵ ");
      if (!role) { p.append(clean); continue; }
      p.append(clean.match(/^ */)[0]);
      p.append(el("mark", role, clean.trimStart() || "␣"));
    }
    return p;
  };
  const card = () => {
    const box = $("card"), row = state.row;
    box.textContent = "";
    if (row < 0) {
      box.append(el("h2", "", "No head chosen"));
      box.append(el("p", "none", "Click a cell, a row or a name."));
      return;
    }
    const c = cards[row] || {};
    const top = el("h2", "", names[row]);
    if (c.kv) top.append(el("small", "", ` one of ${c.kv[1]} that read key/value head ${c.kv[0]}`));
    box.append(top);
    if (opens && names[row] === opens[0]) box.append(el("p", "none", `Shown first: ${opens[1]}.`));
    const roles = el("ul", "roles");
    for (const [name, why] of c.roles || []) {
      const li = el("li");
      li.append(el("b", "", name), `: ${why}`);
      roles.append(li);
    }
    if (!(c.roles || []).length) roles.append(el("li", "none", "No role by these scores."));
    box.append(roles);
    if (c.passages) {
      const some = part("Where it does most, by attention weight");
      some.append(legend());
      for (const [parts, weight, promotes] of c.passages) {
        const p = passage(parts);
        p.append(el("small", "", ` weight ${shown(weight)}`
          + (promotes.length ? ` · promotes ${promotes.map(quoted).join(" ")}` : "")));
        some.append(p);
      }
      if (c.built) some.append(el("p", "none", c.built));
    }
    if (c.writes) {
      const some = part("Its OV circuit: the directions that carry most of it, by their share of ‖W_OV‖²");
      for (const [share, reads, promotes, lowers] of c.writes) {
        const p = el("p", "", `${Math.round(100 * share)} %: reads `);
        p.append(el("span", "tokens", reads.map(quoted).join(" ")), ", promotes ",
          el("span", "tokens", promotes.map(quoted).join(" ")), "; lowers ",
          el("span", "tokens", lowers.map(quoted).join(" ")));
        some.append(p);
      }
    }
    if (c.partners) {
      const some = part("Composes with");
      some.append(el("p", "none", "How much of what the earlier head writes the later one reads by its "
        + "queries (Q), keys (K) or values (V), 0 to 1; furthest above random first."));
      for (const [earlier, text] of [[1, "reads from"], [0, "is read by"]]) {
        const these = c.partners.filter((p) => p[0] === earlier);
        if (!these.length) continue;
        const p = el("p", "", `${text} `);
        these.forEach(([, name, ways], i) => {
          p.append(to_head(name), ` ${ways.map(([kind, x]) => `${kind.toUpperCase()} ${shown(x)}`).join(" ")}`
            + (i < these.length - 1 ? ", " : ""));
        });
        some.append(p);
      }
    }
    const some = part("Scores");
    const table = el("table", "standings");
    for (const s of scores) {
      if (s.values[row] === null) continue;
      const tr = table.insertRow(), of = s.of[heads[row][0]];
      tr.append(el("th", "", s.title));
      tr.append(el("td", "n", said(s, row)));
      const same = s.ties[heads[row][0]].get(s.values[row]) > 1 ? "=" : "";
      tr.append(el("td", "n", `${same}${s.rank[row]} of ${of}`));
      const bar = el("td", "bar"), i = el("i");
      i.style.width = `${100 * (of - s.rank[row] + 1) / of}%`;
      bar.title = `percentile ${Math.round(100 * (of - s.rank[row]) / Math.max(1, of - 1))}`;
      bar.append(i);
      tr.append(bar);
      const reaches = s.threshold !== null && s.values[row] >= s.threshold;
      tr.append(el("td", reaches ? "n yes" : "n", s.threshold === null ? ""
        : `${reaches ? "≥" : "<"} ${shown(s.threshold)}`));
    }
    const scroll = el("div", "scroll");
    scroll.append(table);
    some.append(scroll);
  };
  const quoted = (token) => `“${token.replace(/\n/g, "↵").trim() || "␣"}”`;
  const legend = () => {
    const p = el("p", "none");
    p.append(el("mark", "query", "looks"), " at ", el("mark", "key", "this token"), ":");
    return p;
  };

  // The table of heads
  const several = panels.length > 1;
  // of a tower, the scores that some head of it has
  const columns = () => scores.map((_, k) => k).filter((k) => !several
    || scores[k].values.some((v, i) => v !== null && heads[i][0] === state.panel));
  const roles_of = (i) => (cards[i] || {}).roles || [];
  const furthest = names.map((_, i) => Math.max(0, ...scores.filter((s) => s.threshold > 0)
    .map((s) => s.values[i] === null ? 0 : s.values[i] / s.threshold)));
  const filtered = () => {
    const text = state.filter.trim().toLowerCase();
    const wanted = (i) => several && heads[i][0] !== state.panel ? false : !text || names[i].toLowerCase().includes(text)
      || ((cards[i] || {}).roles || []).some(([name]) => name.toLowerCase().includes(text));
    const rows = names.map((_, i) => i).filter(wanted);
    const s = scores[state.sort];
    if (!s) rows.sort((a, b) => roles_of(b).length - roles_of(a).length || furthest[b] - furthest[a]);
    if (s) rows.sort((a, b) => {
      const [x, y] = [s.values[a], s.values[b]];
      if (x === null || y === null) return (x === null) - (y === null);
      return state.down ? y - x : x - y;
    });
    return rows;
  };
  const FEW = 40;
  const list = () => {
    const body = $("heads-body"), rows = filtered();
    body.textContent = "";
    for (const i of rows.slice(0, state.all ? rows.length : FEW)) {
      const tr = body.insertRow();
      tr.dataset.row = i;
      if (i === state.row) tr.className = "chosen";
      const th = el("th");
      th.scope = "row";
      th.append(to_head_row(i));
      tr.append(th);
      tr.append(el("td", "roles", ((cards[i] || {}).roles || []).map(([name]) => name).join(", ")));
      for (const s of columns().map((k) => scores[k])) {
        const td = el("td", "n", shown(s.values[i]));
        if (s.threshold !== null && s.values[i] !== null && s.values[i] >= s.threshold)
          td.classList.add("yes");
        tr.append(td);
      }
      tr.addEventListener("click", () => choose(i));
    }
    $("heads-more").hidden = state.all || rows.length <= FEW;
    $("heads-more").textContent = `Show all ${rows.length.toLocaleString("en")}`;
    $("heads-count").textContent = `${rows.length.toLocaleString("en")} of ${names.length.toLocaleString("en")} heads`;
  };
  const to_head_row = (row) => {
    const label = panels[heads[row][0]];
    const button = el("button", "link", names[row] + (label.includes("cross") ? " (cross)" : ""));
    button.type = "button";
    return button;
  };
  const headings = $("heads-head");
  const sorted = () => headings.querySelectorAll("th[data-score]").forEach((th) => {
    th.setAttribute("aria-sort", state.sort !== +th.dataset.score ? "none"
      : state.down ? "descending" : "ascending");
  });
  const head = () => {
    headings.textContent = "";
    for (const text of ["Head", "Roles"]) {
      const th = el("th", "", text);
      th.scope = "col";
      headings.append(th);
    }
    for (const k of columns()) {
      const th = el("th", "n"), button = el("button", "sort", scores[k].title);
      th.scope = "col";
      th.dataset.score = k;
      button.type = "button";
      button.addEventListener("click", () => {
        if (state.sort === k) state.down = !state.down; else { state.sort = k; state.down = true; }
        sorted();
        list();
      });
      th.append(button);
      headings.append(th);
    }
    sorted();
  };
  if (several) panels.forEach((label, panel) => {
    const choice = el("label"), radio = el("input");
    radio.type = "radio";
    radio.name = "heads-tower";
    radio.addEventListener("change", () => show_panel(panel));
    choice.append(radio, ` ${label}`);
    $("heads-towers").append(choice);
  });
  const show_panel = (panel) => {
    state.panel = panel;
    if (!columns().includes(state.sort)) state.sort = null;
    $("heads-towers").querySelectorAll("input").forEach((radio, k) => { radio.checked = k === panel; });
    head();
    list();
  };
  $("heads-filter").addEventListener("input", (e) => {
    state.filter = e.target.value;
    const here = state.panel;
    for (let p = 0; p < panels.length && !filtered().length; p++) state.panel = p;
    if (!filtered().length) state.panel = here;
    show_panel(state.panel);
  });
  $("heads-more").addEventListener("click", () => { state.all = true; list(); });

  const choose = (row) => {
    if (row < 0) return;
    state.row = row;
    state.hover = -2;
    hover(-1);
    card();
    if (heads[row][0] !== state.panel) show_panel(heads[row][0]);
    for (const tr of $("heads-body").rows) tr.className = +tr.dataset.row === row ? "chosen" : "";
  };
  for (const button of document.querySelectorAll("button[data-head]"))
    button.addEventListener("click", () => choose(names.indexOf(button.dataset.head)));
  window.addEventListener("resize", draw);
  dark.addEventListener("change", draw);

  // Whoever opens the page sees a card at once: that of a head worth a look
  const asked = names.indexOf(decodeURIComponent(location.hash.slice(1)));
  const first = opens ? names.indexOf(opens[0]) : names.length - 1;
  const shown_first = asked >= 0 ? asked : first;
  show_panel(shown_first >= 0 ? heads[shown_first][0] : 0);
  choose(shown_first);
  draw();
})();
