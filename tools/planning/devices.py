"""Accelerators by name: what their makers publish, for planning. No measurement of ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shards.errors import UsageError

if TYPE_CHECKING:
    from student.pairs import Counting

CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Device:
    """One card."""

    name: str
    tflops: float
    """Dense bfloat16 products with sums in float32, 10^12 FLOP/s at peak: no sparsity."""
    gib: float
    """Memory, as it is sold."""
    gb_per_s: float
    """Memory bandwidth, 10^9 bytes/s at peak."""

    @property
    def kind(self) -> str:
        """Of torch."""
        return "cpu" if self.name == CPU else "cuda"

    @property
    def counting(self) -> Counting:
        """How attention computes its pairs there."""
        return "runs" if self.name == CPU else "tiles"


DEVICES = {
    device.name: device
    for device in (
        Device("H100-SXM", 989.4, 80, 3350),
        Device("H100-PCIe", 756.5, 80, 2000),
        Device("H200-SXM", 989.4, 141, 4800),
        Device("B200", 2250, 180, 8000),
        Device("A100-SXM-80", 312, 80, 2039),
        Device("A100-SXM-40", 312, 40, 1555),
        Device("L40S", 362.05, 48, 864),
        Device("L4", 121, 24, 300),
        Device("A10", 125, 24, 600),
        Device("RTX-5090", 209.5, 32, 1792),
        Device("RTX-4090", 165.2, 24, 1008),
        Device("RTX-3090", 71, 24, 936),
        Device("MI300X", 1307.4, 192, 5300),
    )
}
"""From the makers' data sheets. What has no tensor cores for bfloat16 is not here."""


def device_named(
    name: str, *, tflops: float | None = None, gib: float | None = None, gb_per_s: float | None = None
) -> Device:
    """A device of the table, or a CPU, with figures changed by those given.

    Raises:
        UsageError: no such device, a CPU without figures of its own, or a figure that is not positive.
    """
    if name not in DEVICES and name != CPU:
        raise UsageError(f"unknown device {name!r}; the devices are {', '.join(DEVICES)}, {CPU}")
    if name == CPU and tflops is None:
        raise UsageError("a cpu has no published peak: give --peak-tflops (and --memory-gib)")
    device = DEVICES.get(name, Device(CPU, 0.0, 64, 50))
    figures = {"peak-tflops": tflops, "memory-gib": gib, "bandwidth-gbs": gb_per_s}
    for flag, value in figures.items():
        if value is not None and not value > 0:
            raise UsageError(f"--{flag} must be positive, got {value:g}")
    return replace(
        device,
        tflops=device.tflops if tflops is None else tflops,
        gib=device.gib if gib is None else gib,
        gb_per_s=device.gb_per_s if gb_per_s is None else gb_per_s,
    )
