"""The report of a scan as one page: no script, no network, light and dark, wide and narrow.

What can go nowhere stands first, then the matrix of groups and hosts, the reasons by rule, what
each host blocks, and what the fleet is made of. Whatever comes from a file is escaped.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files

from xfast.errors import escape
from xfast.fleet.summary import NAMED, WORDS, Group, Summary
from xfast.judge.rules import RULES
from xfast.report.tally import counted
from xfast.xsave.features import names_of

ROWS = 250
"""How many groups the matrix shows, the largest first."""

REASONS = 12
"""How many texts of a rule are shown."""

MEANINGS = {
    "ok": "restorable",
    "risk": "restorable, with a risk",
    "fix": "xfast fix makes it restorable, nothing is lost",
    "no": "not restorable",
    "?": "unknown: a fact is missing",
}


def page(summary: Summary) -> str:
    """Return the page."""
    parts = [
        *_head(summary),
        *_nowhere(summary),
        *_matrix(summary),
        *_reasons(summary),
        *_hosts(summary),
        *_populations(summary),
        *_failed(summary),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>xfast report: {counted(summary.count, 'snapshot')}</title>"
        f"<style>{_style()}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _style() -> str:
    return files(__package__).joinpath("report.css").read_text("utf-8")


def _text(value: object) -> str:
    """Return a value as text for a page: what does not print and what is markup is escaped."""
    text = str(value)
    shown = "".join(c if c.isprintable() else escape(c) for c in text)
    return html.escape(shown)


def _head(summary: Summary) -> Iterator[str]:
    totals: Counter[str] = Counter()
    for counts in summary.by_host().values():
        totals.update(counts)
    somewhere = sum(group.count for group in summary.groups if not group.nowhere)
    cards = {
        "snapshots judged": summary.count,
        "go to at least one host": somewhere,
        "go to none as they are": summary.count - somewhere,
        "pairs that a safe fix clears": totals["fix"],
        "inputs not judged": summary.failed_count,
    }
    yield "<h1>Which snapshots can be restored where</h1>"
    level = _text(summary.manifest.get("level", ""))
    yield (
        f"<p class=soft>{counted(summary.count, 'snapshot')}, "
        f"{counted(len(summary.hosts), 'host')}, level {level}</p>"
    )
    shown = "".join(f"<div class=card><b>{n:,}</b>{name}</div>" for name, n in cards.items())
    yield f"<div class=cards>{shown}</div>"


def _names(group: Group) -> str:
    """Return a group's names: the first one, the others to unfold."""
    if not group.names:
        return ""
    first = f"<span class=name>{_text(group.names[0])}</span>"
    if group.count == 1:
        return first
    items = "".join(f"<li class=name>{_text(name)}</li>" for name in group.names[1:])
    rest = group.count - len(group.names)
    more = f"<li class=soft>and {rest:,} more: class {_text(group.name)}</li>" if rest else ""
    return (
        f"{first}<details><summary>and {group.count - 1:,} more like it</summary>"
        f"<ul>{items}{more}</ul></details>"
    )


def _nowhere(summary: Summary) -> Iterator[str]:
    groups = [group for group in summary.groups if group.nowhere]
    yield "<h2>Can go nowhere</h2>"
    if not groups:
        yield "<p>Every snapshot can go to at least one of these hosts, or may.</p>"
    for group in groups[:NAMED]:
        codes: dict[str, None] = {}
        for answer in group.answers:
            codes.update(dict.fromkeys(answer["codes"] or ()))
        why = "; ".join(
            f"<b>{_text(code)}</b> {RULES[code].title}" for code in codes if code in RULES
        )
        fixed = [
            host for host, word in zip(summary.hosts, group.words, strict=True) if word == "fix"
        ]
        help_ = (
            f"<p>xfast fix clears it, for {', '.join(map(_text, fixed[:6]))}"
            f"{f' and {len(fixed) - 6} more' if fixed[6:] else ''}:<br>"
            f"<code>xfast fix {_text(group.names[0] if group.names else 'SNAPSHOT')} --host "
            f"{_text(repr(fixed[0]) if ' ' in fixed[0] else fixed[0])} -o FIXED</code></p>"
            if fixed
            else "<p class=soft>No fix helps without loss.</p>"
        )
        yield (
            f"<div class=alarm><b>{counted(group.count, 'snapshot')}</b>: {why}"
            f"<div>{_names(group)}</div>{help_}</div>"
        )
    if groups[NAMED:]:
        rest = sum(group.count for group in groups[NAMED:])
        more = len(groups) - NAMED
        yield f"<p class=soft>and {counted(rest, 'snapshot')} in {counted(more, 'more group')}</p>"


def _css(word: str) -> str:
    return "q" if word == "?" else word


