"""Write `xfast/hosts/models.toml` from libvirt's CPU map and QEMU's own models.

    python docs/make_models.py /usr/share/libvirt/cpu_map > xfast/hosts/models.toml

Only facts are taken: which CPUID features, of those that xfast knows, each named model has. The
map of libvirt 9.0 was used, and the qemu-system-x86_64 (7.2) on the path, which is asked what
each of its models gives a guest. Models that are newer are older ones, and what a later map gives
them more or less.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from xfast.hosts.models import Model, difference, kernel_name, read_map

NEWER = {
    "EPYC-Genoa": (
        "EPYC-Milan",
        (25, 17),
        "avx512_bf16 avx512_vpopcntdq avx512_bitalg avx512bw avx512cd avx512dq avx512f avx512ifma "
        "avx512vbmi avx512_vbmi2 avx512vl avx512_vnni gfni la57 vaes vpclmulqdq",
        "",
    ),
    "EPYC-Turin": (
        "EPYC-Genoa",
        (26, 0),
        "avx_vnni avx512_vp2intersect movdir64b movdiri",
        "",
    ),
    "SapphireRapids": (
        "Icelake-Server",
        (6, 143),
        "amx_bf16 amx_int8 amx_tile avx_vnni avx512_bf16 avx512_fp16 avx512ifma fsgsbase rdpid "
        "serialize sha_ni tsxldtrk xfd xsaves",
        "mpx",
    ),
    "GraniteRapids": ("SapphireRapids", (6, 173), "amx_fp16", ""),
    "SierraForest": (
        "Icelake-Server",
        (6, 175),
        "avx_ifma avx_ne_convert avx_vnni avx_vnni_int8 cmpccxadd fsgsbase rdpid serialize sha_ni "
        "xsaves",
        "mpx hle rtm la57 avx512f avx512dq avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 "
        "avx512_vnni avx512_bitalg avx512_vpopcntdq avx512ifma",
    ),
}
"""{name: (relative, family and model, features it has more, features it lacks)}."""


def newer(models: dict[str, Model]) -> dict[str, Model]:
    """Return `models` and those of NEWER."""
    found = dict(models)
    for name, (relative, signature, more, less) in NEWER.items():
        features = found[relative].features | set(more.split())
        found[name] = found[relative]._replace(
            name=name,
            signatures=(signature,),
            features=features - set(less.split()),
            source="libvirt cpu map, later than 9.0",
        )
    return found


def ask_qemu() -> dict[str, frozenset[str]]:
    """Return what each of QEMU's models gives a guest, {name: features}."""
    command = "qemu-system-x86_64 -M none -accel tcg -nodefaults -display none -qmp stdio -S"
    with subprocess.Popen(
        command.split(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:

        def execute(name: str, **arguments: Any) -> Any:
            assert qemu.stdin
            assert qemu.stdout
            qemu.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
            qemu.stdin.flush()
            for line in qemu.stdout:
                reply = json.loads(line)
                if "return" in reply or "error" in reply:
                    return reply.get("return")
            raise EOFError("QEMU ended")

        execute("qmp_capabilities")
        found = {}
        for definition in execute("query-cpu-definitions"):
            name = definition["name"]
            reply = execute("query-cpu-model-expansion", type="full", model={"name": name})
            if reply is not None and name not in ("max", "host", "base"):
                props = reply["model"]["props"]
                names = (kernel_name(key) for key, value in props.items() if value is True)
                found[name] = frozenset(filter(None, names))
        execute("quit")
    return found


def main(folder: Path) -> None:
    """Print the table."""
    print("# Written by docs/make_models.py; see there.")
    qemu = ask_qemu()
    models = newer(read_map(folder, "libvirt 9.0 cpu map"))
    for name, features in qemu.items():
        base = models.get(re.sub(r"-v\d+\Z", "", name))
        if name not in models and base is not None:
            models[name] = base._replace(name=name, features=features, source="QEMU 7.2")
    for model in models.values():
        print("\n[[models]]")
        print(f"name = {json.dumps(model.name)}")
        if model.vendor:
            print(f"vendor = {json.dumps(model.vendor)}")
        if model.signatures:
            print(f"signatures = {json.dumps(model.signatures)}")
        print(f"source = {json.dumps(model.source)}")
        print(f"features = {json.dumps(' '.join(sorted(model.features)))}")
        change = difference(model.features, qemu.get(model.name, model.features - {"mpx"}))
        if change:
            print(f"qemu = {json.dumps(change)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
