"""Which pictures has the logit lens seen, and what did it find? An index.html over a folder of lens
pages: thumbnails, prompts, top words, search, 20 a page.

    python scripts/logit_lens/generate_overview.py outputs/logit_lens outputs/logit_lens

The second folder, made if need be, may be another one: the links are relative to it. What a page of
create_logit_lens.py shows about itself is read from its head; of any other HTML file only the name
is shown. On the tiny model the words under a picture are the shapes and colours in it.
"""

import os
import re
from pathlib import Path
from urllib.parse import quote

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.lens_page import json_block, read_facts, write_html

TEMPLATE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="@@POLICY@@">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Logit lens overview</title>
<style>
:root { --bg: #f5f6f8; --card: #fff; --ink: #1a1f27; --soft: #5d6775; --line: #dde1e7; --hover: #eef2f7; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #0f1216; --card: #171b21; --ink: #e6e9ee; --soft: #97a2b1; --line: #2a313b; --hover: #1f252e; --accent: #56b4e9; }
}
* { box-sizing: border-box; scrollbar-width: thin; scrollbar-color: color-mix(in srgb, var(--soft) 45%, transparent) transparent; }
[hidden] { display: none !important; }
html, body { height: 100%; margin: 0; }
body { display: grid; grid-template-columns: 330px minmax(0, 1fr); background: var(--bg); color: var(--ink); }
body { font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
nav { display: flex; flex-direction: column; min-height: 0; background: var(--card); border-right: 1px solid var(--line); }
.top { padding: 14px 14px 10px; border-bottom: 1px solid var(--line); }
h1 { font-size: 17px; margin: 0 0 8px; letter-spacing: -0.01em; }
input, button { font: inherit; color: inherit; }
#search { width: 100%; border: 1px solid var(--line); border-radius: 6px; padding: 5px 10px; background: var(--bg); }
#count { color: var(--soft); font-size: 12px; margin: 6px 0 0; }
#list { list-style: none; margin: 0; padding: 6px; overflow: auto; flex: 1; }
#list a { display: grid; grid-template-columns: 72px minmax(0, 1fr); gap: 2px 11px; padding: 8px; border-radius: 8px; align-items: start; }
#list a { color: inherit; text-decoration: none; }
#list a.bare { grid-template-columns: minmax(0, 1fr); }
#list a:hover { background: var(--hover); }
#list a[aria-current] { background: color-mix(in oklab, var(--accent) 16%, var(--card)); box-shadow: inset 3px 0 0 var(--accent); }
#list img { width: 72px; height: 72px; object-fit: cover; border-radius: 6px; grid-row: span 4; background: var(--line); }
#list bdi { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.name { font-weight: 600; }
.model, .prompt { color: var(--soft); font-size: 12px; }
.words { display: flex; flex-wrap: wrap; gap: 3px; height: 21px; overflow: hidden; margin-top: 2px; }
.words bdi { font-size: 11.5px; line-height: 19px; padding: 0 7px; border-radius: 10px; border: 1px solid var(--line); background: var(--bg); }
#pages { display: flex; align-items: center; justify-content: space-between; padding: 8px 12px; border-top: 1px solid var(--line); }
#pages { font-size: 13px; font-variant-numeric: tabular-nums; }
button { border: 1px solid var(--line); background: var(--card); border-radius: 6px; padding: 3px 12px; cursor: pointer; }
button:hover:enabled { background: var(--hover); } button:disabled { opacity: 0.4; cursor: default; }
main { display: flex; flex-direction: column; min-width: 0; }
#bar { display: flex; gap: 14px; padding: 7px 16px; font-size: 13px; border-bottom: 1px solid var(--line); background: var(--card); }
#bar bdi { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; flex: 1; color: var(--soft); }
#bar a { color: var(--accent); flex: none; }
#viewer { flex: 1; border: 0; width: 100%; background: var(--bg); }
@media (max-width: 980px) {
  html, body { height: auto; } body { grid-template-columns: minmax(0, 1fr); }
  #list { max-height: 50vh; } #viewer { min-height: 95vh; }
}
</style>
</head>
<body>
<nav aria-label="Pages">
  <div class="top">
    <h1>Logit lens</h1>
    <input id="search" type="search" placeholder="Name, model, prompt or word" aria-label="Search" autocomplete="off" spellcheck="false">
    <p id="count" aria-live="polite"></p>
  </div>
  <ol id="list"></ol>
  <div id="pages"><button id="previous" type="button">Previous</button><span id="page"></span><button id="next" type="button">Next</button></div>
</nav>
<main>
  <div id="bar"><bdi id="opened"></bdi><a id="open" target="_blank" rel="noopener">Open in a new tab</a></div>
  <iframe id="viewer" name="viewer" title="Chosen page" sandbox="allow-scripts"></iframe>
</main>
<script type="application/json" id="data">@@DATA@@</script>
<script>
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const { entries, per_page } = JSON.parse($("data").textContent);
const texts = entries.map((e) => [e.name, e.title, e.model, e.picture, e.prompt, e.question, ...e.words].join("\n").toLowerCase());
let found = entries.map((_, i) => i), page = 0, current = -1;

const make = (tag, text, name) => {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = name;
  return node;
};
function item(i) {
  const entry = entries[i], line = document.createElement("li"), link = document.createElement("a");
  link.href = entry.link;
  link.target = "viewer";
  link.dataset.entry = i;
  link.title = entry.name;
  if (i === current) link.setAttribute("aria-current", "true");
  if (entry.thumbnail) {
    const picture = document.createElement("img");
    picture.src = entry.thumbnail;
    picture.alt = "";
    link.append(picture);
  } else link.className = "bare";
  link.append(make("bdi", entry.picture || entry.name, "name"));
  if (entry.model) link.append(make("bdi", entry.model, "model"));
  if (entry.question || entry.prompt) link.append(make("bdi", entry.question || entry.prompt, "prompt"));
  if (entry.words.length) {
    const words = make("span", "", "words");
    words.append(...entry.words.map((word) => make("bdi", word, "word")));
    link.append(words);
  }
  line.append(link);
  return line;
}
function draw() {
  const pages = Math.max(1, Math.ceil(found.length / per_page));
  page = Math.max(0, Math.min(pages - 1, page));
  $("list").replaceChildren(...found.slice(page * per_page, (page + 1) * per_page).map(item));
  $("list").scrollTop = 0;
  $("count").textContent = `${found.length === entries.length ? "" : `${found.length} of `}${entries.length} page${entries.length === 1 ? "" : "s"}`;
  $("page").textContent = `${page + 1} / ${pages}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page === pages - 1;
  $("pages").hidden = pages === 1;
}
function choose(i) {
  current = i;
  $("opened").textContent = entries[i].title || entries[i].name;
  $("open").href = entries[i].link;
  for (const link of $("list").querySelectorAll("a")) {
    if (Number(link.dataset.entry) === i) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}
$("search").addEventListener("input", () => {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  found = entries.map((_, i) => i).filter((i) => words.every((word) => texts[i].includes(word)));
  page = 0;
  draw();
});
$("previous").addEventListener("click", () => { page--; draw(); });
$("next").addEventListener("click", () => { page++; draw(); });
$("list").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) choose(Number(link.dataset.entry)); // the browser follows the link into the frame
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inSearch = event.target === $("search"), links = [...$("list").querySelectorAll("a")], now = links.indexOf(document.activeElement);
  const actions = {
    ArrowDown: () => links[Math.min(links.length - 1, now + 1)]?.focus(),
    ArrowUp: () => now <= 0 ? $("search").focus() : links[now - 1].focus(),
  };
  if (inSearch) {
    actions.Enter = () => { links[0]?.focus(); links[0]?.click(); };
    actions.Escape = () => { $("search").value = ""; $("search").dispatchEvent(new Event("input")); };
  } else {
    actions["/"] = () => { $("search").focus(); $("search").select(); };
    actions.ArrowLeft = actions.PageUp = () => { page--; draw(); $("list").querySelector("a")?.focus(); };
    actions.ArrowRight = actions.PageDown = () => { page++; draw(); $("list").querySelector("a")?.focus(); };
  }
  if (!(event.key in actions)) return;
  actions[event.key]();
  event.preventDefault();
});
draw();
$("viewer").src = entries[0].link;
choose(0);
})();
</script>
</body>
</html>
"""


def natural(name):
    """Sort key: 2 before 10, case ignored where nothing else differs."""
    return [
        int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split("([0-9]+)", name))
    ], name


def link(page, folder):
    """URL of a file relative to a folder, with quoted names."""
    return quote(os.fsencode(os.path.relpath(page, folder)))


def entry(page, folder):
    """What the index shows of one page: strings and the list of its top words; whatever else an
    unknown file has in its head is left out."""
    facts = read_facts(page)
    text = {
        name: facts[name] if isinstance(facts.get(name), str) else ""
        for name in ("title", "model", "picture", "prompt", "question", "thumbnail")
    }
    if not text["thumbnail"].startswith("data:image/jpeg;base64,"):
        text["thumbnail"] = ""
    words = facts.get("top_words") if isinstance(facts.get("top_words"), list) else []
    words = [
        pair[0] for pair in words if isinstance(pair, list) and pair and isinstance(pair[0], str)
    ]
    return text | {"name": page.name, "link": link(page, folder), "words": words}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("input_dir", help="folder of lens pages")
    parser.add_argument("output_dir", help="folder for index.html")
    parser.add_argument("--per_page", type=int, default=20, help="pages listed at a time")
    args = parser.parse_args(argv)
    if args.per_page < 1:
        parser.error("--per_page counts from 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    source, target = Path(args.input_dir), Path(args.output_dir)
    if not source.is_dir():
        raise UsageError(
            f"no folder {source}; make the pages with python"
            " scripts/logit_lens/create_logit_lens.py"
        )
    pages = sorted(
        (file for file in source.glob("*.html") if file.name != "index.html" and file.is_file()),
        key=lambda file: natural(file.name),
    )
    if not pages:
        raise UsageError(
            f"{source} has no .html file besides index.html; make the pages with python"
            " scripts/logit_lens/create_logit_lens.py"
        )
    data = {"entries": [entry(page, target) for page in pages], "per_page": args.per_page}
    frames = "'self' file:"  # from a server, and from a disk
    print(
        f"wrote {write_html(target / 'index.html', TEMPLATE, {'DATA': json_block(data)}, frames)}"
    )


if __name__ == "__main__":
    cli.run(main)