def _key(words: Iterable[str]) -> str:
    used = set(words)
    items = "".join(
        f"<span><b class={_css(word)}>{word}</b>{MEANINGS[word]}</span>"
        for word in WORDS
        if word in used
    )
    return f"<div class=key>{items}</div>"


def _matrix(summary: Summary) -> Iterator[str]:
    yield "<h2>Snapshots by hosts</h2>"
    yield _key(word for group in summary.groups for word in group.words)
    heads = "".join(f"<th>{_text(host)}</th>" for host in summary.hosts)
    yield f"<div class=wide><table><tr><th class=n>count<th>snapshots{heads}</tr>"
    for group in summary.groups[:ROWS]:
        cells = "".join(
            f'<td class="cell {_css(word)}" title="{_text(" ".join(answer["codes"] or ()))}">{word}'
            for word, answer in zip(group.words, group.answers, strict=True)
        )
        yield f"<tr><td class=n>{group.count:,}<td>{_names(group)}{cells}</tr>"
    yield "</table></div>"
    if summary.groups[ROWS:]:
        rest = sum(group.count for group in summary.groups[ROWS:])
        more = len(summary.groups) - ROWS
        yield f"<p class=soft>and {counted(rest, 'snapshot')} in {more} smaller groups</p>"


def _reasons(summary: Summary) -> Iterator[str]:
    yield "<h2>Why, by rule</h2>"
    if not summary.reasons:
        yield "<p>Nothing blocks, and nothing is risky.</p>"
    for code, rule in RULES.items():
        reasons = [reason for reason in summary.reasons if reason.code == code]
        if not reasons:
            continue
        yield f"<p><b>{code}</b>: {_text(rule.title)}</p><ul>"
        for reason in reasons[:REASONS]:
            fix = "" if reason.fix == "none" else f", {reason.fix} fix"
            hosts = f"{len(reason.hosts)} of {counted(len(summary.hosts), 'host')}"
            yield (
                f"<li><b>{counted(reason.snapshots, 'snapshot')}</b>, {hosts} "
                f"<span class=soft>({_text(reason.severity)}{fix})</span>: {_text(reason.why)}"
                f"<br><span class=soft>for example</span> "
                f"<span class=name>{_text(reason.example)}</span></li>"
            )
        if reasons[REASONS:]:
            rest = counted(len(reasons) - REASONS, "more text")
            yield f"<li class=soft>and {rest}: the findings table</li>"
        yield f"</ul><p class=soft>{_text(rule.next)}</p>"


def _hosts(summary: Summary) -> Iterator[str]:
    yield "<h2>What each host takes</h2><div class=wide><table><tr><th>host"
    yield "".join(f"<th class=n>{word}" for word in WORDS) + "<th>blocked most by</tr>"
    codes: dict[str, Counter[str]] = {host: Counter() for host in summary.hosts}
    for group in summary.groups:
        for host, answer in zip(summary.hosts, group.answers, strict=True):
            for code in answer["codes"] or ():
                codes[host][code] += group.count
    for host, counts in summary.by_host().items():
        most = ", ".join(f"{code} {n:,}" for code, n in codes[host].most_common(3))
        numbers = "".join(f"<td class=n>{counts[word]:,}" for word in WORDS)
        yield f"<tr><td>{_text(host)}{numbers}<td>{_text(most)}</tr>"
    yield "</table></div>"


def _populations(summary: Summary) -> Iterator[str]:
    yield "<h2>What the fleet is made of</h2><div class=wide><table>"
    for title, numbers in (
        ("XSTATE_BV", {f"{bv:#x} {names_of(bv)}": n for bv, n in summary.xstate_bv.items()}),
        ("layout", summary.layouts),
        ("format", summary.formats),
    ):
        total = sum(numbers.values()) or 1
        noun = "snapshots" if title == "format" else "vCPUs"
        yield f"<tr><th>{title}<th class=n>{noun}<th></tr>"
        for name, number in Counter(numbers).most_common(NAMED):
            bar = f'<span class=bar style="width:{max(1, round(160 * number / total))}px"></span>'
            yield f"<tr><td class=name>{_text(name)}<td class=n>{number:,}<td>{bar}</tr>"
    yield "</table></div>"


def _failed(summary: Summary) -> Iterator[str]:
    if not summary.failed_count:
        return
    yield f"<h2>Not judged: {counted(summary.failed_count, 'input')}</h2><ul>"
    for name, error in summary.failed:
        yield f"<li class=name>{_text(error if name in error else f'{name}: {error}')}</li>"
    rest = summary.failed_count - len(summary.failed)
    if rest:
        yield f"<li class=soft>and {rest:,} more: rows of the snapshots table with an error</li>"
    yield "</ul>"
