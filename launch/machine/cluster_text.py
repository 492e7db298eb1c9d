"""Writes what was measured on this machine as a cluster file (docs/design/clusters.md)."""

import datetime
from collections.abc import Sequence
from typing import Any

import yaml

from bagualu.launch.machine.disk import DiskFigures
from bagualu.launch.machine.figures import RankFigures
from bagualu.launch.machine.fit_links import Links, fit

_HEADER = """\
# This machine, measured by `bagualu doctor` on {day}: {name}.
# It writes this file anew, so change nothing here; copy it under another name to keep it.
"""


def cluster_text(measured: Sequence[RankFigures], disk: DiskFigures | None, quick: bool = False) -> str:
    """Returns the YAML of a cluster with the figures `measured`, one for each number of ranks. `quick`: whether few sizes of
    everything were measured."""
    first = measured[0]
    header = _HEADER.format(day=datetime.date.today().isoformat(), name=first.name)
    values = {**({"quick": True} if quick else {}), **cluster_values(measured, disk)}
    return header + yaml.safe_dump(values, sort_keys=False, width=130, default_flow_style=None)


def cluster_values(measured: Sequence[RankFigures], disk: DiskFigures | None) -> dict[str, Any]:
    """Returns the content of the file. Ranks that share a CPU have figures for each number of ranks; those with a GPU each have
    the same whatever their number."""
    if len(measured) == 1 and measured[0].device != "cpu" and measured[0].ranks > 1:
        (one,) = measured
        return {**_of_ranks(one), "devices": one.ranks, **_storage(disk, one.ranks)}
    return {"ranks": {one.ranks: {**_of_ranks(one), **_storage(disk, one.ranks)} for one in measured}}


def _of_ranks(one: RankFigures) -> dict[str, Any]:
    links = fit(one.links) if one.links else None
    return {"chip": _chip(one), **(_tiers(links) if links else {})}


def _chip(one: RankFigures) -> dict[str, Any]:
    peaks = one.peaks()
    efficiency: dict[str, list[dict[str, Any]]] = {}
    for row in one.products:
        fraction = round(row.flops_per_second / peaks[row.dtype], 4)
        efficiency.setdefault(row.dtype, []).append({"m": row.m, "n": row.n, "k": row.k, "fraction": max(1e-4, fraction)})
    operators: dict[str, list[dict[str, Any]]] = {}
    for sample in one.operators:
        row_of = {"dtype": sample.dtype, "work": max(1.0, _short(sample.work)), "seconds": _short(sample.seconds)}
        operators.setdefault(sample.name, []).append(row_of)
    threads = f", {one.threads} thread{'s' * (one.threads > 1)}" if one.device == "cpu" else ""
    return {
        "name": f"{one.name}{threads}",
        "vendor": one.name.split()[0],
        "type": "cpu" if one.device == "cpu" else "cuda",
        "matmul_flops_per_second": {dtype: _short(rate) for dtype, rate in peaks.items()},
        "memory_bytes": one.memory_bytes,
        "memory_bytes_per_second": _short(one.copy_bytes_per_second),
        **({"cores": one.cores} if one.cores else {}),
        "launch_seconds": max(1e-9, _short(one.launch_seconds)),
        "context_bytes": max(1, one.context_bytes),
        "efficiency": efficiency,
        **({"operators": operators} if operators else {}),
    }


def _tiers(links: Links) -> dict[str, Any]:
    tier = {
        "latency_seconds": _short(links.latency_seconds),
        "bytes_per_second": _short(links.bytes_per_second),
        "relative": {kind: _short(factor) for kind, factor in links.relative.items()},
    }
    return {"tiers": {"machine": tier}, "start_seconds": _short(links.start_seconds)}


def _storage(disk: DiskFigures | None, ranks: int) -> dict[str, Any]:
    """Returns the share of each of `ranks` ranks in the disk."""
    if disk is None:
        return {}
    read, written = disk.read_bytes_per_second, disk.write_bytes_per_second
    return {
        "storage": {
            "read_bytes_per_second": _short(read / ranks),
            "write_bytes_per_second": _short(written / ranks),
            "device_bytes_per_second": _short(max(read, written)),
        }
    }


def _short(value: float) -> float:
    """Returns the number with 4 digits, which is more than was measured."""
    return float(f"{value:.4g}")
