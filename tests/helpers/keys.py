"""What a format's keys must keep to: vCPUs with equal keys tell the same (`model.Unseen`)."""

from xfast.snapshots.model import Unseen, key_of
from xfast.xsave.area import facts
from xfast.xsave.layout import Layout


def told(vcpu):
    """Return all that a key stands for."""
    layout = vcpu.layout or Layout(())
    return (
        vcpu.index, vcpu.layout, layout.name, vcpu.layout_source, vcpu.layout_note, vcpu.portable,
        vcpu.xcr0, vcpu.xss, vcpu.xfd, vcpu.cpuid, vcpu.guest_mask, vcpu.pkru_enabled, vcpu.mode,
        vcpu.msrs, vcpu.fpu_differs, vcpu.cpuinfo, vcpu.has_xsave, len(vcpu.area),
        facts(vcpu.area, layout).tobytes(),
    )  # fmt: skip


class Keys:
    """Every key met so far, and what the vCPUs told for which it stood."""

    def __init__(self):
        self.met = {}

    def see(self, snapshot) -> bool:
        """Look into a snapshot; False where no key stands for its vCPUs."""
        key = key_of(snapshot.vcpus)
        if key is None:
            assert not isinstance(snapshot.vcpus, Unseen)
            return False
        count = len(snapshot.vcpus)
        found = [told(vcpu) for vcpu in snapshot.vcpus]
        assert count == len(found)
        assert key_of(snapshot.vcpus) is None  # who looks may change
        assert self.met.setdefault((snapshot.producer, key), found) == found
        return True
