"""What tools/check_sass.py reads out of listings and logs, without CUDA's tools."""

from __future__ import annotations

import pytest

import check_sass

LISTING = """
Fatbin elf code:
================
arch = sm_90a
code for sm_90a
\t\tFunction : _ZN7camelid4cuda12_GLOBAL__N_114run_matmul_fewI5ShapeEEvv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a0000017b82 */
                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R4], [R2.64] ;   /* 0x0 */
        /*0020*/                   LDSM.16.M88.4 R8, [R4] ;   /* 0x0 */
        /*0030*/             @!UP1 HMMA.16816.F32.BF16 R12, R8, R2, R12 ;   /* 0x0 */
"""


def kernels_of(text: str) -> list[check_sass.Kernel]:
    return check_sass.read_kernels(iter(text.splitlines(keepends=True)))


@pytest.fixture(autouse=True)
def _only_this_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_sass, "MEANT", {"run_matmul_few": check_sass._STREAM})


def test_kernels_and_their_instructions_are_read() -> None:
    (kernel,) = kernels_of(LISTING)
    assert kernel.arch == "sm_90a"
    assert kernel.counts.total() == 4
    assert kernel.has(r"HMMA\.16816") == kernel.has("LDGSTS") == 1
    assert list(check_sass.violations([kernel])) == []


@pytest.mark.parametrize("lacking", ["LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "HMMA.16816.F32.BF16"])
def test_a_missing_instruction_is_named(lacking: str) -> None:
    found = check_sass.violations(kernels_of(LISTING.replace(lacking, "NOP")))
    ((_, why),) = found
    assert why.replace("\\", "") == f"no instruction {lacking}"


@pytest.mark.parametrize("name", ["LDL", "LDL.LU", "STL.64"])
def test_local_memory_is_found_in_any_kernel(name: str) -> None:
    other = LISTING.replace("run_matmul_few", "other").replace("LDC", name)
    whys = [why for _, why in check_sass.violations(kernels_of(LISTING + other))]
    assert len(whys) == 1
    assert "local memory" in whys[0]


def test_who_starts_its_successor_waits_for_its_predecessor() -> None:
    listing = LISTING.replace("LDC R1, c[0x0][0x28]", "PREEXIT")
    ((_, why),) = check_sass.violations(kernels_of(listing))
    assert "does not wait" in why
    waits = listing.replace("LDSM.16.M88.4 R8, [R4]", "ACQBULK")
    assert all("wait" not in why for _, why in check_sass.violations(kernels_of(waits)))


@pytest.mark.parametrize("write", ["ULDC.64 UR4, c[0x0][0x208]", "R2UR UR5, R6", "NOP"])
def test_a_uniform_register_that_nothing_writes_is_found(write: str) -> None:
    copy = "LDGSTS.E.BYPASS.128 [R4+UR4], desc[UR5][R2.64]"
    listing = LISTING.replace("LDGSTS.E.BYPASS.128 [R4], [R2.64]", copy)
    listing = listing.replace("LDC R1, c[0x0][0x28]", write)
    lost = {"ULDC": "", "R2UR": "UR4", "NOP": "UR4, UR5"}[write.split(".")[0].split(" ")[0]]
    whys = [why for _, why in check_sass.violations(kernels_of(listing))]
    assert whys == ([f"reads {lost}, which nothing writes"] if lost else [])


def test_a_kernel_that_is_gone_is_named() -> None:
    found = check_sass.violations(kernels_of(LISTING.replace("run_matmul_few", "renamed")))
    assert [why for _, why in found] == ["there is no such kernel"]


def test_spills_and_serialised_wgmma_are_read_from_the_log() -> None:
    log = """
ptxas info    : Compiling entry function '_Z5cleanv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z4fullv' for 'sm_90a'
    32 bytes stack frame, 0 bytes spill stores, 44 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum \
register requirements.
"""
    spill, serial, ignored = check_sass.log_violations(log)
    assert "full" in spill
    assert "44 bytes spill loads" in spill
    assert "serialized" in serial
    assert "setmaxnreg" in ignored


def test_a_log_of_nothing_compiled_is_named() -> None:
    (why,) = check_sass.log_violations("ninja: no work to do.\n")
    assert "names no kernel" in why


HOPPER = """
arch = sm_90a
\t\tFunction : taker
        /*0220*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;   /* 0x0 */
        /*21460*/                  USETMAXREG.DEALLOC.CTAPOOL {gives:#x} ;    /* 0x0 */
"""
USAGE = """
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function taker:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_registers_that_nobody_gives_are_named() -> None:
    registers = check_sass.read_registers(USAGE.splitlines())
    assert registers == {("sm_90a", "taker"): 168}
    (kernel,) = kernels_of(HOPPER.format(gives=40))
    assert kernel.gives == {40}
    assert kernel.takes == {232}
    assert check_sass.wants_too_many(kernel, 168) is None
    (kernel,) = kernels_of(HOPPER.format(gives=48))
    assert "504 in all, and want 512" in str(check_sass.wants_too_many(kernel, 168))
    kernel.gives.clear()
    assert "nobody gives" in str(check_sass.wants_too_many(kernel, 168))
