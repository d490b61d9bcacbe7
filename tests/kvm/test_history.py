"""The story of ad856280ddea, step by step, as section 7 of the kernel's history has it."""

import pytest

from xfast.kvm import render, story
from xfast.kvm.history import KERNELS


@pytest.fixture(scope="module")
def told():
    rows = story()
    return {(row.step, row.what): dict(zip(KERNELS, row.cells, strict=True)) for row in rows}


def cells(told, words):
    (found,) = [cell for (_, what), cell in told.items() if words in what]
    return found


def test_there_are_seven_steps(told):
    assert sorted({step for step, _ in told}) == list(range(1, 8))


def test_the_image_holds_pkru_on_every_kernel(told):
    for cell in cells(told, "switch back").values():
        assert "0x207" in cell


def test_only_5_16_leaks(told):
    leaks = {release for release, cell in cells(told, "KVM_GET_XSAVE").items() if "leak" in cell}
    assert leaks == {"5.16"}
    for release, cell in cells(told, "KVM_GET_XSAVE").items():
        assert ("0x207" in cell) == (release == "5.16")


def test_the_leak_is_refused_without_pku_and_lost_by_old_qemu(told):
    assert "failed: KVM_SET_XSAVE" in cells(told, "migration to a host without PKU")["5.16"]
    silent = cells(told, "by QEMU 7.2")["5.16"]
    assert "reported as done, lost x87+sse+avx, XCR0 bits 0x6" in silent
    for release in KERNELS.keys() - {"5.16"}:
        assert cells(told, "migration to a host without PKU")[release].endswith("done")


def test_what_leaked_is_refused_after_the_commit_even_where_pku_is_there(told):
    refused = {
        release
        for release, cell in cells(told, "what 5.16 saved").items()
        if "xstate_bv 0x200" in cell
    }
    assert refused == {"5.18.2", "6.1"}


def test_x87_and_sse_were_lost_until_a1020a25e697(told):
    for release, cell in cells(told, "without XSAVE").items():
        assert ("reported as done, lost x87+sse" in cell) == (release == "5.18.2")


def test_as_text_kernels_that_agree_share_a_line():
    text = render(story())
    assert text.count("\n") < 70
    assert "5.16 (bf5d00470787, the leak):\n       XSTATE_BV 0x207" in text
    assert max(map(len, text.splitlines())) < 140


def test_the_text_says_what_it_is_about():
    title, *lines = render(story()).splitlines()
    assert title == (
        'Linux kernel commit ad856280ddea ("x86/kvm/fpu: Limit guest user_xfeatures to supported '
        'bits of XCR0") (in v5.17)'
    )
    text = "\n".join(lines)
    for word in ("state components", "a mask at byte 512, XSTATE_BV", "user_xfeatures is the mask"):
        assert word in text
    assert "  5.15: KVM's own code (until 5.16-rc1)\n" in text
    assert "  5.18.2: ad856280ddea (from 5.17-rc6, 5.16.13 until 6.0-rc7, 5.19.12)\n" in text
    assert "  6.6: 8647c52e9504 (from 6.6-rc6, 6.5.9, 6.1.60 and on)\n" in text


def test_5_15_has_no_user_xfeatures(told):
    for release, cell in cells(told, "KVM_SET_CPUID2").items():
        assert ("user_xfeatures" in cell) == (release != "5.15")


def test_other_releases_can_be_asked():
    rows = story(["6.12", "7.0"])
    assert all(len(row.cells) == 2 for row in rows)
    assert render(rows, ["6.12", "7.0"]).count("6.12") == 0  # they agree in every step
