"""vCPUs that nobody looks at are judged by their key, and the answers are those of a look."""

import copy
import lzma
import pickle
import random
import struct

import numpy as np
import pytest
import snapshot_files as files
from helpers.one_by_one import judge_one_by_one
from keys import Keys
from mutations import mutated
from state_texts import NUMBERS, changed_numbers, texts

import xfast
from xfast.engine import vmstate
from xfast.hosts.catalogue import catalogue
from xfast.judge import judgement
from xfast.judge.judgement import check
from xfast.judge.verdict import PerClass
from xfast.kernels.behaviour import of_release
from xfast.snapshots import firecracker, state_plans
from xfast.snapshots.model import Snapshot, Unseen, Vcpu, key_of
from xfast.snapshots.qemu import plans
from xfast.xsave.layout import preset

INTEL = preset("intel")
HOSTS = [
    host if release is None else host.with_kernel(of_release(release))
    for host in list(catalogue().values())[::3]
    for release in (None, "5.15", "6.0", "6.12")
]
KEYS = Keys()
FIELDS = [(8, 0), (156, 88), (488, 8), (564, 4), (568, 256), (1553, 16), (1569, 256)]
"""Where a section has what tells: anywhere, x87, CR4, MXCSR, XMM, XCR0 and XSTATE_BV, YMM."""


@pytest.fixture(autouse=True)
def nothing_seen():
    plans.forget()
    state_plans.forget()
    judgement.forget()
    yield
    plans.forget()


def compare(path, rng, form="qemu", **how) -> bool:
    """Judge a file by its key and by looking; False where no key stands for its vCPUs."""
    try:
        (quick,) = xfast.read(path, format=form, **how)
        (slow,) = xfast.read(path, format=form, **how)
    except xfast.XfastError:
        return False
    if key_of(quick.vcpus) is None:
        return False
    hosts = rng.sample(HOSTS, 4)
    level = rng.choice(["xstate", "fpu", "isa", "strict"])
    verdicts = check(quick, hosts, policy=level)
    assert KEYS.see(slow)
    for host, verdict in zip(hosts, verdicts, strict=True):
        expected = judge_one_by_one(slow, host, level)
        assert (verdict.verdict, verdict.fixable, verdict.findings) == expected
    return True


def shapes(rng):
    """Return devices: of KVM or TCG, with one subsection or another."""
    kvm = rng.random() < 0.6
    devices = []
    for number in range(rng.choice((1, 2, 3))):
        more = [("cpu/xss", bytes(8))] if rng.random() < 0.5 else []
        if kvm:
            more.append(("cpu/tsc_khz", bytes(8)))
        if rng.random() < 0.5:
            more.append(("cpu/pkru", rng.choice((bytes(4), b"UUUT", b"\0\0\0\1"))))
        if rng.random() < 0.4:
            more.append(("cpu/avx512", rng.choice((bytes(1600), bytes([1]) * 1600))))
        if rng.random() < 0.2:
            tiles = rng.choice((bytes(8256), bytes(64) + b"\1" * 8192))
            more += [("cpu/intel_amx_xtile", tiles), ("cpu/msr_xfd", bytes(16))]
        bv = rng.choice((0, 3, 7, 0x207, 0xE7)) if kvm else 0
        devices.append(files.qemu_device("cpu_common", bytes(5), number))
        content = files.qemu_cpu(rng.randrange(3), xstate_bv=bv)
        devices.append(files.qemu_device("cpu", content, number, 12, more))
    return devices


@pytest.mark.parametrize("seed", range(120))
def test_streams_are_judged_by_their_keys_as_by_their_vcpus(tmp_path, seed):
    """Registers, control registers and headers of every kind, in streams with one description."""
    rng = random.Random(f"unseen {seed}")
    path = tmp_path / "stream"
    devices = shapes(rng)
    path.write_bytes(files.qemu_stream(devices))
    xfast.read(path, format="qemu")
    planned = 0
    for _ in range(6):
        changed = []
        for entry, content in devices:
            data = bytearray(content)
            if entry["name"] == "cpu":
                for _ in range(rng.choice((0, 1, 2, 20))):
                    start, length = rng.choice(FIELDS)
                    place = start + rng.randrange(length or len(data) - 8)
                    data[place] = rng.choice((0, 1, 2, 7, 0xFF, rng.randrange(256)))
            changed.append((entry, bytes(data)))
        path.write_bytes(files.qemu_stream(changed, ram=rng.randbytes(rng.randrange(900))))
        planned += compare(path, rng)
    assert planned


