"""The HTML page of a report: one file with its style, which needs no network and has no scripts.

It is a text of Python, since Flower's bundles of an app have no HTML files.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The key of a line of a chart: its name, the number of its color, and its dashes in CSS."""

    name: str
    color: int
    dash: str = "solid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart of a page: its title, the unit of its values, the keys of its lines, and its SVG."""

    title: str
    unit: str
    svg: Markup
    keys: Sequence[Key] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """A table of a page, which scrolls in a box of its own.

    `label` says what it is, and `left` has the columns of text, which are aligned to the left. A
    tall table may have many rows.
    """

    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int] = frozenset({0})
    is_tall: bool = False


_STYLE = """\
:root {
  color-scheme: light dark;
  --ground: #f7f7f5; --card: #ffffff; --ink: #1d1f23; --ink-soft: #5d636e; --line: #e3e4e1;
  --accent: #2457c5; --good: #1c7c4a; --warn: #9a5b00;
  --series-0: #2f6fde; --series-1: #d9730d; --series-2: #2a9d6f; --series-3: #b6439b;
  --series-4: #7257d6; --series-5: #1797ad; --series-6: #8a8f1a; --series-7: #c93c45;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --card: #1c1f25; --ink: #e8e9ec; --ink-soft: #a2a8b3; --line: #31353d;
    --accent: #86abff; --good: #62cf96; --warn: #efb35c;
    --series-0: #7aa7ff; --series-1: #f5a55a; --series-2: #5ccfa0; --series-3: #ea8fd2;
    --series-4: #ab98ff; --series-5: #5fd0e3; --series-6: #cfd35c; --series-7: #ff8a90;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0; font-weight: 650; }
h2 { font-size: 17px; line-height: 1.3; margin: 44px 0 12px; font-weight: 650; }
p { margin: 0 0 10px; max-width: 76ch; }
a { color: var(--accent); }
code, pre { font: 13px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.soft { color: var(--ink-soft); }
.after { margin: 10px 0 0; }
.top { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; }
.top + p, h1 + p { margin-top: 8px; max-width: none; }
.state {
  font-size: 13px; line-height: 1; padding: 6px 10px; border-radius: 99px;
  color: var(--warn); border: 1px solid currentColor;
}
.state.finished { color: var(--good); }
.headline {
  display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 16px;
  margin: 28px 0 0;
}
.headline div, .charts figure, .box {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.headline div { padding: 16px 18px; }
.headline dt { font-size: 13px; color: var(--ink-soft); }
.headline dd { margin: 0; }
.headline .value { font-size: 28px; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em; }
.headline .value, td, .chart-values { font-variant-numeric: tabular-nums; }
.headline .unit { font-size: 15px; font-weight: 400; letter-spacing: 0; color: var(--ink-soft); }
.charts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 16px; }
.charts figure {
  margin: 0; padding: 14px 14px 8px; min-width: 0; display: flex; flex-direction: column;
  justify-content: space-between;
}
.charts figcaption { font-size: 14px; margin-bottom: 8px; }
.charts figcaption b { font-weight: 600; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--ink-soft); }
.key { display: inline-flex; align-items: center; gap: 7px; }
.key i { width: 18px; flex: none; border-top: 3px solid; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow: auto; }
.tall { max-height: 520px; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; }
th, td {
  padding: 8px 12px; overflow-wrap: break-word; text-align: right; vertical-align: top;
  white-space: nowrap; border-bottom: 1px solid var(--line);
}
tr:last-child > * { border-bottom: 0; }
thead th {
  position: sticky; top: 0; z-index: 1; background: var(--card); vertical-align: bottom;
  border-bottom: 1px solid var(--line); font-weight: 500; font-size: 13px; color: var(--ink-soft);
}
th.left, td.left { text-align: left; white-space: normal; }
tbody th { font-weight: 500; text-align: left; white-space: normal; min-width: 80px; }
.note { font-weight: 400; font-size: 13px; line-height: 1.45; color: var(--ink-soft); }
tbody th .note { display: block; max-width: 76ch; }
.bar { display: inline-block; width: 96px; height: 7px; margin-right: 10px; border-radius: 4px;
  background: var(--line); vertical-align: 1px; overflow: hidden; }
.percent { display: inline-block; min-width: 56px; }
.bar i { display: block; height: 100%; background: var(--series-0); }
blockquote {
  margin: 0; padding: 16px 18px; font-family: ui-serif, Georgia, "Noto Serif", serif;
  font-size: 16px;
}
.commands { padding: 4px 18px; margin: 0; }
.commands div { padding: 10px 0; border-bottom: 1px solid var(--line); }
.commands div:last-child { border-bottom: 0; }
.commands dt { font-size: 13px; color: var(--ink-soft); }
.commands dd { margin: 2px 0 0; }
.commands pre { margin: 0; white-space: pre-wrap; user-select: all; }
.notice { padding: 14px 18px; }
.notice p:last-child { margin: 0; }
.told {
  display: grid; align-items: start; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr);
  gap: 16px;
}
.told .charts { grid-template-columns: minmax(0, 1fr); }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
details > .scroll { margin-top: 12px; }
footer { margin-top: 48px; font-size: 13px; color: var(--ink-soft); }
@media (max-width: 900px) {
  .headline { grid-auto-flow: row; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .charts, .told { grid-template-columns: minmax(0, 1fr); }
  .charts figure { max-width: 460px; }
}
@media (max-width: 480px) {
  main { padding: 24px 16px 48px; }
  h1 { font-size: 24px; }
  .headline { gap: 10px; }
  .headline div { padding: 12px 14px; }
  .headline .value { font-size: 20px; }
  .headline .unit { font-size: 13px; }
  th, td { padding: 8px 10px; }
  tbody th:first-child { position: sticky; left: 0; background: var(--card); }
  thead th:first-child { left: 0; z-index: 2; }
  .bar { width: 56px; }
}
@media print {
  .tall { max-height: none; }
  .scroll { overflow: visible; }
}
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
{{ style }}</style>
</head>
<body>
<main>
{% block main %}{% endblock %}
<footer>Made by fedsplit {{ version }} from the files of runs. This page loads nothing.</footer>
</main>
</body>
</html>
"""

