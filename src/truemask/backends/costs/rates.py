"""The measured constants: how fast each backend is on the processors whose tables ship."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Rates:
    """A backend's constants. Those called `call...` are seconds, `doubles` and `halves` factors, others per second.

    Calibration goes by these names, and by `backward` in a name: what is needed in training only.
    """

    forward: float  # useful arithmetic a second in fp32
    backward: float
    call: float  # what any call takes
    call_backward: float
    doubles: float = 2.6  # how many times longer the arithmetic takes in fp64
    halves: float = 1.0  # and in bf16 and fp16


@dataclass(frozen=True)
class SdpaRates(Rates):
    """`join`: bytes a second, of all its copies, at which a bias becomes dense and meets its mask."""

    join: float = 3.7e9


@dataclass(frozen=True)
class StripRates(Rates):
    """`call_group`: each group of strips; `copy`: bytes a second of rows gathered and added; `join` as above."""

    call_group: float = 60e-6
    copy: float = 24e9
    join: float = 1.5e9


@dataclass(frozen=True)
class NativeRates(Rates):
    """`read`: bytes a second at which keys and values come, which is what few queries wait for."""

    read: float = 20e9


@dataclass(frozen=True)
class Table:
    """The constants of every backend that has some, under the backend's name."""

    sdpa: SdpaRates = SdpaRates(120e9, 118e9, 70e-6, 215e-6)
    block_sparse: StripRates = StripRates(100e9, 88e9, 140e-6, 320e-6)
    native: NativeRates = NativeRates(130e9, 125e9, 95e-6, 300e-6)
    reference: Rates = Rates(36e9, 31e9, 490e-6, 950e-6)


SHIPPED = Table()  # two cores of an AMD EPYC with AVX2, torch 2.13.0 CPU, medians of several runs


AMX = Table(  # two cores of an Intel Xeon with AVX-512 and AMX, torch 2.13.0 CPU, `truemask bench --calibrate`
    SdpaRates(205e9, 211e9, 60e-6, 150e-6, doubles=2.3, halves=0.39, join=3.3e9),
    StripRates(181e9, 99e9, 85e-6, 247e-6, doubles=2.4, halves=1.25, call_group=37e-6, copy=43e9, join=1.3e9),
    NativeRates(293e9, 242e9, 64e-6, 149e-6, halves=1.57, read=45e9),
    Rates(36e9, 31e9, 329e-6, 695e-6, doubles=1.57, halves=1.04),
)


TABLES = {"avx2": SHIPPED, "amx": AMX}


MEASURED_WITH = {"avx2": "avx2", "amx": "avx512_bf16"}  # the native kernel's instruction set


BACKENDS = tuple(field.name for field in fields(Table))