@pytest.mark.parametrize("seed", range(150))
def test_raw_areas_are_judged_by_their_keys_as_by_their_vcpus(tmp_path, seed):
    """A few areas of any size, damaged or not, with or without the guest's XCR0 beside them."""
    rng = random.Random(f"unseen raw {seed}")
    path = tmp_path / "vm.xsave"
    size = rng.choice((4096, 4096, 11008, 832))
    if rng.random() < 0.3:
        xcr0 = rng.choice((7, 0xE7, 0x207))
        xcrs = struct.pack("<IIIIQ", 1, 0, 0, 0, xcr0) + bytes(368)
        (tmp_path / "vm.xcrs").write_bytes(xcrs)
    layout = rng.choice((None, None, INTEL))
    judged = 0
    for _ in range(6):
        images = b""
        for number in range(rng.choice((1, 1, 2, 5))):
            bv = rng.choice((3, 7, 0xE7, 0x207, 0x2E7))
            image = bytearray(files.area(number if rng.random() < 0.5 else 0, size, bv))
            for _ in range(rng.choice((0, 0, 1, 3))):
                place = rng.choice((rng.randrange(size), rng.randrange(512, 528), 464, 24, 28, 0))
                image[place] = rng.choice((0, 1, rng.randrange(256)))
            images += image
        path.write_bytes(images)
        judged += compare(path, rng, "raw", size=size, layout=layout)
    assert judged


def companions(rng):
    """Return what may lie beside an area, and the XCR0 and CPUID rows that it tells."""
    found = {}
    xcr0 = rng.choice((None, 0, 7, 0xE7, 0x207))
    if xcr0 is not None:
        found[".xcrs"] = files.xcrs(xcr0)
    rows = rng.choice((None, (), ((0xD, 0, 1, 7, 832, 832, 0),), ((0, 0, 0, 0xD, 1, 2, 3),)))
    if rows is not None:
        packed = b"".join(struct.pack("<7I12x", *row) for row in rows)
        found[".cpuid2"] = struct.pack("<2I", len(rows), 0) + packed + bytes(rng.choice((0, 80)))
    return found, xcr0, rows


@pytest.mark.parametrize("seed", range(60))
def test_companions_that_come_go_and_change_count_at_every_read(tmp_path, seed):
    """They decide the layout, the key and the verdict: of an area, and of its variants."""
    rng = random.Random(f"unseen companions {seed}")
    path = tmp_path / rng.choice(("vm.xsave", "vm-one.xsave", "vm", "vm-one.bin"))
    judged = 0
    for _ in range(8):
        image = bytearray(files.area(0, 4096, rng.choice((7, 0xE7, 0x207))))
        image[28] = rng.choice((0xFF, 0))
        image[464:472] = bytes(8)
        image[832] = rng.choice((0, 1))
        path.write_bytes(image)
        beside, xcr0, rows = companions(rng)
        stem = tmp_path / ("vm" if rng.random() < 0.5 else path.stem)
        for old in (*tmp_path.glob("*.xcrs"), *tmp_path.glob("*.cpuid2")):
            old.unlink()
        for end, data in beside.items():
            (tmp_path / (stem.name + end)).write_bytes(data)
        for _ in range(2):
            (vcpu,) = xfast.read(path, format="raw")[0].vcpus
            assert vcpu.xcr0 == xcr0
            assert (vcpu.cpuid and len(vcpu.cpuid.entries)) == (None if rows is None else len(rows))
            judged += compare(path, rng, "raw")
    assert judged == 16


