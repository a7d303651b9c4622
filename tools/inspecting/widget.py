"""Markup, style and script of the sample browser; what comes from the data enters the page as text alone."""

MARKUP = """
<div class="bar">
 <label class="which">Sample <select class="pick"></select></label>
 <span class="steps"><button type="button" class="back" aria-label="previous sample">‹</button><button
  type="button" class="on" aria-label="next sample">›</button></span>
 <div class="views" role="radiogroup" aria-label="view"><span>View</span></div>
 <label class="cover"><input type="checkbox"> cover masked tokens</label>
</div>
<p class="note about"></p>
<p class="legend"><span class="tok prompt">prompt</span> <span class="tok shown">shown</span>
 <span class="tok mA" data-mark="A">half A</span> <span class="tok mB" data-mark="B">half B</span>
 <span class="tok mM" data-mark="M">masked</span> <span class="tok mS" data-mark="–">masked, no target</span>
 <span class="quiet">the fuller the tint, the more probable the teacher finds the true text</span></p>
<div class="text" role="group" aria-label="tokens of the sample; arrow keys go between masked ones"></div>
<div class="says" aria-live="polite"></div>
"""

STYLE = """
.bar { display: flex; flex-wrap: wrap; gap: 10px 16px; align-items: center; }
.bar select, .bar button { font: inherit; color: inherit; background: var(--page);
 border: 1px solid var(--rule); border-radius: 6px; padding: 6px 10px; min-height: 40px; }
.bar label { display: flex; gap: 8px; align-items: center; }
.bar .which { flex: 0 1 27rem; min-width: 0; }
.bar select { flex: 1; min-width: 0; width: 100%; }
.bar button { min-width: 44px; cursor: pointer; }
.views { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; }
.views label, .cover { min-height: 32px; cursor: pointer; }
.steps { display: flex; gap: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: baseline; font-size: .85rem;
 margin: 10px 0; }
.quiet { color: var(--quiet); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; border: 1px solid var(--rule);
 border-radius: 8px; padding: 10px 12px; max-height: 26rem; overflow-y: auto;
 font: .9rem/2.1 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tok { border-radius: 4px; padding: 1px 1px; }
.tok.prompt { color: var(--quiet); }
.tok[data-mark] { cursor: pointer; padding: 1px 3px; border: 1px solid; margin: 0 1px; }
.tok[data-mark]::after { content: attr(data-mark); font-size: .62em; font-weight: 700; vertical-align: super;
 margin-left: 2px; }
.mA { border-color: #2f7ed8 !important; --tint: 47,126,216; }
.mB { border-color: #e2711d !important; border-style: dashed !important; --tint: 226,113,29; }
.mM { border-color: #2a9d6f !important; --tint: 42,157,111; }
.mS { border-color: var(--quiet) !important; border-style: dotted !important; --tint: 128,128,128; }
.tok[data-mark] { background: rgba(var(--tint), calc(.08 + .42 * var(--p, 0))); }
.tok.here { outline: 3px solid var(--text); outline-offset: 1px; }
.chunk { border-bottom: 2px solid var(--rule); margin-right: 2px; }
.covered .tok[data-mark] .word { color: transparent;
 background: repeating-linear-gradient(45deg, var(--quiet) 0 2px, transparent 2px 5px); }
.says { margin-top: 12px; min-height: 13.5rem; font-size: .92rem; }
.says h3 { font-size: 1rem; margin: 0 0 6px; overflow-wrap: anywhere; }
.says p { margin: 0 0 8px; }
.says .row { display: grid; grid-template-columns: minmax(4.5rem, 1fr) 4.2rem 3fr; gap: 10px;
 align-items: center; }
.says .name { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre;
 overflow: hidden; text-overflow: ellipsis; }
.says .number { text-align: right; font-variant-numeric: tabular-nums; }
.says .level { height: .7rem; border-radius: 3px; background: #2f7ed8; min-width: 2px; }
.says .true .name { font-weight: 700; }
"""

