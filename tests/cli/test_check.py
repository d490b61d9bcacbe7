"""The answer of ``xfast check`` as people and scripts get it."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from snapshot_files import area

from xfast.cli.arguments import aside
from xfast.cli.main import main
from xfast.errors import escape, unescape
from xfast.judge.rules import RULES
from xfast.judge.verdict import Finding, Judgement, Verdict
from xfast.report import progress
from xfast.report.matrix import CELLS, Answer, Fleet, cell
from xfast.report.rows import cell as cell_of_csv
from xfast.report.rows import console

SNAPSHOTS = Path(__file__).parents[2] / "examples" / "snapshots"
LEAK = SNAPSHOTS / "q72-kvm-pkru-leak-bv207.qemustate"
CLEAN = SNAPSHOTS / "q72-kvm-bv7-xcr7-smp1.qemustate"
CORE = SNAPSHOTS / "kernel618-regs64-3thr.core.xz"
NO_PKU = "intel-broadwell@6.12"
HOSTS = [NO_PKU, "amd-milan@5.18", "amd-milan@6.12", "amd-genoa@6.12", "intel-icelake-server@6.12"]


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*words, columns=""):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", False)
        try:
            status = main([os.fspath(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_nothing_is_wider_than_the_terminal_and_no_word_is_broken(run, columns):
    _, whole, _ = run("check", SNAPSHOTS, "--host", *HOSTS)
    _, out, _ = run("check", SNAPSHOTS, "--host", *HOSTS, columns=str(columns))
    assert max(map(len, out.splitlines())) <= columns
    words = set(re.findall(r"\S+", whole)) | {f"[{i}]" for i in range(9)}
    assert set(re.findall(r"\S+", out)) <= words


def test_continued_lines_keep_their_indentation(run):
    _, out, _ = run("check", SNAPSHOTS, "--host", *HOSTS, columns="80")
    lines = out.splitlines()
    reasons = lines[lines.index(f"LEAK: {RULES['LEAK'].title}") :]
    assert all(line.startswith("  ") for line in reasons if line and ": " not in line[:15])


def test_columns_are_numbered_where_names_do_not_fit(run):
    _, wide, _ = run("check", SNAPSHOTS, "--host", *HOSTS, columns="200")
    _, narrow, _ = run("check", SNAPSHOTS, "--host", *HOSTS, columns="80")
    assert "[1]" not in wide
    for i, host in enumerate(HOSTS, 1):
        assert f"\n[{i}] {host}\n" in narrow


def test_equal_answers_are_one_row_with_a_count(run, tmp_path):
    for i in range(300):
        shutil.copy(LEAK, tmp_path / f"leak-{i:03}.qemustate")
        shutil.copy(CLEAN, tmp_path / f"clean-{i:03}.qemustate")
    status, out, err = run("check", tmp_path, "--host", *HOSTS, columns="100")
    assert status == 1
    assert len(out.splitlines()) < 50
    assert "clean-000.qemustate and 299 more like it" in out
    assert "600 snapshots, 5 hosts" in out
    assert "3,000 pairs" in err
    _, out, _ = run("check", tmp_path, "--host", NO_PKU, "--only", "fixable")
    assert "clean" not in out
    assert "300 snapshots" in out


def test_every_cell_says_what_the_verdict_is():
    def verdict(word, fixable="none", severity="note"):
        finding = Finding("LEAK", "pkru", 0, severity, "", "", "safe", "why", "ref")
        return Verdict("s", "h", Judgement(word, fixable, (finding,)))

    assert cell(verdict("identical")) == cell(verdict("superset")) == "ok"
    assert cell(verdict("superset", severity="risky")) == "risk"
    assert cell(verdict("incompatible", "safe")) == "fix"
    assert cell(verdict("incompatible", "lossy")) == cell(verdict("incompatible")) == "no"
    assert cell(verdict("unknown")) == "?"
    assert set(CELLS) == {"ok", "risk", "fix", "no", "?"}


def test_one_pair_is_answered_with_yes_or_no_first(run):
    _, out, _ = run("check", CLEAN, "--host", NO_PKU)
    assert out.startswith(f"yes: {CLEAN} on {NO_PKU}")
    assert len(out.splitlines()) == 1
    _, out, _ = run("check", LEAK, "--host", NO_PKU)
    assert out.startswith(f"no: {LEAK} on {NO_PKU}, but xfast fix makes it restorable")
    assert "LEAK" in out


def test_a_risk_is_no_silent_success(run):
    status, out, err = run("check", CORE, "--host", "amd-genoa@6.12")
    assert status == 0
    assert out.startswith("yes, with a risk: ")
    assert "1 with a risk" in err
    assert run("check", CORE, "--host", "amd-genoa@6.12", "--fail-on", "risky")[0] == 1
    assert run("check", CLEAN, "--host", NO_PKU, "--fail-on", "risky")[0] == 0


def test_exit_codes_say_what_a_script_has_to_know(run, tmp_path):
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)))
    assert run("check", CLEAN, "--host", NO_PKU)[0] == 0
    assert run("check", LEAK, noise, "--host", NO_PKU)[0] == 1
    assert run("check", LEAK, "--host", "nobody")[0] == 2
    assert run("check", CLEAN, noise, "--host", NO_PKU)[0] == 3
    assert run("check", CLEAN, noise, "--host", NO_PKU, "--fail-on", "unknown")[0] == 1
    assert run("check", tmp_path / "missing", "--host", NO_PKU)[0] == 3


def test_quiet_says_nothing(run):
    assert run("check", LEAK, "--host", NO_PKU, "--quiet") == (1, "", "")


def test_by_host_and_by_rule(run):
    _, out, _ = run("check", SNAPSHOTS, "--host", *HOSTS, "--by", "host")
    for host in HOSTS:
        assert f"\n{host}\n" in out
    _, out, _ = run("check", SNAPSHOTS, "--host", *HOSTS, "--by", "rule")
    assert "snapshot  " not in out
    assert "LEAK: " in out


def test_only_what_was_asked_for(run):
    _, out, err = run("check", CLEAN, "--host", NO_PKU, "--only", "incompatible")
    assert out == ""
    assert "no snapshot has an answer that is incompatible" in err


def test_foreign_files_in_a_directory_are_counted_and_named_ones_are_errors(run, tmp_path):
    shutil.copy(CLEAN, tmp_path / "vm.qemustate")
    shutil.copy(CLEAN, tmp_path / "vm.qemustate.orig")
    shutil.copy(CLEAN, tmp_path / ".hidden")
    (tmp_path / "README").write_text("# what lies here\n")
    (tmp_path / "vm.xml").write_text("<domain type='kvm'>\n</domain>\n")
    status, _, err = run("check", tmp_path, "--host", NO_PKU)
    assert status == 0
    assert "1 pair: 1 identical; 4 other files skipped" in err
    assert run("check", tmp_path / "README", "--host", NO_PKU)[0] == 3


def test_a_snapshot_with_a_damaged_beginning_is_no_foreign_file(run, tmp_path):
    (tmp_path / "vm.qemustate").write_bytes(b"\0" * 64 + CLEAN.read_bytes()[64:])
    status, _, err = run("check", tmp_path, "--host", NO_PKU)
    assert status == 3
    assert "1 input not judged" in err


NAMES = [b"a\x1b[31mred", b"new\nline", b"no-\xff-utf8", b"back\\slash", "bidi\u202e".encode()]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_escaped_the_same_way_in_every_output(run, tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    shutil.copy(CLEAN, path)
    text = os.fsdecode(path)
    assert unescape(escape(text)) == text
    command = [sys.executable, "-m", "xfast", "check", path, "--host", NO_PKU, "--format"]
    for form in ("table", "json", "ndjson", "csv"):
        done = subprocess.run([*command, form], capture_output=True, check=True)
        out = done.stdout.decode()
        if form in ("json", "ndjson"):
            answer = json.loads(out)
            out = answer.get("snapshot") or answer["verdicts"][0]["snapshot"]
        elif form == "csv":
            (row,) = csv.DictReader(io.StringIO(out))
            out = row["snapshot"]
        assert escape(text) in out
        assert all(c.isprintable() or c == "\n" for c in out)


def test_no_cell_of_a_table_is_a_formula(run, tmp_path, monkeypatch):
    shutil.copy(CLEAN, tmp_path / "=cmd()")
    monkeypatch.chdir(tmp_path)
    _, out, _ = run("check", "=cmd()", "--host", NO_PKU, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["snapshot"] == "'=cmd()"


@pytest.mark.parametrize(
    "text", ["=1", " =1", "+1", "-1", "@SUM", "\t1", "\r1", "\uff1d1", "\xa0=1"]
)
def test_nothing_that_a_spreadsheet_counts_is_a_cell(text):
    assert cell_of_csv(text) == f"'{text}"
    assert cell_of_csv(f"a{text}") == f"a{text}"


def test_what_could_not_be_judged_is_in_every_format(run, tmp_path):
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(64))
    _, out, _ = run("check", noise, "--host", NO_PKU, "--json")
    (error,) = json.loads(out)["errors"]
    assert error["snapshot"] == str(noise)
    assert error["error"]
    _, out, _ = run("check", noise, "--host", NO_PKU, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert (row["snapshot"], row["verdict"]) == (str(noise), "not judged")


def test_an_interrupt_is_exit_code_130(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("xfast.cli.check.hosts_of", interrupt)
    assert run("check", CLEAN, "--host", NO_PKU)[0] == 130


def test_what_nobody_foresaw_is_one_line(run, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("story")

    monkeypatch.setattr("xfast.cli.check.hosts_of", fail)
    status, _, err = run("check", CLEAN, "--host", NO_PKU)
    assert status == 3
    assert err.count("\n") == 1
    assert "ZeroDivisionError: story" in err
    monkeypatch.setenv("XFAST_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("check", CLEAN, "--host", NO_PKU)


@pytest.mark.parametrize(
    ("words", "hint"), [(["chekc"], "check"), (["shwo"], "show"), (["hosts"], "host")]
)
def test_a_near_miss_is_met_with_a_suggestion(run, words, hint):
    status, _, err = run(*words)
    assert status == 2
    assert f"did you mean {hint}?" in err


def test_a_snapshot_that_host_swallowed_is_explained(run):
    status, _, err = run("check", "--host", NO_PKU, CLEAN)
    assert status == 2
    assert "write snapshots before --host" in err


def test_help_of_a_verb(run):
    _, one, _ = run("help", "check")
    _, two, _ = run("check", "--help")
    assert one == two
    assert one.count("  xfast check ") == 2
    assert "exit codes" in one


def test_colours_only_where_they_are_wanted(run):
    assert "\x1b" not in run("check", LEAK, "--host", NO_PKU)[1]


def test_a_fleet_of_a_million_keeps_no_more_than_its_groups():
    fleet = Fleet()
    finding = Finding("LEAK", "pkru", 0, "blocks", "", "", "safe", "why", "ref")
    for i in range(20_000):
        fleet.add([Verdict(f"s{i}", "h", Judgement("incompatible", "safe", (finding,)))])
    (group,) = fleet.groups.values()
    assert group.count == fleet.count == 20_000
    assert len(group.names) == 4
    out = io.StringIO()
    Answer(fleet, 80).print(console(out), "snapshot")
    assert "s0 and 19999 more like it" in out.getvalue()


def test_a_long_check_says_how_far_it_is(run, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "EVERY", -1.0)
    _, out, err = run("check", LEAK, CLEAN, "--host", NO_PKU)
    assert "xfast: check: 1 of about 2 inputs" in err
    assert "1 incompatible, 0 not judged" in err
    assert "of about" not in out
    status, out, err = run("check", LEAK, CLEAN, "--host", NO_PKU, "--quiet")
    assert (status, out, err) == (1, "", "")


def test_advice_about_a_fleet_says_for_which_snapshots_it_is(run):
    """Five sentences named hosts that would do, and none said for what."""
    _, out, _ = run("check", SNAPSHOTS, "--host", *HOSTS)
    advice = [line for line in out.splitlines() if line.startswith("next: ")]
    names = {path.name for path in SNAPSHOTS.rglob("*")}
    assert len(advice) > 1
    for line in advice[:-1]:
        assert line.startswith("next: for ")
        assert any(name in line for name in names)
    _, out, _ = run("check", next(SNAPSHOTS.rglob("*pkru-leak*.xsave")), "--host", HOSTS[0])
    assert "next: for" not in out


def test_nobody_is_told_to_give_data_up_that_another_host_takes(run):
    _, out, _ = run("check", CLEAN, "--host", "kvm64", "amd-milan@6.12")
    assert "--even-if-live" not in out
    assert "choose another" not in out
    _, out, _ = run("check", CLEAN, "--host", "kvm64", "qemu64")
    assert "next: " in out


def test_a_large_fleet_gets_the_commonest_reasons_and_can_ask_for_all(run):
    many = [f"amd-milan@5.{minor}" for minor in range(10, 20)]
    _, short, _ = run("check", SNAPSHOTS, "--host", *many)
    _, verbose, _ = run("check", SNAPSHOTS, "--host", *many, "-v")
    _, by_rule, _ = run("check", SNAPSHOTS, "--host", *many, "--by", "rule")
    left_out = re.findall(r"and (\d+) more reasons? of ([A-Z-]+) \(-v or --by rule: all\)", short)
    assert left_out
    assert "more reason" not in verbose + by_rule
    for count, code in left_out:
        told = [
            len(re.findall(r"^  (?:blocks|risky)", part, re.M))
            for text in (short, by_rule)
            for part in text.split("\n\n")
            if part.lstrip().startswith(f"{code}: ")
        ]
        assert told[0] + int(count) == told[1]
    for rule in RULES:
        assert (f"\n{rule}: " in short) == (f"\n{rule}: " in by_rule)


def test_asides_are_broken_between_words_on_a_terminal_alone(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "xfast: " + "word " * 30 + "unbreakable" * 5
    aside(text)
    assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    aside(text)
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(" ".join(lines).split()) == text
    assert all(len(line) <= 40 for line in lines[:-1])


@pytest.mark.parametrize("name", [LEAK.with_name("ch-state.json"), CORE])
def test_a_snapshot_named_behind_host_is_said_to_be_taken_for_a_host(run, name):
    _, _, err = run("check", CLEAN, "--host", "amd-milan@6.12", name)
    (line,) = [line for line in err.splitlines() if "stands before --host" in line]
    assert name.name in line
    _, _, err = run("check", CLEAN, "--host", "amd-milan@6.12")
    assert "before --host" not in err


def test_a_rule_that_is_nearly_right_is_asked_about(run):
    status, out, _ = run("explain", "LEEK")
    assert status == 0
    assert "Did you mean the rule LEAK?" in out
    assert "Did you mean" not in run("explain", "hello")[1]
    assert "Did you mean" not in run("explain", "Failed to set XSAVE: Invalid argument")[1]
    status, _, err = run("check", CLEAN, "--host", "amd-milan", "--ignore", "leek")
    assert status == 2
    assert "did you mean LEAK?" in err


def test_a_name_is_escaped_alike_in_errors_and_answers(run, tmp_path):
    """A tab was \\t in the error and \\x09 in the answer; a byte that is no UTF-8 was \\udcff."""
    name = os.fsdecode(b"odd\t\xff\\name\x1b.xsave")
    (tmp_path / name).write_bytes(b"\0" * 700)
    _, out, err = run("check", tmp_path / name, "--host", "amd-milan", "--json")
    (row,) = json.loads(out)["errors"]
    assert row["snapshot"].endswith(r"odd\x09\xff\\name\x1b.xsave")
    assert row["error"].startswith(row["snapshot"])
    assert row["snapshot"] in err
    assert unescape(row["snapshot"]) == os.fspath(tmp_path / name)


def test_the_names_of_emoji_are_names(run, tmp_path):
    """What is called `:skull:` was shown as a skull."""
    path = tmp_path / "a :skull: b"
    path.write_bytes(area(1, 4096))
    assert "a :skull: b" in run("show", path, "--layout", "intel")[1]
    assert "a :skull: b" in run("check", path, "--layout", "intel", "--host", "intel-haswell")[1]
