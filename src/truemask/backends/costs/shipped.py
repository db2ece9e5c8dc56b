"""The constants that ship, each with the machine it belongs to; `benchmarks/costs.py --as-table` prints them so.

Those of Zen 4 and of the Intel Xeon with AMX were calibrated. On Zen 4, `read` of its sdpa, and few rows, packing and
steps of its native kernel with `avx512_bf16`, were set by hand between what 1 to 192 rows took, of both head sizes,
with one thread. `copy` was not measured on Zen 4 and the AMD with AVX2; `truemask bench --calibrate` measures it.

Those of the AMD with AVX2 come from older runs (kernel 0.1), which had one factor for half precision: shares of few
rows, steps, fp16, `few`, `pack` and `mixed` are guesses there, and nobody knows `read` of its sdpa: with 1e12 nobody
waits.
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
    "amx": TorchCosts("Intel Xeon (Sapphire Rapids), torch 2.13.0", "Intel", ("amx", "Intel"), (
        SdpaRates(
            call=3.05e-5, call_backward=6.54e-5, threads=2, join=4.01e9, masked=1.55e10, read=6.69e10,
            paces={
            "fp32": Both(Pace(3.04e11, 3.25e11, 1.99e-6, 0.0905, 1.02, 1.02),
                         Pace(3.21e11, 3.03e11, 9.49e-6, 0.181, 0.698, 0.843)),
            "fp64": Both(Pace(1.29e11, 1.35e11, 1.99e-6, 0.0905, 1.02, 1.02),
                         Pace(1.35e11, 1.42e11, 9.49e-6, 0.181, 0.698, 0.843)),
            "bf16": Both(Pace(7.81e11, 1.18e12, 3.02e-6, 0.0631, 1.55, 1.03),
                         Pace(4.5e11, 6.67e11, 7.12e-5, 0.126, 0.718, 1.25)),
            "fp16": Both(Pace(2.82e11, 3.01e11, 1.99e-6, 0.0543, 1.02, 1.02),
                         Pace(2.83e11, 3e11, 9.49e-6, 0.181, 0.698, 0.843)),
        }),
        StripRates(
            call=4.23e-5, call_backward=0.000119, threads=2, call_group=1.84e-5, copy=2.12e10, join=1.58e9,
            paces={
            "fp32": Both(Pace(2.41e11, 2.3e11, 1.11e-5), Pace(2.28e11, 2.27e11, 1.95e-5)),
            "fp64": Both(Pace(9.27e10, 9.52e10, 1.11e-5), Pace(9.18e10, 1.01e11, 1.95e-5)),
            "bf16": Both(Pace(2.18e11, 2.41e11, 1.11e-5), Pace(2.08e11, 2.32e11, 1.95e-5)),
            "fp16": Both(Pace(2.04e11, 2.25e11, 1.11e-5), Pace(2.16e11, 2.41e11, 1.95e-5)),
        }),
        Rates(
            call=0.000202, call_backward=0.000436, threads=2,
            paces={
            "fp32": Both(Pace(8.98e10, 8.98e10), Pace(5.91e10, 5.91e10)),
            "fp64": Both(Pace(5.02e10, 5.02e10), Pace(3.04e10, 3.04e10)),
            "bf16": Both(Pace(8.95e10, 8.95e10), Pace(5.27e10, 5.27e10)),
            "fp16": Both(Pace(8.73e10, 8.73e10), Pace(6.71e10, 6.71e10)),
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
    NativeCosts("amx", "Intel Xeon (Sapphire Rapids), torch 2.13.0", "Intel", NativeRates(
        call=3.89e-5, call_backward=9.75e-5, threads=2, read=9.4e10, read_halves=1.42e11, few=2.25e11,
        few_halves=2.05e11, pack=1.56e10, pack_halves=1.21e10, mixed=0.942, lanes=16, peak=2.35e11,
        paces={
        "fp32": Both(Pace(3.46e11, 3.57e11, 3.76e-6), Pace(3.85e11, 3.79e11, 1e-7)),
        "bf16": Both(Pace(1.32e12, 1.63e12, 2.97e-6), Pace(1.65e12, 1.85e12, 1e-7)),
        "fp16": Both(Pace(3.17e11, 3.23e11, 3.76e-6), Pace(3.75e11, 3.82e11, 1e-7)),
        "fp32_parts": Both(Pace(3.41e11, 3.63e11), Pace(3.23e11, 3.28e11, 3e-6)),
        "fp16_parts": Both(Pace(3.99e11, 4.07e11), Pace(5.49e11, 5.6e11, 3e-6)),
    })),
    NativeCosts("avx512_bf16", "Intel Xeon (Sapphire Rapids), torch 2.13.0", "Intel", NativeRates(
        call=3.47e-5, call_backward=9.48e-5, threads=2, read=8.34e10, read_halves=1.02e11, few=2.6e11,
        few_halves=2.14e11, pack=1.7e10, pack_halves=8.19e9, mixed=1, lanes=16, peak=2.34e11,
        paces={
        "fp32": Both(Pace(3.52e11, 3.66e11, 3.61e-6), Pace(3.4e11, 3.4e11, 1e-7)),
        "bf16": Both(Pace(3.4e11, 3.59e11, 2.79e-6), Pace(3.73e11, 3.69e11, 1e-7)),
        "fp16": Both(Pace(3.39e11, 3.46e11, 3.61e-6), Pace(4.09e11, 4.17e11, 1e-7)),
    })),
    NativeCosts("avx512", "Intel Xeon (Sapphire Rapids), torch 2.13.0", "Intel", NativeRates(
        call=3.65e-5, call_backward=9.52e-5, threads=2, read=8.56e10, read_halves=1.91e11, few=2.4e11,
        few_halves=1.86e11, pack=1.58e10, pack_halves=7.91e9, mixed=1.04, lanes=16, peak=2.34e11,
        paces={
        "fp32": Both(Pace(3.36e11, 3.28e11, 3.06e-6), Pace(3.53e11, 3.58e11, 1e-7)),
        "bf16": Both(Pace(3.29e11, 3.23e11, 2.53e-6), Pace(3.82e11, 4.35e11, 1e-7)),
        "fp16": Both(Pace(3.2e11, 3.26e11, 3.06e-6), Pace(4.42e11, 4.51e11, 1e-7)),
    })),
    NativeCosts("avx2", "Intel Xeon (Sapphire Rapids), torch 2.13.0", "Intel", NativeRates(
        call=3.48e-5, call_backward=8.97e-5, threads=2, read=1.16e11, read_halves=1.88e11, few=1.44e11,
        few_halves=1.26e11, pack=2.44e10, pack_halves=1.23e10, mixed=0.85, lanes=8, peak=1.26e11,
        paces={
        "fp32": Both(Pace(1.9e11, 2.02e11, 8.51e-7), Pace(2.1e11, 2.09e11, 7.57e-7)),
        "bf16": Both(Pace(1.86e11, 2e11, 4.9e-7), Pace(2.12e11, 2.16e11, 1e-7)),
        "fp16": Both(Pace(1.71e11, 1.75e11, 8.51e-7), Pace(2e11, 2.06e11, 7.57e-7)),
    })),
    NativeCosts("base", "Intel Xeon (Sapphire Rapids), torch 2.13.0", "Intel", NativeRates(
        call=3.11e-5, call_backward=8.94e-5, threads=2, read=2.18e11, read_halves=1.52e11, few=5.95e10,
        few_halves=6.26e10, pack=1.91e10, pack_halves=1.21e10, mixed=0.602, lanes=4, peak=4.42e10,
        paces={
        "fp32": Both(Pace(6.26e10, 6.62e10, 5.63e-6), Pace(6.79e10, 7.04e10, 1e-7)),
        "bf16": Both(Pace(6.18e10, 6.61e10, 5.7e-6), Pace(6.87e10, 7.05e10, 1e-7)),
        "fp16": Both(Pace(6.12e10, 6.29e10, 5.63e-6), Pace(6.64e10, 6.84e10, 1e-7)),
    })),
)
NATIVE = {(one.isa, one.vendor): one for one in NATIVES}
