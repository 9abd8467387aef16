"""Kills runs that write to a store, and cuts their connections: is anything half-visible, and do they go on?

    python benchmarks/store_kills.py [100]

diff and apply run in turn, from and to an S3 on loopback. Each is killed at a random moment, or every
connection is cut from then on for a while, or all credentials are refused; then it runs again to its end.
After each kill, whatever is visible must be whole: each file has the right bytes, and there is no manifest
unless all that it names is there. In the end the result must be the right one, without an unfinished upload
or a note.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pairs
from children import MIB, Command, deltaweights, finish

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.s3_server import S3Server

Files = dict[str, str]
Harm = Callable[[subprocess.Popen[bytes], S3Server], None]


def digests(s3: S3Server, place: str) -> Files:
    """An id of the content of each file at a place: parts are of the same length in every run."""
    paths = s3.system.find(place)
    return {path.removeprefix(f"{place}/"): s3.system.info(path)["ETag"] for path in paths}


def is_note(path: str) -> bool:
    return path.startswith(".deltaweights/") and not path.startswith(".deltaweights/licenses/")


def kill(process: subprocess.Popen[bytes], s3: S3Server) -> None:
    process.kill()


def cut(process: subprocess.Popen[bytes], s3: S3Server) -> None:
    """The store is gone for two seconds: the run waits for it."""
    s3.fail("", times=None, drop=True)
    time.sleep(2)
    s3.heal()


def refuse(process: subprocess.Popen[bytes], s3: S3Server) -> None:
    """Credentials expire: the run ends with an error."""
    s3.fail("", times=None, status=403)
    process.wait(120)
    s3.heal()


def strike(s3: S3Server, command: Command, place: str, right: Files, wait: float, harm: Harm) -> list[str]:
    """Harm a run after a while, then let another one finish. Returns what is wrong."""
    wrong = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            harm(process, s3)
        process.wait(300)
    seen = {path: tag for path, tag in digests(s3, place).items() if not is_note(path)}
    if not seen.items() <= right.items():
        half = sorted(path for path in seen if seen[path] != right.get(path))
        wrong.append(f"{harm.__name__}: half-visible: {half}")
    if "deltaweights.json" in seen and seen != right:
        wrong.append(f"{harm.__name__}: a manifest without its files")
    if process.returncode and seen != right:  # else it was done, or went on by itself
        again = subprocess.run(command, capture_output=True, check=False)
        if again.returncode:
            wrong.append(f"{harm.__name__}: it does not go on: {again.stderr.decode()[-300:]}")
    if digests(s3, place) != right:
        wrong.append(f"{harm.__name__}: the result is another one")
    if s3.system.list_multipart_uploads("bucket"):
        wrong.append(f"{harm.__name__}: unfinished uploads are left")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=100)
    parser.add_argument("--mib", type=int, default=48, help="size of the target")
    parser.add_argument("--work", type=Path, help="a folder for temporary files")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    nbytes = options.mib * MIB
    choice = np.random.default_rng(0)
    with pairs.work_folder(options.work, 6 * nbytes) as work, S3Server() as s3:
        os.environ |= s3.env
        s3.empty()
        pair = pairs.Pair(work)
        pairs.make_in_child(pair, nbytes, shards=4)
        for side in (pair.base, pair.target):
            s3.system.put(str(side), f"bucket/{side.name}", recursive=True)
        base, target = f"s3://bucket/{pair.base.name}", f"s3://bucket/{pair.target.name}"

        def command(verb: str, place: str) -> Command:
            at = f"s3://bucket/{place}"
            if verb == "diff":
                return deltaweights("diff", base, target, "-o", at, "-q")
            return deltaweights("apply", "s3://bucket/delta", "--base", base, "-o", at, "-q")

        right, seconds = {}, {}
        for verb, place in (("diff", "delta"), ("apply", "model")):
            begin = time.monotonic()
            subprocess.run(command(verb, place), check=True)
            seconds[verb] = time.monotonic() - begin
            right[verb] = digests(s3, f"bucket/{place}")
        wrong, harms = [], (kill, kill, cut, refuse)
        for turn in range(options.kills):
            verb, place = ("diff", "apply")[turn % 2], f"turn-{turn}"
            harm, wait = random.Random(turn).choice(harms), choice.uniform(0.3, 1) * seconds[verb]
            found = strike(s3, command(verb, place), f"bucket/{place}", right[verb], wait, harm)
            wrong += found
            s3.system.rm(f"bucket/{place}", recursive=True)
            s3.log.clear()
            print(
                f"{turn + 1}: {verb}, {harm.__name__} after {wait:.1f} s: {'; '.join(found) or 'right'}",
                flush=True,
            )
    finish(wrong)


if __name__ == "__main__":
    main()
