"""The style sheets of the report, as text: one for plots (also alone, in a README), one for the page.

The line colours are those of Okabe and Ito, which stay apart for colour-blind readers, darkened or
lightened until they have a contrast of at least 3 to their ground; lines also differ in their dashes.
"""

from __future__ import annotations

PLOT = """
.plot { --c0:#0a67ad; --c1:#bf4a00; --c2:#00785a; --c3:#9a4f86; --ink:#1e2530; --soft:#5a6371; --hair:#e3e1dc;
  --ground:#ffffff; }
@media (prefers-color-scheme: dark) { .plot { --c0:#5cb3f2; --c1:#f5a04c; --c2:#3ecf9f; --c3:#dd9bcb;
  --ink:#e9ebee; --soft:#a7aeb9; --hair:#323842; --ground:#1b1f26; } }
.plot text { font:12px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;
  fill:var(--soft); }
.plot text.key, .plot text.value { fill:var(--ink); }
.plot .grid { stroke:var(--hair); stroke-width:1; }
.plot .axis { stroke:var(--soft); stroke-width:1; }
.plot .line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.plot .line0 { stroke:var(--c0); } .plot .line1 { stroke:var(--c1); }
.plot .line2 { stroke:var(--c2); stroke-dasharray:7 4; }
.plot .line3 { stroke:var(--c3); stroke-dasharray:2 4; }
.plot .fill0 { fill:var(--c0); } .plot .fill1 { fill:var(--c1); }
.plot .fill2 { fill:var(--c2); } .plot .fill3 { fill:var(--c3); }
.plot .band { opacity:.18; } .plot .band0 { fill:var(--c0); } .plot .band1 { fill:var(--c1); }
.plot .band2 { fill:var(--c2); } .plot .band3 { fill:var(--c3); }
.plot .target { fill:transparent; }
.plot .ground { fill:var(--ground); }
"""

PAGE = """
:root { color-scheme:light dark; --bg:#f7f6f3; --card:#ffffff; --ink:#1e2530; --soft:#5a6371; --hair:#e3e1dc;
  --good:#00684d; --bad:#a83c00; --mark:#fdf1d3; --accent:#0a67ad; }
@media (prefers-color-scheme: dark) { :root { --bg:#13161b; --card:#1b1f26; --ink:#e9ebee; --soft:#a7aeb9;
  --hair:#323842; --good:#4fd6a8; --bad:#ffa266; --mark:#3a3115; --accent:#5cb3f2; } }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; }
body { margin:0; background:var(--bg); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif; }
main { max-width:1120px; margin:0 auto; padding:40px 20px 64px; }
header { margin-bottom:28px; }
.run { margin:0 0 10px; font-size:15px; font-weight:600; color:var(--soft); overflow-wrap:anywhere; }
h1 { margin:0; font-size:clamp(22px,3.6vw,34px); line-height:1.25; font-weight:650;
  letter-spacing:-.015em; text-wrap:balance; overflow-wrap:anywhere; }
.second { margin:12px 0 0; font-size:17px; color:var(--soft); max-width:66ch; }
.status { margin:14px 0 0; color:var(--soft); font-size:14px; }
section { background:var(--card); border:1px solid var(--hair); border-radius:14px; padding:22px 22px 24px;
  margin:0 0 20px; min-width:0; }
h2 { margin:0 0 4px; font-size:20px; line-height:1.3; font-weight:650; letter-spacing:-.01em; }
h3 { margin:18px 0 8px; font-size:15px; font-weight:650; }
p { margin:0 0 14px; max-width:72ch; } p:last-child { margin-bottom:0; }
.lead, .absent, figcaption, small { color:var(--soft); font-size:14px; line-height:1.45; }
.pairs { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(190px,46%),1fr));
  gap:18px 14px; margin:0; padding:0; list-style:none; }
.pairs li { min-width:0; }
.shots { display:grid; grid-template-columns:1fr 1fr; gap:4px; }
.shots figure { position:relative; margin:0; }
img { display:block; width:100%; height:auto; border-radius:5px; background:var(--hair); }
img.pixels { image-rendering:pixelated; }
.shots figcaption { display:flex; justify-content:space-between; font-size:12px; padding:3px 2px 0; }
.shots .right, .shots .wrong { font-size:15px; line-height:1; }
.right { color:var(--good); font-weight:700; } .wrong { color:var(--bad); font-weight:700; }
.prompt { margin:3px 0 0; font-size:14px; line-height:1.35; overflow-wrap:anywhere; }
.score { margin:1px 0 0; font-size:13px; color:var(--soft); font-variant-numeric:tabular-nums; }
.scroll { overflow-x:auto; -webkit-overflow-scrolling:touch; margin:0 -4px; padding:0 4px; }
.scroll:focus-visible, summary:focus-visible { outline:2px solid var(--accent); outline-offset:2px;
  border-radius:6px; }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums; }
th, td { text-align:left; padding:8px 14px 8px 0; border-bottom:1px solid var(--hair); vertical-align:top; }
th { font-weight:600; color:var(--soft); white-space:nowrap; } tbody th { color:var(--ink); }
tr:last-child > * { border-bottom:0; }
td.n, th.n { text-align:right; white-space:nowrap; padding:8px 4px 8px 14px; }
tr.changed { background:var(--mark); } tr.changed > :first-child { padding-left:8px;
  box-shadow:inset 3px 0 var(--bad); }
td code { overflow-wrap:anywhere; }
code, pre { font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; }
pre { margin:0; overflow-x:auto; padding:12px 14px; background:var(--bg); border-radius:8px; }
.plots { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr)); gap:26px 24px; }
.plots figure { margin:0; min-width:0; } .plots h3 { margin:0 0 2px; }
.plot { display:block; width:100%; height:auto; margin-top:6px; }
.plots .plot { max-width:460px; } .plots > * { min-width:0; }
.hero { margin:0 0 26px; } .hero h3 { margin-top:14px; margin-bottom:2px; } .hero .narrow { display:none; }
.walk { width:auto; } .walk img { width:clamp(56px,6.6vw,84px); border-radius:3px; }
.walk tbody th[scope=row] { position:sticky; left:-4px; padding:3px 8px 3px 4px; background:var(--card); }
.walk th span { position:sticky; left:0; display:inline-block; max-width:calc(100vw - 70px); }
.walk th, .walk td { padding:3px 4px 3px 0; border:0; vertical-align:middle; font-size:12px; }
.walk tbody th[colspan] { padding-top:12px; font-size:14px; white-space:normal; }
details { margin-top:16px; } summary { cursor:pointer; color:var(--accent); font-size:14px; padding:4px 0; }
.sheets { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr)); gap:16px; }
.sheets figure { margin:0; }
@media (max-width:640px) { main { padding:24px 12px 48px; } section { padding:18px 14px 20px; }
  table { font-size:13px; } th, td { padding-right:8px; } th { white-space:normal; }
  td.n, th.n { padding-left:8px; } th.n { white-space:normal; }
  .hero .wide { display:none; } .hero .narrow { display:block; } }
@media print { body { background:#fff; } section { break-inside:avoid; } }
"""
