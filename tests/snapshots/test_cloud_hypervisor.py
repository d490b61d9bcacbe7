"""Cloud Hypervisor's state.json in its generations, and the fpu object that shadows the area."""

import gzip
import json
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from snapshot_files import cloud_hypervisor_state

from xfast import snapshots
from xfast.errors import FormatError, PolicyError
from xfast.snapshots import cloud_hypervisor
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import keep
from xfast.xsave.layout import PRESETS

FPU_OF_INIT = {
    "fpr": [[0] * 16] * 8,
    "fcw": 0x37F,
    "fsw": 0,
    "ftwx": 0,
    "last_opcode": 0,
    "last_ip": 0,
    "last_dp": 0,
    "xmm": [[0] * 16] * 16,
    "mxcsr": 0x1F80,
}


def fpu_of(area: bytes) -> dict:
    """Return KVM_GET_FPU's answer for an area whose x87 and SSE are present."""
    fcw, fsw, ftwx, opcode, ip, dp, mxcsr = struct.unpack_from("<HHBxHQQI", area)
    return {
        "fpr": [list(area[32 + 16 * i : 48 + 16 * i]) for i in range(8)],
        "fcw": fcw,
        "fsw": fsw,
        "ftwx": ftwx,
        "last_opcode": opcode,
        "last_ip": ip,
        "last_dp": dp,
        "xmm": [list(area[160 + 16 * i : 176 + 16 * i]) for i in range(16)],
        "mxcsr": mxcsr,
    }


@pytest.fixture
def states(data) -> list[dict]:
    """Return the vCPUs' states of the sample, each with the fpu object that it had in KVM."""
    outer = json.loads((data / "vmm" / "ch-state.json").read_text())
    vcpus = outer["snapshots"]["cpu-manager"]["snapshots"]
    states = [json.loads(vcpus[key]["snapshot_data"]["state"])["Kvm"] for key in ("0", "1")]
    for state in states:
        state["fpu"] = fpu_of(struct.pack("<1024I", *state["xsave"]["region"]))
    return states


def manager(vcpus: dict, **more) -> dict:
    child = {"snapshots": vcpus, "snapshot_data": None, **more}
    return {"snapshots": {"cpu-manager": child, "é": {}}, "snapshot_data": None, **more}


def v39(states, *, indent=None, key="Kvm") -> str:
    vcpus = {}
    for i, state in enumerate(states):
        text = json.dumps({key: state, "ünï\U0001f600": "☃"} if key else state, indent=indent)
        vcpus[str(i)] = {"snapshots": {}, "snapshot_data": {"state": text}}
    return json.dumps(manager(vcpus), indent=indent)


def v30(states, *, indent=None) -> str:
    vcpus = {}
    for i, state in enumerate(states):
        data = list(json.dumps({"Kvm": state}).encode())
        vcpus[f"cpu{i}"] = {"snapshots": {}, "snapshot_data": data}
    return json.dumps(manager(vcpus), indent=indent)


def v28(states, *, indent=None) -> str:
    vcpus = {}
    for i, state in enumerate(states):
        section = {"id": f"{i}-section", "snapshot": list(json.dumps(state).encode())}
        vcpus[str(i)] = {"id": str(i), "snapshots": {}, "snapshot_data": {f"{i}-section": section}}
    return json.dumps(manager(vcpus, id="vm"), indent=indent)


def old(state: dict) -> dict:
    """Return a state as kvm-bindings before 0.8 wrote it: structures by field."""
    sregs, xcrs = bytes(state["sregs"]), bytes(state["xcrs"])
    rows = [
        dict(zip(("xcr", "reserved", "value"), row, strict=True))
        for row in struct.iter_unpack("<2IQ", xcrs[8:264])
    ]
    return {
        **state,
        "cpuid": [{"nent": len(state["cpuid"]), "padding": 0}, state["cpuid"]],
        "msrs": [{"nmsrs": 1, "pad": 0}, [{"index": 0xDA0, "reserved": 0, "data": 0x1800}]],
        "sregs": {"cr4": struct.unpack_from("<Q", sregs, 248)[0] | 1 << 22},
        "xcrs": {"nr_xcrs": 1, "flags": 0, "xcrs": rows, "padding": [0] * 16},
    }


GENERATIONS = {
    "v39": v39,
    "v39 without the key": lambda states, **how: v39(states, key=None, **how),
    "v30": v30,
    "v28": v28,
    "v28 of old bindings": lambda states, **how: v28([old(s) for s in states], **how),
}


