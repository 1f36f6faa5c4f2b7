"""The HTML page of a report: one file, no requests, text of models and data sets escaped."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, StrictUndefined

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1a1a1a; --back: #ffffff; --soft: #f3f4f6; --line: #d4d7dd;
  --quiet: #555b66; --warn: #8a3b00; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #15181c; --soft: #20252b;
  --line: #3b424c; --quiet: #a5adb8; --warn: #f0a35e; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.55rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; }
tbody th { font-weight: 600; min-width: 8rem; max-width: 16rem; overflow-wrap: anywhere; }
tr.reference { background: var(--soft); }
td.text { min-width: 7rem; white-space: pre-wrap; }
.note { color: var(--quiet); font-size: 0.875rem; max-width: 45rem; }
.warning { color: var(--warn); font-weight: 600; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
figure.plot img { width: 700px; }
figcaption { color: var(--quiet); font-size: 0.875rem; }
@media print {
  :root { --text: #000000; --back: #ffffff; --soft: #f3f4f6; --line: #bbbbbb; --quiet: #444444; }
  body { margin: 0; max-width: none; font-size: 11pt; }
  h2 { break-after: avoid; } tr, figure { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: 0.15rem 0.4rem; }
  figure.plot img { width: 15cm; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>
{% endfor %}
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.rows %}
<div class="scroll"><table>
{% if section.columns %}
<thead><tr>{% for column in section.columns %}<th scope="col" class="{{ section.kinds[loop.index0] }}">\
{{ column }}</th>{% endfor %}</tr></thead>
{% endif %}
<tbody>
{% for row in section.rows %}
<tr{% if row[0] in references %} class="reference"{% endif %}>{% for cell in row %}\
{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}\
<td class="{{ section.kinds[loop.index0] }}">{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% for picture in section.pictures %}
<figure{% if picture.plot %} class="plot"{% endif %}>\
<img src="data:image/png;base64,{{ picture.png | base64 }}" alt="{{ picture.caption }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
{% if section.note %}<p class="note">{{ section.note }}</p>{% endif %}
</section>
{% endfor %}
</body>
</html>
"""


def render(**content: Any) -> str:
    """Return the page.

    Parameters
    ----------
    content
        ``title``; ``warnings``, lines; ``sections`` (`report.Section`); ``references``, first cells of rows
        that others are compared with.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.from_string(_TEMPLATE).render(**content)