@pytest.mark.parametrize("kvm", [True, False])
def test_each_bit_that_tells_is_in_the_key(tmp_path, kvm):
    """CR4, XCR0, XSTATE_BV, IA32_XSS and IA32_XFD, and a bit of each register, one at a time."""
    path = tmp_path / "stream"
    more = [("cpu/xss", bytes(8)), ("cpu/msr_xfd", bytes(16)), ("cpu/pkru", bytes(4))]
    more += [("cpu/tsc_khz", bytes(8))] * kvm
    content = files.qemu_cpu(0, xstate_bv=7 * kvm)
    cpu = files.qemu_device("cpu", content, 0, 12, more)
    devices = [files.qemu_device("cpu_common", bytes(5)), cpu]
    path.write_bytes(files.qemu_stream(devices))
    xfast.read(path, format="qemu")
    keys = Keys()
    entry, whole = cpu
    assert whole[8 + 1817 :].count(b"\x05") >= len(more)
    ends = [whole.index(name.encode()) + len(name) + 4 for name, _ in more[:3]]
    places = [488, 489, 490, 491, 492, 493, 494, 495, *range(1553, 1569), 564, 566, 580, 1580, 160]
    places += [end + at for end in ends for at in range(8 if end != ends[2] else 4)]
    for place in places:
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(files.qemu_stream([devices[0], (entry, bytes(data))]))
            found = keys.see(xfast.read(path, format="qemu")[0])
            assert found or place in range(1561, 1569)  # an XSTATE_BV with more than was planned
    assert len(keys.met) > 100
    for names in (("cpu/xss",), ("cpu/msr_xfd",), ()):  # fields that are there, or are not
        some = [one for one in more if one[0] in names or one[0] == "cpu/tsc_khz"]
        cpu = files.qemu_device("cpu", content, 0, 12, some)
        path.write_bytes(files.qemu_stream([devices[0], cpu]))
        for _ in range(2):
            (snapshot,) = xfast.read(path, format="qemu")
        assert keys.see(snapshot)


@pytest.mark.parametrize("seed", range(150))
def test_damaged_streams_are_judged_by_their_keys_as_by_their_vcpus(tmp_path, seed):
    path = tmp_path / "stream"
    for apics in (True, False):
        path.write_bytes(files.qemu_stream(files.qemu_devices(apics=apics)))
        xfast.read(path)
    rng = random.Random(f"unseen damage {seed}")
    path.write_bytes(mutated("qemu", rng)[0]["vm"])
    compare(path, rng)


def test_samples_are_judged_by_their_keys_as_by_their_vcpus(tmp_path, data):
    path = tmp_path / "stream"
    for sample in sorted((data / "qemu").glob("*.qemustate.xz")):
        path.write_bytes(lzma.decompress(sample.read_bytes()))
        assert not compare(path, random.Random(0)) or plans._plans
        for seed in range(4):
            assert compare(path, random.Random(seed)), sample.name


@pytest.mark.parametrize("seed", range(150))
def test_firecracker_s_files_are_judged_by_their_keys_as_by_their_vcpus(tmp_path, data, seed):
    """Damaged anywhere, and changed where a vCPU's fields lie."""
    rng = random.Random(f"unseen vmstate {seed}")
    path = tmp_path / "vmstate"
    path.write_bytes(mutated("firecracker", rng)[0]["vm"])
    compare(path, rng, "firecracker")
    sample = rng.choice(("fc-bincode1-v4.vmstate", "fc-bincode2-v8.vmstate"))
    image = bytearray((data / "vmm" / sample).read_bytes()[:-8])
    hits = vmstate.walk(bytes(image), firecracker.XCRS, 248, firecracker.TOLD_MSRS)
    for _ in range(rng.choice((0, 1, 2, 6))):
        start, xcrs, area, *_, rows, _, _, _, _ = rng.choice(hits)
        place = rng.choice((
            rows + rng.randrange(900), xcrs - 384 + 248 + rng.randrange(4), xcrs + 24, area + 24,
            area + 512 + rng.randrange(16), area + 464 + rng.randrange(8), area + 28,
            area + rng.randrange(2700), rng.randrange(start, area),
        ))  # fmt: skip
        image[place] ^= 1 << rng.randrange(8)
    path.write_bytes(image + struct.pack("<Q", firecracker.crc64(image)))
    compare(path, rng, "firecracker")


