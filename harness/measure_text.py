"""What `pruneval measure` prints, for a reader."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

from pruneval.harness import published
from pruneval.harness.declared import TOWER_WHOLE


def to_text(found: Mapping[str, Any]) -> str:
    """An implied cost, as `measure.implied` gives it, for a reader."""
    share = found["tflops"] / found["unpruned_tflops"]
    most = "at most " if any(line.startswith(TOWER_WHOLE) for line in found["not_counted"]) else ""
    lines = [
        f"{found['signature']} on {found['model']}: {found['visual']} visual + {found['text']} other tokens",
        f"  prefill         {found['tflops']:.4g} TFLOPs ({found['tmacs']:.4g} TMACs), {share:.1%} of the un-pruned",
        f"  convention      {found['convention']}: {found['convention_title']}",
    ]
    if found["new_tokens"] > 1:
        lines.append(
            f"  decode          {found['decode_tflops']:.4g} TFLOPs, {found['new_tokens'] - 1} tokens after the first"
        )
    if found["helpers"]:
        lines.append(
            f"  helper          {found['helper_tflops']:.4g} TFLOPs; {found['tflops_with_helpers']:.4g} in all "
            f"({', '.join(found['helpers'])})"
        )
    lines += [
        _wrapped("vision tower", f"{most}{_runs([_groups(groups) for groups in found['tower']])}"),
        _wrapped("visual tokens", _runs([str(count) for count in found["per_layer"]])),
        f"                  {found['avg_in']:.1f} per layer ({found['keep']:.1%}), {found['kept_after']} at the end",
        f"  KV cache        {found['kv_bytes'] / 1e6:.1f} MB at 16 bit, ratio of visual tokens {found['kv_ratio']:.3f}",
        f"                  {found['kv_bytes_full_heads'] / 1e6:.1f} MB if every head had keys and values of its own",
        f"                  {found['kv_bytes_end'] / 1e6:.1f} MB after the last of {found['new_tokens']} new tokens",
        f"  parameters      {found['params_b']:.2f} B ({', '.join(found['params_parts'])})",
        "  not counted     " + "\n                  ".join(found["not_counted"]),
        f"  lengths from    {found['lengths_from']}",
    ]
    return "\n".join(lines)


def _wrapped(title: str, text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=f"  {title:<15} ", subsequent_indent=" " * 18)


def _groups(groups: list[list[int]]) -> str:
    """5 tiles of 577 tokens as "5 x 577"; windows of different sizes as their sum."""
    (many, size), *more = groups
    return str(sum(k * n for k, n in groups)) if more else f"{many} x {size}" if many > 1 else str(size)


def _runs(counts: list[str]) -> str:
    """What enters each layer, equal neighbours together: "576 in layers 0-1, 192 in 2-31"."""
    runs, first = [], 0
    for count, same in itertools.groupby(counts):
        last = first + len(list(same)) - 1
        runs.append((count, f"{first}-{last}" if last > first else f"{first}"))
        first = last + 1
    (count, where), *more = runs
    return ", ".join([f"{count} in layers {where}", *(f"{count} in {where}" for count, where in more)])


def to_markdown(table: str, rows: list[published.Row]) -> str:
    """One Markdown table per metric; the header of each column of ours names its convention."""
    parts = [f"# {table}: published / implied here / difference"]
    for metric in dict.fromkeys(row.metric for row in rows):
        group = [row for row in rows if row.metric == metric]
        conventions = list(dict.fromkeys(row.convention for row in group))
        head = ["model", "method", f"published {metric}"]
        for one in conventions:
            head += [f"implied here ({one})", f"difference ({one})"]
        lines = [head + ["note"], ["---"] * (len(head) + 1)]
        for first in dict.fromkeys((row.model, row.method, row.setting) for row in group):
            found = {row.convention: row for row in group if (row.model, row.method, row.setting) == first}
            any_row = next(iter(found.values()))
            line = [any_row.model, f"{any_row.method} {any_row.setting}".strip(), f"{any_row.published:g}"]
            for one in conventions:
                line += [found[one].shown, f"{found[one].difference:+.2f} %"] if one in found else ["", ""]
            lines.append([*line, any_row.note])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)
