"""The look of the page: light and dark by the reader's preference, wide tables scroll."""

STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2329; --dim: #5c6773; --back: #ffffff; --soft: #f4f6f8; --line: #d9dee3;
  --link: #0b62b0; --mark: #e8f2fb; --grid: #e2e6ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e8ec; --dim: #9aa6b2; --back: #14181c; --soft: #1d2329; --line: #343d46;
    --link: #6cb6ff; --mark: #1b3147; --grid: #2c343c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.8rem; }
h2 { margin: 3rem 0 .5rem; font-size: 1.35rem; }
h3 { margin: 2.5rem 0 .25rem; font-size: 1.15rem; }
h4 { margin: 1.25rem 0 .25rem; font-size: .8rem; color: var(--dim); font-weight: 600;
  text-transform: uppercase; letter-spacing: .06em; }
a { color: var(--link); }
.sub, .caption, figcaption { color: var(--dim); }
.caption { max-width: 70rem; font-size: .85rem; margin-top: .75rem; }
.caption p { margin: 0 0 .15rem; }
.caption p:first-child { color: var(--text); font-weight: 600; }
.reading { max-width: 60rem; }
.chips { display: flex; gap: .4rem; flex-wrap: wrap; }
.chip { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; font-size: .85rem;
  white-space: nowrap; border: 1px solid var(--line); background: var(--soft); }
.chip.ok { border-color: #2f9e5b; }
.chip.oom, .chip.failed, .chip.diverged { border-color: #d1473a; }
.chip.timeout, .chip.interrupted, .chip.invalid, .chip.skipped { border-color: #c98a12; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { padding: .4rem .55rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { vertical-align: bottom; background: var(--soft); font-weight: 600; }
th { white-space: normal; }
th.number { min-width: 5.5rem; }
th .sub { display: block; font-weight: 400; font-size: .75rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.ci { display: block; color: var(--dim); font-size: .9em; }
tr.reference td { color: var(--dim); }
tr.baseline td { background: var(--mark); }
td:first-child { font-weight: 600; }
.notes { font-size: .85rem; margin: .75rem 0 0; padding-left: 1.6rem; }
.notes li, code { overflow-wrap: anywhere; }
details p { margin: .3rem 0; white-space: normal; }
summary { cursor: pointer; white-space: nowrap; }
code { display: block; min-width: 22rem; white-space: pre-wrap; font-size: .8rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, monospace; }
.runs td { white-space: normal; }
.runs td:nth-child(2), .runs td:nth-child(4), .runs td:nth-child(5) { white-space: nowrap; }
.figures figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
.figures { display: grid; gap: 1.5rem; margin-top: 2rem;
  grid-template-columns: minmax(0, 1fr); }
@media (min-width: 1100px) { .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 6px;
  min-width: 0; }
figcaption { font-size: .85rem; }
figcaption strong { display: block; color: var(--text); font-size: 1rem; }
.plot text { fill: var(--text) !important; }
.plot .gridlayer path { stroke: var(--grid) !important; }
.plot .errorbar path, .plot path.xerror, .plot path.yerror { opacity: .8; }
.plot .bars path.xerror { stroke: var(--text) !important; }
.plot .hoverlayer text { fill: #ffffff !important; }
@media print { details[open] summary { display: none; } .scroll { overflow: visible; } }
"""