@pytest.mark.parametrize("cpuid", [True, False])
def test_each_bit_of_a_vmstate_that_tells_is_in_the_key(tmp_path, cpuid):
    """CPUID, MSRs, CR4, XCR0, and what an area's layout is told by, one bit at a time."""
    row = struct.pack("<7I12x", 0xD, 0, 1, 0xE7, 2440, 2440, 0)
    rows = (0x10, 9), (0xDA0, 0x1800), (0x1C4, 1 << 18)
    msrs = struct.pack("<QIIQ", 8, 3, 0, 3)
    msrs += b"".join(struct.pack("<Q2IQ", 16, index, 0, value) for index, value in rows)
    one = struct.pack("<QIIQQ", 8, 1, 0, 1, 40) + row if cpuid else b""
    one += msrs + struct.pack("<Q", 312) + bytes(312)
    one += struct.pack("<QQ", 64, 0) + bytes(56) + struct.pack("<Q", 392) + files.xcrs(0xE7)
    area = bytearray(files.area(1, 4096, 7))
    one += struct.pack("<Q", 4096) + area + b"\0"
    head = struct.pack("<2Q", firecracker.MAGIC, 5) + b"8.0.0" + struct.pack("<Q", 1)
    whole = head + one
    (hit,) = vmstate.walk(whole, firecracker.XCRS, 248, firecracker.TOLD_MSRS)
    values = [whole.index(struct.pack("<2IQ", index, 0, value)) for index, value in rows]
    places = [*values, *(at + 8 for at in values), hit[1] - 384 + 250, hit[1] + 24]
    places += [hit[2] + at for at in (24, 28, 29, 464, 512, 513, 527, 600)]
    places += [hit[6] + 8 + 24] * cpuid
    keys = Keys()
    for place in places:
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            (tmp_path / "vm").write_bytes(data + struct.pack("<Q", firecracker.crc64(data)))
            keys.see(xfast.read(tmp_path / "vm")[0])
    assert len(keys.met) > 60


def test_most_of_firecracker_s_files_have_a_key(tmp_path, data):
    for sample in ("fc-bincode1-v4.vmstate", "fc-bincode2-v8.vmstate"):
        assert compare(data / "vmm" / sample, random.Random(0), "firecracker")


@pytest.mark.parametrize("seed", range(150))
def test_state_json_is_judged_by_its_key_as_by_its_vcpus(tmp_path, seed):
    """Numbers of every kind changed, in texts of one plan."""
    rng = random.Random(f"unseen state {seed}")
    path = tmp_path / "vm.json"
    data = texts(rng).encode()
    path.write_bytes(data)
    vcpus = xfast.read(path)[0].vcpus
    assert compare(path, rng, "cloud-hypervisor") or vcpus[0].layout != vcpus[-1].layout
    for _ in range(6):
        path.write_bytes(changed_numbers(data, rng))
        compare(path, rng, "cloud-hypervisor")


def test_each_number_of_a_state_json_that_tells_is_in_the_key(tmp_path):
    """One at a time, by a bit or two: what an Unseen may differ in, and what ends a plan."""
    rng = random.Random(3)
    path = tmp_path / "vm.json"
    keys, planned, numbers = Keys(), 0, []
    while not 1500 < len(numbers) < 3000:
        data = texts(rng).encode()
        numbers = [one.span() for one in NUMBERS.finditer(data)]
    zeros = [span for span in numbers if data[slice(*span)] == b"0"]
    others = [span for span in numbers if span not in zeros]
    sregs = [span for span in numbers if 0 < span[0] - data.index(b"sregs") < 1300]
    for start, end in [*others, *sregs, *rng.sample(zeros, 60)]:
        path.write_bytes(data)
        xfast.read(path)
        for bit in (0, 6, 7):
            number = str(int(data[start:end]) ^ 1 << bit).encode()
            path.write_bytes(data[:start] + number + data[end:])
            try:
                planned += keys.see(xfast.read(path)[0])
            except xfast.XfastError:
                continue
    assert planned > 1000
    assert len(keys.met) > 15


def test_a_class_that_was_judged_is_not_looked_into(tmp_path, monkeypatch):
    path = tmp_path / "stream"
    path.write_bytes(files.qemu_stream())
    hosts = HOSTS[:3]
    xfast.read(path)
    first = check(xfast.read(path)[0], hosts)
    path.write_bytes(files.qemu_stream(ram=bytes(77)))
    monkeypatch.setattr(judgement, "subject_of", None)
    (snapshot,) = xfast.read(path)
    monkeypatch.setattr(snapshot.vcpus, "_make", None)
    again = check(snapshot, hosts)
    assert [v.judgement for v in again] == [v.judgement for v in first]
    assert all(a.judgement is b.judgement for a, b in zip(again, first, strict=True))


def test_what_was_looked_at_is_judged_as_it_is_now(tmp_path):
    path = tmp_path / "stream"
    path.write_bytes(files.qemu_stream())
    xfast.read(path)
    (snapshot,) = xfast.read(path)
    host = catalogue()["intel-haswell"]
    before = check(snapshot, host)[0]
    snapshot.vcpus[0].area[512:520].view("<u8")[0] |= 1 << 9
    after = check(snapshot, host)[0]
    assert after.verdict == "incompatible" != before.verdict
    assert (after.verdict, after.fixable, after.findings) == judge_one_by_one(snapshot, host)