def read(path, text: str):
    path.write_text(text)
    (snapshot,) = snapshots.read(path)
    return snapshot


def rewritten(snapshot, areas, path):
    with Source.open(snapshot.path) as source, open(path, "w+b") as file:
        edits = snapshots.splices(source, snapshot, areas)
        source.rewrite(edits, file)
    (again,) = snapshots.read(path)
    return again, edits


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("generation", GENERATIONS)
class TestGenerations:
    def test_values(self, tmp_path, states, generation, indent):
        snapshot = read(tmp_path / "state.json", GENERATIONS[generation](states, indent=indent))
        assert snapshot.format == "cloud-hypervisor"
        assert [vcpu.index for vcpu in snapshot.vcpus] == [0, 1]
        for vcpu, state in zip(snapshot.vcpus, states, strict=True):
            assert vcpu.area.view("<u4").tolist() == state["xsave"]["region"]
            assert (vcpu.xcr0, len(vcpu.cpuid.entries)) == (0xE7, 75)
            assert vcpu.layout.restricted(0xE7) == PRESETS["amd-zen4"].restricted(0xE7)
            assert vcpu.pkru_enabled is generation.endswith("bindings")
            assert vcpu.xss == (0x1800 if generation.endswith("bindings") else None)
            assert vcpu.facts["fpu"]["mxcsr"] == 0x1FA0
            assert vcpu.fpu_differs == ()

    def test_edits_touch_the_numbers_and_nothing_else(self, tmp_path, states, generation, indent):
        text = GENERATIONS[generation](states, indent=indent)
        snapshot = read(tmp_path / "state.json", text)
        new = snapshot.vcpus[0].area.copy()
        keep(new, snapshot.vcpus[0].layout, 5)
        again, edits = rewritten(snapshot, {0: new}, tmp_path / "out.json")
        assert np.array_equal(again.vcpus[0].area, new)
        assert np.array_equal(again.vcpus[1].area, snapshot.vcpus[1].area)
        assert {edit.field for edit in edits} == {"vcpu 0 xsave", "vcpu 0 fpu.xmm"}
        assert set(b"".join(edit.old + edit.new for edit in edits)) <= set(b"0123456789,\n \t")
        states[0]["xsave"]["region"] = new.view("<u4").tolist()
        states[0]["fpu"]["xmm"] = FPU_OF_INIT["xmm"]
        expected = GENERATIONS[generation](states, indent=indent)
        assert json.loads((tmp_path / "out.json").read_text()) == json.loads(expected)
        assert again.vcpus[0].fpu_differs == ()


class TestFpu:
    def test_init_state_goes_into_both(self, tmp_path, states):
        """A restore sets the fpu object last: without it the dropped x87 would come back."""
        snapshot = read(tmp_path / "state.json", v39(states))
        new = snapshot.vcpus[0].area.copy()
        keep(new, snapshot.vcpus[0].layout, 0)
        again, _ = rewritten(snapshot, {0: new}, tmp_path / "out.json")
        fpu = again.vcpus[0].facts["fpu"]
        assert fpu == {
            name: [x for row in value for x in row] if isinstance(value, list) else value
            for name, value in FPU_OF_INIT.items()
        }

    def test_a_contradiction_is_a_fact(self, tmp_path, states):
        states[1]["fpu"]["mxcsr"] = 0x1F80
        states[1]["fpu"]["xmm"][3][0] ^= 1
        snapshot = read(tmp_path / "state.json", v39(states))
        assert snapshot.vcpus[0].fpu_differs == ()
        assert snapshot.vcpus[1].fpu_differs == ("mxcsr", "xmm")
        with Source.open(snapshot.path) as source:
            assert snapshots.splices(source, snapshot, {1: snapshot.vcpus[1].area}) == []

    def test_where_says_where(self, tmp_path, states):
        path = tmp_path / "state.json"
        snapshot = read(path, v39(states))
        for vcpu, state in zip(snapshot.vcpus, states, strict=True):
            offset, length = vcpu.where["xsave"]
            held = path.read_bytes()[offset : offset + length].decode()
            assert json.loads(f"[{held}]") == state["xsave"]["region"]
            offset, length = vcpu.where["fpu"]
            held = path.read_bytes()[offset : offset + length].decode()
            assert json.loads(held.replace('\\"', '"')) == state["fpu"]