SCRIPT = r"""
const find = (name) => root.querySelector(name);
const make = (tag, cls, text) => {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
};
const marks = { A: ["mA", "A"], B: ["mB", "B"], masked: ["mM", "M"], silent: ["mS", "–"] };
const names = { A: "half A", B: "half B", masked: "masked", silent: "masked, without a target",
  shown: "shown", prompt: "prompt, never masked" };
const pick = find(".pick"), views = find(".views"), text = find(".text"), says = find(".says");
const word = (id) => data.texts[id] ?? `#${id}`;
const hidden = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const code = (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
const seen = (s) => s.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(hidden, code);
const percent = (p) => p === null ? "–" : p >= 0.0005 ? (100 * p).toFixed(1) + " %" : "< 0.1 %";
const off = (v) => Math.abs(v.t - 0.5);
const middle = (s) => s.views.reduce((a, v, k) => off(v) < off(s.views[a]) ? k : a, 0);
let sample = 0, view = 0, here = -1, masked = [];

const chunkAt = (v, i) => v.chunks.find((c) => c[0] <= i && i < c[0] + c[1]);

const explain = (i) => {
  const s = data.samples[sample], v = s.views[view], a = v.asked[i], c = chunkAt(v, i);
  root.querySelectorAll(".here").forEach((e) => e.classList.remove("here"));
  here = i;
  text.querySelector(`[data-at="${i}"]`)?.classList.add("here");
  says.replaceChildren(make("h3", "", `“${seen(word(s.ids[i]))}”, position ${i}: ${names[v.states[i]]}`));
  if (a) {
    const entropy = `entropy ${data.lower ? "at least " : ""}${a.h.toFixed(2)} nats.`;
    const rank = a.rank ? `, rank ${a.rank}` : data.lower ? ", not among those kept" : "";
    says.append(make("p", "", a.p === null ? `The true token lies outside the shared vocabulary; ${entropy}`
      : `The teacher gives the true token ${percent(a.p)}${rank}; ${entropy}`));
    for (const [id, p] of a.top) {
      const row = make("div", "row" + (id === s.ids[i] ? " true" : ""));
      const level = make("span", "level");
      level.style.width = `${Math.max(0.5, 100 * p)}%`;
      row.append(make("span", "name", seen(word(id)) + (id === s.ids[i] ? " ✓" : "")),
        make("span", "number", percent(p)), level);
      says.append(row);
    }
  }
  if (c) {
    const words = s.ids.slice(c[0], c[0] + c[1]).map(word).join("");
    const many = (n, whose) => `${n} ${whose} ${n > 1 ? "tokens" : "token"}`;
    const active = c[3] === "shown" ? "" : c[4] ? ", active" : ", not active: it touches the prompt";
    says.append(make("p", "",
      `Chunk “${seen(words)}”: ${many(c[1], "student")}, ${many(c[2], "teacher")}; ` +
      `${names[c[3]]}${active}.`));
    const theirs = (c[6] ?? []).map((x) => `“${seen(x)}”`).join(" ");
    if (theirs) says.append(make("p", "", `The teacher's tokens: ${theirs}.`));
    if (c[5] !== null)
      says.append(make("p", "", `The teacher's log-prob of its text is ${c[5].toFixed(3)} nats, ` +
        `a probability of ${percent(Math.exp(c[5]))}.`));
  }
};

const go = (i, focus) => {
  const e = text.querySelector(`[data-at="${i}"]`);
  if (!e) return;
  text.querySelectorAll('[tabindex="0"]').forEach((x) => x.setAttribute("tabindex", "-1"));
  e.setAttribute("tabindex", "0");
  if (focus) e.focus({ preventScroll: false });
  explain(i);
};

const draw = () => {
  const s = data.samples[sample], v = s.views[view];
  views.querySelectorAll("label").forEach((e) => e.remove());
  s.views.forEach((w, k) => {
    const label = make("label"), radio = make("input");
    Object.assign(radio, { type: "radio", name: "view", value: k, checked: k === view });
    radio.addEventListener("change", () => { view = k; draw(); });
    label.append(radio, make("span", "", ` ${w.view} (t = ${w.t.toFixed(2)})`));
    views.append(label);
  });
  text.replaceChildren();
  masked = [];
  let group = null, ends = -1;
  s.ids.forEach((id, i) => {
    const state = v.states[i], mark = marks[state], c = chunkAt(v, i);
    if (c && c[0] === i && c[1] > 1) { group = make("span", "chunk"); ends = i + c[1]; text.append(group); }
    if (i >= ends) group = null;
    const e = make("span", "tok " + (mark ? mark[0] : state));
    const shown = word(id);
    e.append(make("span", "word", mark ? seen(shown) : seen(shown).replaceAll("⏎", "⏎\n")));
    e.dataset.at = i;
    if (mark) {
      masked.push(i);
      e.dataset.mark = mark[1];
      e.setAttribute("role", "button");
      e.setAttribute("tabindex", masked.length === 1 ? "0" : "-1");
      const p = v.asked[i]?.p ?? (c && c[5] !== null ? Math.exp(c[5]) : null);
      if (p !== null && p !== undefined) e.style.setProperty("--p", Math.min(1, p));
      if (shown.includes("\n")) e.append("\n");
    }
    (group ?? text).append(e);
  });
  find(".about").textContent = `Sample ${s.id}, ${s.split}, ${s.real} tokens` +
    (s.ids.length > s.real ? ` and ${s.ids.length - s.real} of filling` : "") +
    `; in this view ${masked.length} are masked.` + (data.note ? ` Here ${data.note}.` : "");
  here = -1;
  if (masked.length) explain(masked[0]);
  else says.replaceChildren(make("p", "", "Nothing is masked in this view."));
};

text.addEventListener("mouseover", (e) => {
  const at = e.target.closest("[data-at]");
  if (!at) return;
  if (at.dataset.mark || chunkAt(data.samples[sample].views[view], +at.dataset.at)) explain(+at.dataset.at);
});
text.addEventListener("focusin", (e) => {
  const at = e.target.closest("[data-mark]");
  if (at) explain(+at.dataset.at);
});
text.addEventListener("click", (e) => {
  const at = e.target.closest("[data-mark]");
  if (at) go(+at.dataset.at, true);
});
text.addEventListener("keydown", (e) => {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const last = masked.length - 1, k = masked.indexOf(here);
  let to = null;
  if (e.key in steps) to = Math.min(last, Math.max(0, k + steps[e.key]));
  else if (e.key === "Home") to = 0;
  else if (e.key === "End") to = last;
  if (to !== null && masked.length) { e.preventDefault(); go(masked[to], true); }
});
const choose = (k) => {
  sample = (k + data.samples.length) % data.samples.length;
  view = Math.min(view, data.samples[sample].views.length - 1);
  pick.value = sample;
  draw();
};
data.samples.forEach((s, k) => {
  const answer = s.ids.filter((_, i) => s.views[0].states[i] !== "prompt").slice(0, 12);
  const begin = seen(answer.map(word).join("")).slice(0, 40);
  const option = make("option", "", `${k + 1}. ${s.split}: ${begin}`);
  option.value = k;
  pick.append(option);
});
pick.addEventListener("change", () => choose(+pick.value));
find(".back").addEventListener("click", () => choose(sample - 1));
find(".on").addEventListener("click", () => choose(sample + 1));
find(".cover input").addEventListener("change", (e) => text.classList.toggle("covered", e.target.checked));
const present = new Set(data.samples.flatMap((s) => s.views.flatMap((v) => v.states)));
for (const [state, [cls]] of Object.entries(marks))
  if (!present.has(state)) root.querySelector(`.legend .${cls}`).remove();
if (data.kind === "cross") says.style.minHeight = "6rem";
if (data.samples.length) { view = middle(data.samples[0]); draw(); }
else { find(".bar").hidden = true; says.textContent = "The dataset has no samples."; }
"""
