"""The report of a scan: one page that needs nothing, and the same as text for a ticket."""

import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from snapshot_files import area

from xfast.cli.main import main
from xfast.errors import XfastError
from xfast.fleet import run
from xfast.fleet.dataset import Dataset
from xfast.fleet.html import page
from xfast.fleet.judging import Question, Result
from xfast.fleet.summary import summarise
from xfast.hosts import resolve
from xfast.judge.verdict import Finding, Judgement, Policy, Verdict

pytest.importorskip("pyarrow", reason="needs pyarrow")

EXAMPLES = Path(__file__).parents[2] / "examples" / "snapshots"
NAMES = ("intel-broadwell@6.12", "amd-milan@6.12", "amd-milan")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    for path in EXAMPLES.iterdir():
        shutil.copy(path, folder)
    (folder / "noise").write_bytes(bytes(100))
    (folder / "<script>alert(1)<").write_bytes(
        (EXAMPLES / "q72-kvm-bv7-xcr7-smp1.qemustate").read_bytes()
    )
    out = tmp_path_factory.mktemp("results") / "out"
    run.scan([os.fspath(folder)], [resolve(name) for name in NAMES], out, jobs=1)
    return os.fspath(out)


class Page(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_no_network_and_no_script(results):
    text = page(summarise(results))
    found = Page(text)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?://|url\(|@import", text)
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on") or a == "src"]
    assert "<script>alert(1)<" in "".join(found.words), "a name is shown, and is no markup"


def test_the_counts_are_those_of_the_dataset(results):
    summary = summarise(results)
    assert summary.count == summary.manifest["snapshots"] == 8
    assert summary.failed_count == summary.manifest["failed"] == 1
    total = sum(sum(counts.values()) for counts in summary.by_host().values())
    assert total == sum(summary.manifest["verdicts"].values())
    blocked = sum(counts["fix"] + counts["no"] for counts in summary.by_host().values())
    assert blocked == summary.manifest["verdicts"]["incompatible"]
    assert [group.nowhere for group in summary.groups].count(True) >= 1
    text = "".join(Page(page(summary)).words)
    assert text.index("Can go nowhere") < text.index("Snapshots by hosts")
    for reason in summary.reasons:
        assert reason.snapshots > 0
        assert reason.example


def test_other_formats(results, capsys):
    assert main(["report", results, "--format", "md"]) == 0
    text = capsys.readouterr().out
    assert "| snapshots | example |" in text
    assert "- **LEAK** (blocks)" in text
    assert main(["report", results, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert sum(int(row["snapshots"]) for row in rows) == 8
    assert main(["report", results, "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "xfast/report/1"
    assert answer["snapshots"] == 8
    assert set(answer["hosts"]) == set(NAMES)


def test_hosts_are_neither_formulas_nor_marks(tmp_path, capsys):
    """The head of the CSV had the names of hosts as they were."""
    hosts = [{"name": name, "xcr0": "0x7"} for name in ("=1+1", "\\<b>&lt;")]
    (tmp_path / "h.json").write_text(json.dumps({"schema": "xfast/1", "hosts": hosts}))
    (tmp_path / "vm.xsave").write_bytes(area(1, 4096))
    words = [tmp_path / "vm.xsave", "--layout", "intel", "--host", tmp_path / "h.json"]
    assert main(["scan", *map(os.fspath, words), "-o", os.fspath(tmp_path / "out")]) in (0, 3)
    capsys.readouterr()
    assert main(["report", os.fspath(tmp_path / "out"), "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("snapshots,example,class,'=1+1,")
    assert main(["report", os.fspath(tmp_path / "out"), "--format", "md"]) == 0
    shown = re.sub(r"\\\\", "", capsys.readouterr().out)  # a backslash is one, and escapes none
    assert not re.search(r"(?<!\\)[<&]", shown)


def test_nothing_is_overwritten(results, tmp_path, capsys):
    target = tmp_path / "report.html"
    assert main(["report", results, "-o", os.fspath(target)]) == 0
    before = target.read_bytes()
    assert main(["report", results, "-o", os.fspath(target)]) == 2
    assert "exists" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize("damage", ["manifest.json", "verdicts/part-0.parquet"])
def test_a_half_written_folder_is_one_line(results, tmp_path, capsys, damage):
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    (copy / damage).write_bytes(b"{")
    assert main(["report", os.fspath(copy)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(XfastError):
        summarise(os.fspath(tmp_path))


def test_a_million_snapshots_are_a_small_page(tmp_path):
    hosts = tuple(resolve("amd-milan@6.12") for _ in range(1))
    question = Question(hosts, Policy(), {})
    with Dataset(os.fspath(tmp_path / "out"), question) as dataset:
        for part in range(4):
            result = Result(snapshots=50_000)
            for kind in range(100):
                finding = Finding("LEAK", "pkru", 0, "blocks", "", "", "safe", f"why {kind}", "r")
                answer = Judgement("incompatible", "safe", (finding,))
                verdict = Verdict("", hosts[0].name, answer)
                result.classes[f"{kind:016x}"] = (verdict,)
            result.words["incompatible"] = 50_000
            for i in range(50_000):
                row = [f"s3://b/{part}/{i}", "", "raw", "vm", "kvm", "", 0, "intel", "given", 4096]
                row += [7, i % 5, 0, 7, 0, 0x1F80, 1, f"{i % 100:016x}", None]
                result.rows.append(tuple(row))
            dataset.add(f"part{part}", result)
        dataset.finish()
    summary = summarise(os.fspath(tmp_path / "out"))
    assert summary.count == 200_000
    assert len(page(summary)) < 2 << 20


CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def pixels(path):
    """The rows of an RGB or RGBA picture without interlacing, as PNG stores them."""
    data = path.read_bytes()
    width, height, depth, kind = struct.unpack_from(">IIBB", data, 16)
    size = {2: 3, 6: 4}[kind]
    assert depth == 8
    packed, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(packed)
    return width, height, size, raw


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not here")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_real_browser_draws_it(results, tmp_path, width, scheme):
    text = page(summarise(results))
    if scheme == "dark":
        text = text.replace("(prefers-color-scheme:dark)", "(min-width:1px)")
    (tmp_path / "report.html").write_text(text)
    shot = tmp_path / "shot.png"
    subprocess.run(
        [
            CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900", f"--screenshot={shot}", tmp_path / "report.html",
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found_width, height, size, raw = pixels(shot)
    assert (found_width, height) == (width, 900)
    first = raw[1 : 1 + 3]
    assert (max(first) < 64) == (scheme == "dark"), first
    assert len(set(raw[1 : 1 + size * width * 40])) > 8, "something is drawn"


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not here")
def test_no_part_of_the_page_is_wider_than_a_phone(results, tmp_path):
    measure = (
        "<script>addEventListener('load',()=>{const w=document.documentElement;"
        "document.title=w.scrollWidth+' '+w.clientWidth})</script></body>"
    )
    text = page(summarise(results)).replace("</body>", measure)
    (tmp_path / "report.html").write_text(text)
    done = subprocess.run(
        [
            CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900",
            "--virtual-time-budget=2000", "--dump-dom", tmp_path / "report.html",
        ],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    scroll, client = re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups()
    assert scroll == client
