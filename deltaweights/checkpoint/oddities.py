"""What is odd about a checkpoint that can be read nevertheless: said before it is published."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from ..dtypes import DTYPES
from ..manifest import MANIFEST_NAME
from ..storage import Source
from .checkpoint import Checkpoint

#: Where each oddity is told, at WARNING.
log = logging.getLogger("deltaweights.inputs")

_POINTER = b"version https://git-lfs"
_MAX_POINTER_BYTES = 1024

_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

#: Names of files for secrets. What tokenizers come with (``added_tokens.json``) has no such name.
_SECRET = re.compile(
    r"\.env(\..*)?|.*\.(pem|p12|pfx|jks|keystore|kdbx|ppk|key)|id_(rsa|dsa|ecdsa|ed25519)|\.netrc|\.npmrc|\.pypirc"
    r"|\.git-credentials|\.?htpasswd|(.*[._-])?credentials?([._-].*)?|service[._-]?account.*\.json|kubeconfig"
    r"|(.*[._-])?(secrets?|passwords?|passwd|api[._-]?keys?)(\.[a-z]+)?"
    r"|\.?(((hf|hub|hugging_?face|api|access|auth|github|gh|gitlab|wandb|refresh|secret|bearer|my|user)[._-]?)?"
    r"token|stored[._-]?tokens)(\.(txt|json|ya?ml|cfg|ini|key))?",
    re.IGNORECASE,
)


def is_pointer(source: Source, path: str) -> bool:
    """Whether the file at ``path`` is what Git LFS puts in a file's place until it is pulled. (The Hub serves
    the files themselves.)"""
    if source.is_remote or not len(_POINTER) <= source.sizes[path] < _MAX_POINTER_BYTES:
        return False
    return b"".join(source.blocks(path)).startswith(_POINTER)


def is_secret(path: str) -> bool:
    """Whether a file has a name that is usual for secrets."""
    return _SECRET.fullmatch(path.rpartition("/")[2]) is not None


def is_excluded(path: str, pattern: str) -> bool:
    """Whether a pattern (``*``, ``?``, ``[…]``) fits a relative path, the file's name, or a folder on the
    way."""
    parts = path.split("/")
    places = {"/".join(parts[: k + 1]) for k in range(len(parts))}
    return any(fnmatchcase(place, pattern.rstrip("/")) for place in places.union(parts))


def tell(oddities: Iterable[str]) -> None:
    """Log each one."""
    for text in oddities:
        log.warning("%s", text)


def oddities_of_target(target: Checkpoint) -> Iterator[str]:
    """What nobody wants to publish, though it can be."""
    source = target.source
    for path in target.other_files:
        if is_pointer(source, path):
            yield (
                f"The target's {path} is a Git LFS pointer, not the file itself, and is published as it is. "
                "Run `git lfs pull` in the target's folder, and diff again."
            )
    for path in source.sizes:
        if is_secret(path):
            yield f"The target's {path} has a name that is usual for secrets. Exclude it if it is one."
    strange = {tensor.dtype: tensor for tensor in reversed(target.tensors) if tensor.dtype not in DTYPES}
    for dtype, tensor in strange.items():
        yield (
            f"The target's tensor {tensor.name!r} has the dtype {dtype!r}, which the safetensors library "
            f"does not know: it refuses {tensor.path} as a whole."
        )
    yield from _missing_shards("target", target)


def oddities_of_base(base: Checkpoint, pointers: Collection[str]) -> Iterator[str]:
    """What makes a delta larger than need be. ``pointers`` are those of Git LFS, which were left out."""
    for path in pointers:
        yield f"The base's {path} is a Git LFS pointer, not the file itself: it counts as absent."
    for error in base.broken.values():
        yield f"{error.what}: it counts as absent from the base."
    yield from _missing_shards("base", base)


def oddities_of_unrelated(target: Checkpoint) -> Iterator[str]:
    """What to say of a target of which no tensor is compared with any of the base."""
    names = {path.rpartition("/")[2] for path in target.shards}
    if MANIFEST_NAME in target.source.sizes:
        cause = "The target is a delta itself: apply it first, and pass the result."
    elif names and all(name.startswith("adapter_model") for name in names):
        cause = "The target is a PEFT adapter, not a whole model: merge it into the base first."
    else:
        cause = "Is the base the right one, and has the target the usual names?"
    yield f"No tensor of the target was found in the base: the delta becomes about as large as it. {cause}"


def _missing_shards(side: str, checkpoint: Checkpoint) -> Iterator[str]:
    there = checkpoint.source.sizes
    told = set[str]()
    for path, shards in checkpoint.indexes.items():
        lost: dict[str, int] = defaultdict(int)
        for name, shard in shards.items():
            if shard not in there:
                lost[shard] += not checkpoint.named(name)
        for shard, count in lost.items():
            told.add(shard)
            end = f": {count} tensors are missing" if count else ", though its tensors are in other files"
            yield f"The {side}'s {path} names {shard}, which is not there{end}."
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for path in checkpoint.shards:
        if match := _NUMBERED.fullmatch(path):
            found[match["stem"], int(match["count"])].add(int(match["number"]))
    for (stem, count), numbers in found.items():
        first = next((n for n in range(1, count + 1) if n not in numbers), 0)
        path = f"{stem}-{first:05d}-of-{count:05d}.safetensors"
        if first and path not in told | checkpoint.broken.keys():
            yield f"The {side} lacks {path}: {len(numbers)} of {count} shards are there."