_PARTS = """\
{% macro headline(all) %}
<dl class="headline">
{% for each in all %}
<div>
<dt>{{ each.name }}</dt>
<dd class="value">{{ each.value }} <span class="unit">{{ each.unit }}</span></dd>
<dd class="note">{{ each.note }}</dd>
</div>
{% endfor %}
</dl>
{% endmacro %}

{% macro keys(all) %}
<span class="keys">
{% for key in all %}
<span class="key"><i style="color: var(--series-{{ key.color }}); border-top-style: {{ key.dash }}">
</i>{{ key.name }}</span>
{% endfor %}
</span>
{% endmacro %}

{% macro charts(all) %}
<div class="charts">
{% for each in all %}
<figure>
<figcaption><b>{{ each.title }}</b> <span class="soft">{{ each.unit }}</span>
{% if each.keys %}
{{ keys(each.keys) }}
{% endif %}
</figcaption>
{{ each.svg }}
</figure>
{% endfor %}
</div>
{% endmacro %}

{% macro table(it) %}
<div class="box scroll{{ " tall" if it.is_tall }}" tabindex="0" role="region"
  aria-label="{{ it.label }}">
<table>
<thead><tr>
{% for head in it.heads %}
<th scope="col"{% if loop.index0 in it.left %} class="left"{% endif %}>{{ head }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in it.rows %}
<tr>
{% for cell in row %}
{% if loop.first %}
<th scope="row">{{ cell }}</th>
{% else %}
<td{% if loop.index0 in it.left %} class="left"{% endif %}>{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}

{% macro commands(all) %}
<h2>Go on</h2>
<dl class="box commands">
{% for what, command in all %}
<div><dt>{{ what }}</dt><dd><pre>{{ command }}</pre></dd></div>
{% endfor %}
</dl>
{% endmacro %}
"""


def noted(text: str, note: str) -> Markup:
    """Return a cell of a table: a text with a note below it."""
    return Markup('{} <span class="note">{}</span>').format(text, note)


def render(main: str, content: Mapping[str, Any]) -> str:
    """Return a page.

    Args:
        main: The jinja template of its main part: a child of "page", with macros of "parts". All
            texts of `content` are escaped, except `Markup`.
        content: The variables of the template.
    """
    templates = DictLoader({"page": _PAGE, "parts": _PARTS, "main": main})
    environment = Environment(
        loader=templates,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("main").render(
        content, style=Markup(_STYLE), version=version("fedsplit")
    )
