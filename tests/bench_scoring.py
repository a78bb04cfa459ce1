"""Time and peak memory of scoring visual tokens: the needed rows against `output_attentions=True`, side by side.

    python tests/bench_scoring.py [--tokens 4096 8192 16384] [--repeats 3]

Both sides run the same narrow random LLaVA decoder (2 layers, 2 heads of 32) on one prompt of that many visual tokens
and rank them by the last prompt token's attention in layer 1 (FastV, K = 2). The old way needs eager attention, which
materialises heads x n x n maps; ours runs on SDPA and computes one row. Each measurement is a process of its own, so
that the peak resident memory is its own; the memory of the process before the forward pass is subtracted. Medians over
interleaved repeats (A B A B).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEXT = 64


def model_of(tokens: int, kernel: str) -> Any:
    import torch
    import transformers as hf

    torch.manual_seed(0)
    torch.set_num_threads(2)
    side = 14 * 2
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=side,
            patch_size=14, projection_dim=16,
        ),
        text_config=hf.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=tokens + TEXT + 8, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=63,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(kernel)
    return model


def run(way: str, tokens: int) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    from pruneval import methods
    from pruneval.harness.session import pruned

    model = model_of(tokens, "eager" if way == "maps" else "sdpa")
    ids = torch.full((1, tokens + TEXT), 63)
    ids[0, :8], ids[0, tokens + 8 :] = 5, 7
    features = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    encoded = {"image": type("Encoded", (), {"pooler_output": [features]})()}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}
    with torch.inference_mode():
        model(input_ids=ids[:, :4], use_cache=False)  # first-call costs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        if way == "plain":
            model(**inputs, mm_encoder_outputs=encoded)
        elif way == "maps":
            maps = model(**inputs, mm_encoder_outputs=encoded, output_attentions=True).attentions
            maps[1][0, :, -1].mean(0)[8 : tokens + 8].topk(tokens // 2)
        else:
            # the boundary is the last layer, so that both sides run both layers on every token
            with pruned(model, methods.build("fastv", {"layer": 1, "keep": 0.9999})):
                model(**inputs, mm_encoder_outputs=encoded)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "mib": peak / 1024}


def measure(way: str, tokens: int) -> dict[str, float]:
    """One measurement, in a fresh process."""
    argv = [sys.executable, __file__, "--one", way, "--tokens", str(tokens)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} at {tokens} tokens ended with {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the numbers and the machine's description, as JSON")
    parser.add_argument("--one", choices=("plain", "maps", "rows"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one, args.tokens[0])))
        return
    ways = {"plain": "SDPA, no scores", "rows": "SDPA, needed rows (pruneval)", "maps": "eager, output_attentions"}
    print(f"{'visual tokens':>13}  {'':30}  {'seconds (min-max)':>22}  {'peak MiB':>9}  {'against rows':>22}")
    document = {"what": "time and peak memory of scoring visual tokens, medians of interleaved repeats", "sizes": []}
    for tokens in args.tokens:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way in ways:
                found[way].append(measure(way, tokens))
        median = {
            way: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for way, runs in found.items()
        }
        document["sizes"].append({"visual_tokens": tokens, "runs": found, "median": median})
        for way, title in ways.items():
            seconds = [one["seconds"] for one in found[way]]
            spread = f"{median[way]['seconds']:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
            ratio = ""
            if way != "rows":
                ratio = (
                    f"{median[way]['seconds'] / median['rows']['seconds']:.2f} x time, "
                    f"{median[way]['mib'] / median['rows']['mib']:.2f} x memory"
                )
            print(f"{tokens:>13}  {title:30}  {spread:>22}  {median[way]['mib']:>9.0f}  {ratio:>22}", flush=True)
    if args.out:
        write(args.out, document)


def write(path: Path, document: dict[str, Any]) -> None:
    """The numbers with the machine they are from."""
    import torch

    from pruneval.harness.machine import machine
    from pruneval.harness.records import write_atomically

    document["machine"] = machine(torch.device("cpu"))
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    print(f"written to {path}")


if __name__ == "__main__":
    main()
