"""`pruneval data`: which benchmarks' data are on this machine, whether they are complete, and fetching them."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pruneval.harness import data
from pruneval.harness.errors import UserError
from pruneval.tasks import Benchmark, benchmark, benchmarks, suite, suites

HELP = "the folder of all data (default: PRUNEVAL_DATA or ~/.cache/pruneval)"


def add_root(parser: argparse.ArgumentParser) -> None:
    """The option that says where data are."""
    parser.add_argument("--data-root", type=Path, metavar="DIR", help=HELP)


def use_root(args: argparse.Namespace) -> None:
    """Let everything below look there. Raises: UserError."""
    if args.data_root is None:
        return
    if args.data_root.exists() and not args.data_root.is_dir():
        raise UserError(f"--data-root {args.data_root} is not a folder")
    os.environ["PRUNEVAL_DATA"] = str(args.data_root.absolute())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("action", choices=("list", "check", "fetch"), help="check and fetch take names")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks or suites (check: all that are here)")
    parser.add_argument("--json", action="store_true", help="list: for programs")
    add_root(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 when something is incomplete."""
    use_root(args)
    rows = _chosen(args.names)
    if args.action == "list":
        return _list(rows, args.json)
    if args.action == "check":
        return _check(rows if args.names else [row for row in rows if row.edition == "pocket" or data.locate(row)])
    if not args.names:
        raise UserError("data fetch needs the names of benchmarks or suites, as `pruneval data fetch core5`")
    for row in {row.dataset: row for row in rows if row.edition == "full"}.values():
        fetch(row)
    return _check(rows)


def fetch(row: Benchmark) -> Path:
    """Download a benchmark's data set to the data root, videos unpacked. Raises: UserError."""
    if not row.hub:
        data.require(row)
        return data.root() / row.dataset
    from huggingface_hub import constants, get_session, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    folder = data.root() / row.dataset
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    if not reason:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
            folder.mkdir(parents=True, exist_ok=True)
            snapshot_download(row.dataset, repo_type="dataset", revision=row.revision or None, local_dir=folder)
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        except Exception as error:  # whatever the hub's library raises where there is no network
            reason = type(error).__name__
    if reason:
        raise UserError(
            f"{row.dataset!r} could not be fetched ({reason}); where there is a network run `hf download --repo-type "
            f"dataset {row.dataset} --local-dir DIR/{row.dataset}` and point --data-root at DIR"
        )
    if row.videos:
        _unpack(folder)
    return folder


def _unpack(folder: Path) -> None:
    """Unpack every archive once, beside itself."""
    import zipfile

    from pruneval.harness.progress import progress

    for archive in sorted(folder.rglob("*.zip")):
        done = archive.with_suffix(".unpacked")
        if done.exists():
            continue
        progress().say(f"unpacking {archive.name}")
        with zipfile.ZipFile(archive) as file:
            file.extractall(archive.parent)
        done.touch()


def state(row: Benchmark) -> dict[str, Any]:
    """What is known about a benchmark's data without opening them."""
    found = data.locate(row) if row.edition == "full" else None
    return {
        "name": row.name,
        "dataset": row.dataset,
        "edition": row.edition,
        "here": row.edition == "pocket" or found is not None,
        "revision": data.revision(row) if row.edition == "pocket" or found else "",
        "folder": str(found or ""),
        "questions": row.n,
        "judge": row.judge,
    }


def _chosen(names: list[str]) -> list[Benchmark]:
    if not names:
        return list(benchmarks().values())
    known = [member for name in names for member in (suite(name) if name in suites() else (name,))]
    return [benchmark(name) for name in dict.fromkeys(known)]


def _list(rows: list[Benchmark], as_json: bool) -> int:
    states = [state(row) for row in rows]
    if as_json:
        print(json.dumps(states, indent=1))
        return 0
    width = max(len(one["name"]) for one in states)
    for one in states:
        where = "drawn when used" if one["edition"] == "pocket" else one["folder"] or "not here"
        print(f"{one['name']:<{width}}  {one['questions']:>7} questions  {one['dataset']}: {where}")
    return 0


def _check(rows: list[Benchmark]) -> int:
    from pruneval.harness.data_check import demand
    from pruneval.tasks.pocket import editions

    bad = 0
    for row in rows:
        try:
            if row.edition == "pocket":
                editions.ensure(row.dataset)
            else:
                demand(row)
        except UserError as error:
            bad += 1
            print(error)
            continue
        print(f"{row.name}: complete, {row.n} questions, revision {data.revision(row)}")
    return 1 if bad else 0
