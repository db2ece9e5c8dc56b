"""The constants that ship, each with the machine it belongs to; `benchmarks/costs.py --as-table` prints them so.

Zen 4's were calibrated. `read` of its sdpa, and few rows, packing and steps of its native kernel with `avx512_bf16`,
were set by hand between what 1 to 192 rows took, of both head sizes, with one thread. Elsewhere nobody knows `read` of
sdpa: with 1e12 nobody waits. `copy` was measured on none of them; `truemask bench --calibrate` measures it.

Those of the AMD with AVX2 and of the Intel come from older runs (kernel 0.1), which had one factor for half precision:
shares of few rows, steps, fp16, `few`, `pack` and `mixed` are guesses there.

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
    vendor: str  # or, where a table that is taken by name must stay as it is, more than that
    rates: NativeRates


def vendor_of(processor: str) -> str:
    """Who made it; empty for others.

    >>> vendor_of("AMD EPYC, AVX512"), vendor_of("Intel(R) Xeon(R) Processor, AVX512"), vendor_of("aarch64")
    ('AMD', 'Intel', '')
    """
    return next((vendor for vendor in VENDORS if vendor in processor), "")


# fmt: off
# -- torch's operators -------------------------------------------------------------------------------------------------

TORCH = {
    "avx2": TorchCosts("AMD EPYC (AVX2 only), torch 2.13.0", "AMD", ("avx2", "AMD, AVX2"), (
        SdpaRates(
            call=5e-5, call_backward=0.00018, threads=2, join=3.7e9, masked=4.6e9, read=1e12,
            paces={
            "fp32": Both(Pace(1.33e11, 1.39e11, 1.5e-6, 0.066, 0.65, 0.92),
                         Pace(1.12e11, 1.39e11, 4e-6, 0.1, 0.8, 0.93)),
            "fp64": Both(Pace(5.1e10, 5.3e10, 1.5e-6, 0.066, 0.65, 0.92),
                         Pace(4.3e10, 5.3e10, 4e-6, 0.1, 0.8, 0.93)),
            "bf16": Both(Pace(1.15e11, 1.2e11, 1.5e-6, 0.04, 0.65, 0.92),
                         Pace(1.09e11, 1.3e11, 4e-6, 0.1, 0.8, 0.93)),
            "fp16": Both(Pace(1.15e11, 1.2e11, 1.5e-6, 0.04, 0.65, 0.92),
                         Pace(1.09e11, 1.3e11, 4e-6, 0.1, 0.8, 0.93)),
        }),
        StripRates(
            call=0.00011, call_backward=0.00029, threads=2, call_group=6e-5, copy=2.4e10, join=1.5e9,
            paces={
            "fp32": Both(Pace(1e11, 1.05e11, 8e-6), Pace(8.8e10, 1e11, 2e-5)),
            "fp64": Both(Pace(3.9e10, 4e10, 8e-6), Pace(3.4e10, 3.9e10, 2e-5)),
            "bf16": Both(Pace(9.5e10, 1e11, 8e-6), Pace(8.8e10, 1e11, 2e-5)),
            "fp16": Both(Pace(9.5e10, 1e11, 8e-6), Pace(8.8e10, 1e11, 2e-5)),
        }),
        Rates(
            call=0.0004, call_backward=0.0009, threads=2,
            paces={
            "fp32": Both(Pace(3.6e10, 3.6e10), Pace(3.1e10, 3.1e10)),
            "fp64": Both(Pace(1.39e10, 1.39e10), Pace(1.19e10, 1.19e10)),
            "bf16": Both(Pace(3.6e10, 3.6e10), Pace(3.1e10, 3.1e10)),
            "fp16": Both(Pace(3.6e10, 3.6e10), Pace(3.1e10, 3.1e10)),
        }),
    )),
    "avx512": TorchCosts("AMD EPYC (Zen 4), torch 2.13.0", "AMD", ("avx512_bf16", "AMD"), (
        SdpaRates(
            call=2.95e-5, call_backward=0.000129, threads=2, join=4.19e9, masked=3.75e9, read=2.1e10,
            paces={
            "fp32": Both(Pace(1.58e11, 1.7e11, 2.36e-6, 0.0659, 0.9, 0.996),
                         Pace(1.46e11, 1.7e11, 4.32e-6, 0.0999, 0.984, 0.9)),
            "fp64": Both(Pace(6.2e10, 6.44e10, 2.36e-6, 0.0659, 0.95, 0.996),
                         Pace(4.79e10, 5.91e10, 4.32e-6, 0.0999, 0.984, 0.9)),
            "bf16": Both(Pace(1.54e11, 1.71e11, 4.56e-6, 0.0269, 0.882, 0.939),
                         Pace(2.15e11, 2.42e11, 6.5e-5, 0.0674, 0.694, 0.707)),
            "fp16": Both(Pace(1.56e11, 1.63e11, 2.36e-6, 0.0399, 0.95, 0.996),
                         Pace(1.47e11, 1.75e11, 4.32e-6, 0.0999, 0.984, 0.9)),
        }),
        StripRates(
            call=4.31e-5, call_backward=0.000162, threads=2, call_group=2.37e-5, copy=2.4e10, join=1.7e9,
            paces={
            "fp32": Both(Pace(1.58e11, 1.46e11, 1.52e-5), Pace(1.38e11, 9.41e10, 4.39e-5)),
            "fp64": Both(Pace(5.2e10, 4.94e10, 1.52e-5), Pace(4.3e10, 4.2e10, 4.39e-5)),
            "bf16": Both(Pace(1.09e11, 1.04e11, 1.52e-5), Pace(1.44e11, 1.35e11, 4.39e-5)),
            "fp16": Both(Pace(1.45e11, 1.38e11, 1.52e-5), Pace(1.18e11, 1.12e11, 4.39e-5)),
        }),
        Rates(
            call=0.0003, call_backward=0.000584, threads=2,
            paces={
            "fp32": Both(Pace(6.5e10, 6.5e10), Pace(3.81e10, 3.81e10)),
            "fp64": Both(Pace(3.1e10, 3.1e10), Pace(2.02e10, 2.02e10)),
            "bf16": Both(Pace(6.22e10, 6.22e10), Pace(3.82e10, 3.82e10)),
            "fp16": Both(Pace(5.92e10, 5.92e10), Pace(3.5e10, 3.5e10)),
        }),
    )),
    "amx": TorchCosts("Intel Xeon with AMX, torch 2.13.0", "Intel", ("avx512_bf16", "Intel"), (
        SdpaRates(
            call=5e-5, call_backward=0.00015, threads=2, join=3.3e9, masked=4e9, read=1e12,
            paces={
            "fp32": Both(Pace(2.4e11, 2.5e11, 1e-6, 0.05, 0.68, 0.8),
                         Pace(2.54e11, 2.65e11, 4e-6, 0.1, 0.75, 0.72)),
            "fp64": Both(Pace(1.03e11, 1.07e11, 1e-6, 0.05, 0.68, 0.8),
                         Pace(1.09e11, 1.14e11, 4e-6, 0.1, 0.75, 0.72)),
            "bf16": Both(Pace(7.4e11, 1.1e12, 2.4e-6, 0.05, 0.8, 0.82),
                         Pace(3.4e11, 5.3e11, 9e-5, 0.1, 1, 1)),
            "fp16": Both(Pace(2.25e11, 2.4e11, 1e-6, 0.03, 0.68, 0.8),
                         Pace(2.45e11, 2.6e11, 4e-6, 0.1, 0.75, 0.72)),
        }),
        StripRates(
            call=8.5e-5, call_backward=0.000247, threads=2, call_group=3.7e-5, copy=4.3e10, join=1.3e9,
            paces={
            "fp32": Both(Pace(1.81e11, 1.85e11, 6e-6), Pace(9.9e10, 1.1e11, 1.5e-5)),
            "fp64": Both(Pace(7.5e10, 7.7e10, 6e-6), Pace(4.1e10, 4.5e10, 1.5e-5)),
            "bf16": Both(Pace(1.45e11, 1.6e11, 6e-6), Pace(9.2e10, 1.03e11, 1.5e-5)),
            "fp16": Both(Pace(1.45e11, 1.6e11, 6e-6), Pace(9.2e10, 1.03e11, 1.5e-5)),
        }),
        Rates(
            call=0.000329, call_backward=0.000695, threads=2,
            paces={
            "fp32": Both(Pace(3.6e10, 3.6e10), Pace(3.1e10, 3.1e10)),
            "fp64": Both(Pace(2.3e10, 2.3e10), Pace(1.98e10, 1.98e10)),
            "bf16": Both(Pace(3.46e10, 3.46e10), Pace(2.98e10, 2.98e10)),
            "fp16": Both(Pace(3.46e10, 3.46e10), Pace(2.98e10, 2.98e10)),
        }),
    )),
}

# -- the native kernel -------------------------------------------------------------------------------------------------

NATIVES = (
    NativeCosts("avx512_bf16", "AMD EPYC (Zen 4), torch 2.13.0", "AMD", NativeRates(
        call=3.26e-5, call_backward=0.000129, threads=2, read=6e10, read_halves=6.7e10, few=1.45e11, few_halves=1.8e11,
        pack=4e10, pack_halves=1e10, mixed=0.975, lanes=16, peak=1.17e11,
        paces={
        "fp32": Both(Pace(1.89e11, 1.98e11, 1.2e-6), Pace(2e11, 2.09e11, 6e-6)),
        "bf16": Both(Pace(3.5e11, 3.66e11, 4.44e-6), Pace(3.28e11, 3.6e11, 1.2e-5)),
        "fp16": Both(Pace(1.85e11, 1.9e11, 1.2e-6), Pace(1.96e11, 1.96e11, 5e-6)),
    })),
    NativeCosts("avx512", "AMD EPYC (Zen 4), torch 2.13.0", "AMD", NativeRates(
        call=2.93e-5, call_backward=0.00012, threads=2, read=2.76e10, read_halves=5.81e10, few=2.47e11,
        few_halves=1.88e11, pack=2.8e10, pack_halves=2.8e10, mixed=0.905, lanes=16, peak=1.16e11,
        paces={
        "fp32": Both(Pace(1.82e11, 1.88e11, 2.17e-7), Pace(2.05e11, 2.13e11, 1.29e-6)),
        "bf16": Both(Pace(1.74e11, 1.91e11, 1.03e-6), Pace(2.02e11, 2.11e11, 1e-7)),
        "fp16": Both(Pace(1.82e11, 1.88e11, 2.17e-7), Pace(1.98e11, 1.98e11, 1.29e-6)),
    })),
    NativeCosts("avx2", "AMD EPYC (Zen 4), torch 2.13.0", "AMD", NativeRates(
        call=2.87e-5, call_backward=0.000122, threads=2, read=2.68e10, read_halves=4.81e10, few=2.92e11,
        few_halves=1.88e11, pack=7.25e10, pack_halves=7.25e10, mixed=0.927, lanes=8, peak=1.17e11,
        paces={
        "fp32": Both(Pace(1.73e11, 1.85e11, 1e-7), Pace(1.95e11, 1.97e11, 1.9e-6)),
        "bf16": Both(Pace(1.73e11, 1.84e11, 2.15e-7), Pace(1.89e11, 1.96e11, 1e-7)),
        "fp16": Both(Pace(1.6e11, 1.65e11, 1e-7), Pace(1.77e11, 1.77e11, 1.9e-6)),
    })),
    NativeCosts("base", "AMD EPYC (Zen 4), torch 2.13.0", "AMD", NativeRates(
        call=2.65e-5, call_backward=0.00012, threads=2, read=3.69e10, read_halves=4.52e10, few=6.28e10,
        few_halves=6.27e10, pack=2.02e10, pack_halves=2.02e10, mixed=0.592, lanes=4, peak=5.1e10,
        paces={
        "fp32": Both(Pace(5.97e10, 6.26e10, 3.54e-6), Pace(6.65e10, 6.7e10, 1.59e-7)),
        "bf16": Both(Pace(5.98e10, 6.24e10, 5.46e-6), Pace(6.66e10, 6.64e10, 1e-7)),
        "fp16": Both(Pace(5.86e10, 6.02e10, 3.54e-6), Pace(6.37e10, 6.56e10, 1.59e-7)),
    })),
    NativeCosts("amx_emulated", "AMD EPYC (Zen 4)", "AMD", NativeRates(
        call=5e-5, call_backward=0.00014, threads=2, read=8e9, read_halves=6e9, few=2.43e10, few_halves=1.35e10,
        pack=1.1e10, pack_halves=1.1e10, mixed=1.1, lanes=16, peak=1.5e10,
        paces={
        "fp32": Both(Pace(2.7e10, 2.8e10), Pace(2.8e10, 2.8e10, 3e-6)),
        "bf16": Both(Pace(6.6e9, 7.3e9), Pace(6.6e9, 6.6e9, 3e-6)),
        "fp16": Both(Pace(2.7e10, 2.8e10), Pace(2.8e10, 2.8e10, 3e-6)),
        "fp32_parts": Both(Pace(1.4e9, 1.4e9), Pace(1.2e9, 1.2e9)),
        "fp16_parts": Both(Pace(1.8e9, 1.8e9), Pace(1.8e9, 1.8e9)),
    })),
    NativeCosts("avx2", "AMD EPYC (AVX2 only), kernel 0.1", "AMD, AVX2", NativeRates(
        call=8e-5, call_backward=0.00027, threads=2, read=2.3e10, read_halves=1.6e10, few=1.35e11, few_halves=6.3e10,
        pack=3e10, pack_halves=3e10, mixed=1.4, lanes=8, peak=1.01e11,
        paces={
        "fp32": Both(Pace(1.5e11, 1.43e11), Pace(1.39e11, 1.55e11, 3e-6)),
        "bf16": Both(Pace(1.26e11, 1.3e11), Pace(1.5e11, 1.5e11, 3e-6)),
        "fp16": Both(Pace(1.26e11, 1.3e11), Pace(1.5e11, 1.5e11, 3e-6)),
    })),
    NativeCosts("avx512_bf16", "Intel Xeon with AMX, kernel 0.1", "Intel", NativeRates(
        call=5e-5, call_backward=0.00014, threads=2, read=2e10, read_halves=2.1e10, few=2.52e11, few_halves=1.2e11,
        pack=4e10, pack_halves=4e10, mixed=1.75, lanes=16, peak=2.27e11,
        paces={
        "fp32": Both(Pace(2.8e11, 2.85e11), Pace(2.9e11, 2.85e11, 3e-6)),
        "bf16": Both(Pace(2.8e11, 2.85e11), Pace(2.7e11, 2.7e11, 3e-6)),  # in floats, as with avx512
        "fp16": Both(Pace(2.4e11, 2.45e11), Pace(2.4e11, 2.45e11, 3e-6)),
        # With amx: the prototype's 1.6 times sdpa forward at heads of 64; the rest is unknown, so never chosen.
        "fp32_parts": Both(Pace(3.8e11, 2.85e11), Pace(1.5e11, 1.5e11, 3e-6)),
    })),
    NativeCosts("avx512", "Intel Xeon with AMX, kernel 0.1", "Intel", NativeRates(
        call=5e-5, call_backward=0.00014, threads=2, read=1.9e10, read_halves=2e10, few=2.38e11, few_halves=1.2e11,
        pack=3.8e10, pack_halves=3.8e10, mixed=1.75, lanes=16, peak=2.27e11,
        paces={
        "fp32": Both(Pace(2.65e11, 2.7e11), Pace(2.85e11, 2.8e11, 3e-6)),
        "bf16": Both(Pace(2.8e11, 2.85e11), Pace(2.7e11, 2.7e11, 3e-6)),
        "fp16": Both(Pace(2.4e11, 2.45e11), Pace(2.4e11, 2.45e11, 3e-6)),
    })),
    NativeCosts("avx2", "Intel Xeon with AMX, kernel 0.1", "Intel", NativeRates(
        call=5e-5, call_backward=0.00014, threads=2, read=1.5e10, read_halves=1.4e10, few=1.76e11, few_halves=9.5e10,
        pack=3e10, pack_halves=3e10, mixed=1.6, lanes=8, peak=1.1e11,
        paces={
        "fp32": Both(Pace(1.95e11, 2e11), Pace(1.65e11, 1.7e11, 3e-6)),
        "bf16": Both(Pace(1.92e11, 1.97e11), Pace(1.63e11, 1.68e11, 3e-6)),
        "fp16": Both(Pace(1.9e11, 1.95e11), Pace(1.6e11, 1.65e11, 3e-6)),
    })),
    NativeCosts("base", "Intel Xeon with AMX, kernel 0.1", "Intel", NativeRates(
        call=5e-5, call_backward=0.00014, threads=2, read=8e9, read_halves=6e9, few=6.57e10, few_halves=3.5e10,
        pack=1.1e10, pack_halves=1.1e10, mixed=1.3, lanes=4, peak=2.8e10,
        paces={
        "fp32": Both(Pace(7.3e10, 7.5e10), Pace(6.9e10, 7.1e10, 3e-6)),
        "bf16": Both(Pace(7.2e10, 7.4e10), Pace(6.8e10, 7e10, 3e-6)),
        "fp16": Both(Pace(7e10, 7.2e10), Pace(6.7e10, 6.9e10, 3e-6)),
    })),
)
NATIVE = {(one.isa, one.vendor): one for one in NATIVES}
