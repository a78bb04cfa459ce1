"""Measured speed as a table: medians with quartiles, and ratios with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = (
    "method", "visual tokens per layer", "FLOPs ratio (implied)", "prefill ms", "prefill speed-up", "decode ms/token",
    "decode speed-up", "end to end ms", "end to end speed-up", "vision + selection + decoder ms", "KV cache MB (true)",
    "full heads MB", "peak MB",
)  # fmt: skip


def to_markdown(document: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """One contest.

    Args:
        document: what `pruneval bench` writes.
        setting: one of its settings.
    """
    machine, protocol = document["machine"], document["protocol"]
    budget = "at the methods' defaults" if setting["keep"] is None else f"every method's knob at {setting['keep']:g}"
    size = f"{setting['visual']} visual + {setting['text']} text tokens, batch {setting['batch']}"
    how = f"{setting['new_tokens']} new tokens, {setting['kernel']}, {document['dtype']}, on {where(machine)}"
    lines = [
        f"## {document['model']} ({document['weights']} weights), {budget}",
        "",
        f"{size}, {how}; {protocol['rounds']} rounds, interleaved",
    ]
    if other := busy(machine):
        lines.append(f"**{other[0].upper()}{other[1:]}. Not for quoting.**")
    if setting["contestants"]:
        table = [HEAD, ("---",) * len(HEAD), *(_row(row, setting) for row in setting["contestants"])]
        lines += ["", *("| " + " | ".join(cells) + " |" for cells in table), "", _legend(setting)]
    lines += [f"- left out: {row['method']}: {row['reason']}" for row in setting["left_out"]]
    return "\n".join(lines) + "\n"


def where(machine: Mapping[str, Any]) -> str:
    """What the numbers were measured on."""
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"


def busy(machine: Mapping[str, Any]) -> str:
    """That the machine had more to do than the measurement; empty when it had not."""
    most = max(machine["load_before"], machine["load_after"])
    return f"the machine had other work: load {most:g} on {machine['cpus']} cores" * (
        most > (machine["cpus"] or 1) + 0.5
    )


def _row(row: Mapping[str, Any], setting: Mapping[str, Any]) -> tuple[str, ...]:
    against = row["against"].get("vanilla", {})
    implied, parts, cache = row["implied"], row["parts"], row["kv_cache"]["prefill"]
    peak = row["memory"]["allocated"] or row["memory"]["process"]
    return (
        row["name"],
        f"{implied['avg_in']:.0f} of {setting['visual']} ({100 * implied['keep']:.1f}%)",
        f"{against['flops_ratio']:.2f}x" if against else "",
        _spread(row["prefill"]),
        _speedup(against.get("prefill")),
        _spread(row["decode"]),
        _speedup(against.get("decode")),
        _spread(row["generate"]),
        _speedup(against.get("generate")),
        " + ".join(f"{1000 * parts[name]:.1f}" for name in ("vision", "selection", "decoder")),
        f"{sum(cache['true']) / 1e6:.1f}" + ("" if cache["true"] == cache["formula"] else " (formula differs)"),
        f"{cache['full_heads'] / 1e6:.1f}",
        f"{peak:.0f}",
    )


def _spread(seconds: Mapping[str, float]) -> str:
    return f"{1000 * seconds['median']:.1f} ({1000 * seconds['low']:.1f}–{1000 * seconds['high']:.1f})"


def _speedup(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    return f"{found['ratio']:.2f}x [{found['low']:.2f}, {found['high']:.2f}], {found['verdict']}"


def _legend(setting: Mapping[str, Any]) -> str:
    kernels = ", ".join(
        f"{name} {1000 * took:.0f} ms" if isinstance(took, float) else f"{name} {took}"
        for name, took in setting["kernels"].items()
    )
    peak = "allocated on the GPU" if setting["contestants"][0]["memory"]["allocated"] else "resident in the process"
    lines = [
        f"Vanilla's prefill by kernel: {kernels}. Speed-ups are against vanilla on {setting['kernel']}.",
        f"Peak MB is {peak}, weights included. Split times come from rounds of their own, with hooks that cost time.",
    ]
    energies = {row["name"]: row["energy"] for row in setting["contestants"] if "energy" in row}
    reasons = {found["reason"] for found in energies.values() if not found["available"]}
    lines += [f"Energy is not available: {reason}." for reason in sorted(reasons)]
    lines += [
        f"Energy per generation, {name}: {found['watt_hours']:.4f} Wh ({found['what']})."
        for name, found in energies.items()
        if found["available"]
    ]
    return "\n".join(lines)
