"""The constants that ship, each with the machine it was measured on; `benchmarks/costs.py --as-table` prints them so.

Nobody has measured the native kernel with `amx`: a prototype reached 1,000 to 1,200 GF/s forward and 1,450 to 1,800
backward in bf16 on two cores, which is no price.
"""

from __future__ import annotations

from typing import NamedTuple

from truemask.backends.costs.rates import Both, NativeRates, Pace, Rates, SdpaRates, StripRates

VENDORS = ("AMD", "Intel")


class TorchCosts(NamedTuple):
    """Those of torch's own operators on one machine."""

    machine: str
    vendor: str
    native: tuple[str, str]  # that of `NATIVE` which goes with it where this table is named
    rates: tuple[SdpaRates, StripRates, Rates]


class NativeCosts(NamedTuple):
    """Those of the native kernel with one instruction set on one machine."""

    isa: str
    machine: str
    vendor: str
    rates: NativeRates


def vendor_of(processor: str) -> str:
    """Who made it; empty for others.

    >>> vendor_of("AMD EPYC, AVX512"), vendor_of("Intel(R) Xeon(R) Processor, AVX512"), vendor_of("aarch64")
    ('AMD', 'Intel', '')
    """
    return next((vendor for vendor in VENDORS if vendor in processor), "")


# -- torch's operators -------------------------------------------------------------------------------------------------

AVX2 = TorchCosts(
    "AMD EPYC with AVX2 (torch 2.13.0, two cores)",
    "AMD",
    ("avx2", "AMD"),
    (
        SdpaRates(
            50e-6,
            180e-6,
            paces={
                "fp32": Both(Pace(133e9, 139e9, 1.5e-6, 0.066, 0.65, 0.92), Pace(112e9, 139e9, 4e-6, 0.1, 0.8, 0.93)),
                "fp64": Both(Pace(51e9, 53e9, 1.5e-6, 0.066, 0.65, 0.92), Pace(43e9, 53e9, 4e-6, 0.1, 0.8, 0.93)),
                "bf16": Both(Pace(115e9, 120e9, 1.5e-6, 0.04, 0.65, 0.92), Pace(109e9, 130e9, 4e-6, 0.1, 0.8, 0.93)),
                "fp16": Both(Pace(115e9, 120e9, 1.5e-6, 0.04, 0.65, 0.92), Pace(109e9, 130e9, 4e-6, 0.1, 0.8, 0.93)),
            },
            join=3.7e9,
            masked=4.6e9,
        ),
        StripRates(
            110e-6,
            290e-6,
            paces={
                "fp32": Both(Pace(133e9, 139e9), Pace(112e9, 139e9)),
                "fp64": Both(Pace(51e9, 53e9), Pace(43e9, 53e9)),
                "bf16": Both(Pace(115e9, 120e9), Pace(109e9, 130e9)),
                "fp16": Both(Pace(115e9, 120e9), Pace(109e9, 130e9)),
            },
        ),
        Rates(
            400e-6,
            900e-6,
            paces={
                "fp32": Both(Pace(36e9, 36e9), Pace(31e9, 31e9)),
                "fp64": Both(Pace(14e9, 14e9), Pace(12e9, 12e9)),
                "bf16": Both(Pace(36e9, 36e9), Pace(31e9, 31e9)),
                "fp16": Both(Pace(36e9, 36e9), Pace(31e9, 31e9)),
            },
        ),
    ),
)
TORCH = {
    "avx2": AVX2,
    "avx512": AVX2._replace(native=("avx512_bf16", "AMD")),
    "amx": AVX2._replace(native=("avx512_bf16", "Intel"), vendor="Intel"),
}

# -- the native kernel -------------------------------------------------------------------------------------------------

_AVX2 = NativeCosts(
    "avx2",
    "AMD EPYC",
    "AMD",
    NativeRates(
        70e-6,
        250e-6,
        paces={
            "fp32": Both(Pace(150e9, 143e9, 2e-6), Pace(139e9, 155e9, 4e-6)),
            "bf16": Both(Pace(126e9, 130e9, 2e-6), Pace(150e9, 150e9, 4e-6)),
            "fp16": Both(Pace(126e9, 130e9, 2e-6), Pace(150e9, 150e9, 4e-6)),
        },
        read=23e9,
        read_halves=16e9,
        pack=30e9,
        mixed=1.4,
        lanes=8,
        peak=101e9,
    ),
)
NATIVE = {
    ("avx2", "AMD"): _AVX2,
    ("avx512_bf16", "AMD"): _AVX2._replace(isa="avx512_bf16"),
    ("avx512_bf16", "Intel"): _AVX2._replace(isa="avx512_bf16", vendor="Intel"),
}