def test_other_snapshots_of_one_key_are_other_cases():
    """Who wrote it, what consumes it and what is doubtful count besides the key."""
    area = files.area(1, 4096, 0x207)
    answers = set()
    for kind, producer, doubts in (
        ("vm", "kvm", ()), ("vm", "qemu-kvm", ()), ("process", "kernel", ()), ("vm", "kvm", ("x",)),
    ):  # fmt: skip
        row = np.frombuffer(area, np.uint8)
        vcpus = Unseen("key", 1, lambda row=row: [Vcpu(0, row, INTEL, "given", xcr0=7)])
        snapshot = Snapshot("s", "raw", kind, producer, vcpus, doubts=doubts)
        verdicts = check(snapshot, HOSTS)
        answers.add(tuple((v.verdict, v.findings) for v in verdicts))
    assert len(answers) == 4


def test_unseen_vcpus_are_a_sequence():
    made = []

    def make():
        made.append(1)
        return [Vcpu(i, None) for i in range(3)]

    vcpus = Unseen("key", 3, make)
    assert len(vcpus) == 3
    assert not made
    assert key_of(vcpus) == "key"
    assert [v.index for v in vcpus] == [0, 1, 2]
    assert key_of(vcpus) is None
    assert vcpus[-1].index == 2
    assert [v.index for v in vcpus[1:]] == [1, 2]
    assert vcpus == [Vcpu(i, None) for i in range(3)]
    assert vcpus != []
    assert (vcpus == 3) is False
    assert repr(vcpus) == repr(list(vcpus))
    assert copy.deepcopy(vcpus) == list(vcpus) == pickle.loads(pickle.dumps(vcpus))
    assert made == [1]


def test_verdicts_are_made_once_and_print_as_a_list():
    row = np.frombuffer(files.area(1, 4096, 0x207), np.uint8)
    verdicts = check(row, HOSTS[:3], layout=INTEL, xcr0=7)
    assert len(verdicts) == 3
    assert verdicts[0] is next(iter(verdicts))
    assert [v.host for v in verdicts[1:]] == [host.name for host in HOSTS[1:3]]
    assert verdicts == list(verdicts)
    assert verdicts != list(verdicts)[:2]
    assert repr(verdicts) == repr(list(verdicts))
    with pytest.raises(IndexError):
        verdicts[3]


def test_what_a_class_shares_is_worked_out_once(monkeypatch):
    row = np.frombuffer(files.area(1, 4096, 0x207), np.uint8)
    judged = [
        check(row, hosts, layout=INTEL, xcr0=7) for hosts in (HOSTS[:3], HOSTS[:3], HOSTS[:2])
    ]
    asked = []
    shared = PerClass(lambda verdicts: asked.append(1) or len(verdicts))
    assert [shared.of(verdicts) for verdicts in judged] == [3, 3, 2]
    assert len(asked) == 2
    monkeypatch.setattr(PerClass, "LIMIT", 2)
    other = check(row, HOSTS[:1], layout=INTEL, xcr0=7)
    assert [shared.of(other), *map(shared.of, judged)] == [1, 3, 3, 2]


@pytest.mark.parametrize("seed", range(20))
def test_hosts_of_every_list_get_their_own_answers(seed):
    """Lists of equal length one after the other, the same one again, tuples and single hosts."""
    rng = random.Random(f"pools {seed}")
    row = np.frombuffer(files.area(1, 4096, 0x207), np.uint8)
    snapshot = Snapshot("s", "raw", "vm", "kvm", [Vcpu(0, row, INTEL, "given", xcr0=7)])
    for _ in range(12):
        hosts = rng.sample(HOSTS, rng.choice((1, 2, 2, 3)))
        hosts = rng.choice([hosts, tuple(hosts), [host.name for host in hosts]])
        for _ in range(rng.choice((1, 2))):
            for verdict, host in zip(check(snapshot, hosts), hosts, strict=True):
                one = xfast.resolve(host) if isinstance(host, str) else host
                assert verdict.host == one.name
                expected = judge_one_by_one(snapshot, one)
                assert (verdict.verdict, verdict.fixable, verdict.findings) == expected
