"""The frame of a report page: style, theme, and the script that draws its figures."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1c2024; --quiet: #5b636b; --rule: #dfe3e6;
  --stripe: rgba(90,110,130,.07); --shadow: rgba(0,0,0,.28);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --text: #e4e7ea; --quiet: #9ba4ac; --rule: #343a40;
    --stripe: rgba(150,170,190,.07); --shadow: rgba(0,0,0,.75);
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 12px; }
header p { max-width: 72ch; margin: 0 0 10px; color: var(--quiet); }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 20px 22px; margin-top: 22px;
}
.scroll {  /* a shadow at an edge says that the table goes on there */
  overflow-x: auto;
  background:
    linear-gradient(to right, var(--card) 30%, transparent) left / 40px 100% no-repeat local,
    linear-gradient(to left, var(--card) 30%, transparent) right / 40px 100% no-repeat local,
    radial-gradient(farthest-side at 0 50%, var(--shadow), transparent) left / 12px 100% no-repeat scroll,
    radial-gradient(farthest-side at 100% 50%, var(--shadow), transparent) right / 12px 100% no-repeat scroll;
}
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 11px; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--stripe); }
tbody tr:last-child td { border-bottom: 0; }
.left { text-align: left; }
.right { text-align: right; }
tbody td { vertical-align: top; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.note, figcaption { color: var(--quiet); font-size: .875rem; margin: 10px 0 0; max-width: 80ch; }
figure { margin: 0; }
.plot { width: 100%; }
.notes { margin: 0; padding-left: 1.2em; }
.notes li { margin: 4px 0; max-width: 80ch; }
@media (max-width: 600px) {
  main { padding: 20px 12px 40px; }
  section { padding: 14px 12px; border-radius: 8px; }
  h1 { font-size: 1.4rem; }
  th, td { padding: 6px 9px; }
}
@media print { section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header><h1>$title</h1>$intro</header>
<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>
$sections
</main>
<script>$plotly</script>
<script type="application/json" id="figures">$figures</script>
<script>
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = matchMedia("(max-width: 600px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const size = () => (narrow.matches ? 11 : 13);
  const lines = (text) => narrow.matches ? text.replace(/(.{30}\\S*) /g, "$$1<br>") : text;
  const axis = (own) => ({
    automargin: true, gridcolor: colour("--rule"), linecolor: colour("--rule"),
    zerolinecolor: colour("--quiet"), ...own,
    title: { text: lines(own.title?.text ?? ""), font: { size: size() }, standoff: 10 },
  });
  const legendRows = (data) =>
    narrow.matches ? Math.ceil(data.filter((d) => d.showlegend !== false).length / 2) : 0;
  const layout = (own, data) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: size(), color: colour("--text") },
    margin: { l: 12, r: 12, t: 12, b: 12 },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--rule"),
      font: { color: colour("--text") } },
    ...own, xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
    height: own.height + (own.showlegend ? 20 * legendRows(data) : 0),
  });
  const trace = (own) =>
    own.error_x ? { ...own, error_x: { ...own.error_x, color: colour("--text") } } : own;
  const options = { responsive: true, displayModeBar: false };
  const draw = () => figures.forEach((f, i) =>
    Plotly.react(`figure-$${i}`, f.data.map(trace), layout(f.layout, f.data), options));
  draw();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
})();
</script>
$widgets
</body>
</html>
""")