class TestSizes:
    def test_amx_is_in_extra(self, tmp_path, states):
        extra = list(range(1, 1729))
        states[0]["xsave"]["extra"] = extra
        states[1]["xsave"]["extra"] = []
        snapshot = read(tmp_path / "state.json", v39(states))
        assert [vcpu.area.size for vcpu in snapshot.vcpus] == [11008, 4096]
        assert snapshot.vcpus[0].area[4096:].view("<u4").tolist() == extra
        new = snapshot.vcpus[0].area.copy()
        new[11004:] = 0xFF
        again, edits = rewritten(snapshot, {0: new}, tmp_path / "out.json")
        assert np.array_equal(again.vcpus[0].area, new)
        assert [(edit.old, edit.new) for edit in edits] == [(b"1728", b"4294967295")]
        with (
            Source.open(snapshot.path) as source,
            pytest.raises(PolicyError, match="an area of at most 4096 bytes, got 11008"),
        ):
            snapshots.splices(source, snapshot, {1: new})

    def test_shorter_areas_are_filled_up(self, tmp_path, states):
        snapshot = read(tmp_path / "state.json", v39(states))
        new = snapshot.vcpus[1].area[:832].copy()
        again, edits = rewritten(snapshot, {1: new}, tmp_path / "out.json")
        assert edits == []
        assert again.vcpus[1].area.size == 4096


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda text: text[:-1], "damaged JSON"),
            (lambda text: text[:2000], "damaged JSON"),
            (
                lambda text: text.replace('\\"xsave\\"', '\\"xs\\"'),
                "expected xsave.region of every vCPU, got none",
            ),
            (
                lambda text: text.replace('\\"region\\":', '\\"region\\":[1],\\"r\\":'),
                "numbers, got 1",
            ),
            (
                lambda text: text.replace('\\"region\\":[', '\\"region\\":[-'),
                "expected numbers from 0 to .*, got another",
            ),
            (
                lambda text: text.replace('\\"region\\":[', '\\"region\\":[1e'),
                "expected 1024",
            ),
            (lambda text: text.replace('\\"region\\":[', '\\"region\\":[' + "9" * 5000), "digits"),
            (lambda text: text.replace('\\"Kvm\\"', '\\"Mshv\\"'), "the mshv hypervisor"),
            (
                lambda text: text.replace('"state"', '"states"').replace("{\\", "[\\"),
                "got another value",
            ),
            (
                lambda text: text.replace('"snapshot_data":{"state"', '"data":{"state"'),
                "snapshot_data",
            ),
            (
                lambda text: text.replace('\\"eax\\":', '\\"eax\\":-'),
                "expected numbers function, index",
            ),
            (lambda text: text.replace('\\"eax\\":', '\\"ea\\":'), "expected numbers function"),
            (
                lambda text: text.replace('\\"xcrs\\":[', '\\"xcrs\\":[999,'),
                "expected an array of bytes",
            ),
            (lambda text: text.replace('"1":{', '"0":{', 1), "'0' twice"),
            (lambda text: '{"cpu-manager":' + "[" * 100000, "damaged JSON"),
            (lambda text: '{"cpu-manager":1}', "expected the vCPUs in 'snapshots'"),
            (
                lambda text: '{"cpu-manager":1,"snapshots":{"cpu-manager":{"snapshots":{}}}}',
                "expected at least one vCPU, got none",
            ),
            (lambda text: '{"cpu-manager":1,"snapshots":7}', "expected an object"),
        ],
    )
    def test_one_clear_line(self, data, tmp_path, change, words):
        text = (data / "vmm" / "ch-state.json").read_text()
        path = tmp_path / "state.json"
        changed = change(text)
        assert changed != text
        path.write_text(changed)
        with pytest.raises(FormatError, match=words) as caught:
            snapshots.read(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("wrong", [True, -1, 1 << 70, 1.5, "x", [], {}, [[1]], [None] * 3])
    @pytest.mark.parametrize("field", ["cpuid", "msrs", "xcrs", "sregs", "xsave", "fpu"])
    def test_values_of_another_type(self, tmp_path, states, field, wrong):
        states[0][field] = wrong
        try:
            (vcpu, _) = read(tmp_path / "state.json", v39(states)).vcpus
        except FormatError:
            vcpu = None
        assert vcpu is None or (field != "xsave" and wrong in ([], {}))

    def test_cpuid_registers_have_32_bits(self, tmp_path, states):
        states[0]["cpuid"][3]["ebx"] = 1 << 32
        with pytest.raises(FormatError, match="expected CPUID registers of 32 bits"):
            read(tmp_path / "state.json", v39(states))

    def test_json_of_others_is_not_ours(self, tmp_path):
        (tmp_path / "other.json").write_text('{"snapshots": {}}')
        with Source.open(tmp_path / "other.json") as source:
            assert not cloud_hypervisor.sniff(source)


BEFORE = '{"snapshots":{"cpu-manager":{"snapshots":{"0":{"snapshot_data":'
HUGE = {  # made when a test asks: the workers that fork at every call stay small
    "numbers": lambda: BEFORE + "[" + "0," * (15 << 20) + "0]}}}}}",
    "numbers of the area": lambda: (
        BEFORE + json.dumps('{"xsave":{"region":[' + "0," * 400_000 + '0]},"cpuid":[]}') + "}}}}}"
    ),
    "lists": lambda: '{"x":[' + "[]," * (10 << 20) + '[]],"cpu-manager":1}',
    "strings": lambda: BEFORE + "{" + '"a":"",' * (4 << 20) + '"b":1}}}}}}',
    "space": lambda: BEFORE + " " * (31 << 20) + "1}}}}}",
    "depth": lambda: '{"cpu-manager":' + "[" * (31 << 20),
    "escapes": lambda: BEFORE + '"' + '\\"' * (15 << 20) + '"}}}}}',
    "a key": lambda: '{"cpu-manager":1,"' + "k" * (15 << 20) + '":1,"' + "k" * (15 << 20) + '":1}',
    "digits": lambda: BEFORE + "1" * (31 << 20) + "}}}}}",
    "no end": lambda: BEFORE + '"' + "x" * (31 << 20),
    "over the limit": lambda: BEFORE + "[" + "0," * (17 << 20) + "0]}}}}}",
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_small_compressed_file_takes_neither_time_nor_memory(tmp_path, kind):
    """61 KB took 40 s and 3 GB: each number's place was kept, and each level built the whole."""
    path = tmp_path / "state.json.gz"
    path.write_bytes(gzip.compress(HUGE[kind]().encode(), 1))
    script = (
        "import sys, time; from xfast import snapshots\n"
        "from xfast.errors import FormatError\n"
        "snapshots.format_named('cloud-hypervisor')\n"
        "begin = time.process_time()\n"
        "try: snapshots.read(sys.argv[1], format='cloud-hypervisor')\n"
        "except FormatError as problem: assert len(str(problem)) < 300, len(str(problem))\n"
        "else: raise SystemExit('it was read')\n"
        "print(time.process_time() - begin)\n"
        "status = open('/proc/self/status').read().splitlines()\n"
        "print(next(line for line in status if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seconds, peak = done.stdout.splitlines()
    assert float(seconds) < 3
    assert int(peak.split()[1]) < 256 << 10


@pytest.mark.parametrize("name", ["ch-numbers.json.gz", "ch-lists.json.gz"])
def test_the_hostile_files(shared, name):
    begin = time.process_time()
    with pytest.raises(FormatError, match=r"bytes, got 6\d+|strings, got \d+"):
        snapshots.read(shared / "cases/hostile" / name, format="cloud-hypervisor")
    assert time.process_time() - begin < 3


def test_the_definition_beside_it_counts_as_it_is_at_every_read(tmp_path):
    """However often its like was read before: changed, damaged, taken away, or very long."""
    path, config = tmp_path / "state.json", tmp_path / "config.json"
    path.write_bytes(cloud_hypervisor_state())
    count = len(snapshots.read(path)[0].vcpus)
    told = ('{"cpus":{"boot_vcpus":%d}}', '{"cpus":{"boot_vcpus":%d}', '{"cpus":[%d]}')
    for text in told * 2:
        for vcpus in (count, count + 1, count):
            for padding in ("", " " * 20_000):
                config.write_text(text % vcpus + padding)
                doubts = snapshots.read(path)[0].doubts
                assert bool(doubts) == (text == told[0] and vcpus != count)
    config.write_text(told[0] % 9)
    assert snapshots.read(path)[0].doubts
    config.unlink()
    assert not snapshots.read(path)[0].doubts


def test_a_definition_that_was_found_is_read_through_no_link(tmp_path):
    folder, other = tmp_path / "walked", tmp_path / "other.json"
    folder.mkdir()
    (folder / "state.json").write_bytes(cloud_hypervisor_state())
    other.write_text('{"cpus":{"boot_vcpus":99}}')
    (folder / "config.json").symlink_to(other)
    (found,) = snapshots.walk(tmp_path / "walked")
    assert not snapshots.read(found)[0].doubts
    assert snapshots.read(str(found))[0].doubts  # named: it is followed
