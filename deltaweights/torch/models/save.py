"""Saves live weights as a delta, as if they had been saved to a folder first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from ...codec import Effort
from ...diff import make_delta
from ...manifest import Manifest
from ...match.names import RenameRule
from ...payload import CHUNK_BYTES
from ...storage import Location, Readable, open_source
from ...workers import ProgressCallback
from .layout import lay_out
from .memory import MemorySource


def save_delta(
    state: nn.Module | Mapping[str, Tensor],
    base: Readable,
    out: Location,
    *,
    files: Readable | None = None,
    max_shard_size: int | str | None = None,
    rename: Sequence[RenameRule] = (),
    base_repo: str | None = None,
    base_revision: str | None = None,
    base_license: str | None = None,
    target_repo: str | None = None,
    target_license: str | None = None,
    exclude: Sequence[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
    effort: Effort = "default",
    force: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Manifest:
    """Write a delta from ``base`` to a model in memory to the folder ``out``, without writing the target.

    The delta equals, byte for byte, the one that ``make_delta`` makes from the saved folder. A transformers
    model (version 5) counts as saved by ``save_pretrained``, with config and generation config; any other
    model or state dict as saved by huggingface_hub's ``save_torch_state_dict``. (The latter notes several
    tied names in a file's metadata in no fixed order; here they are sorted.)

    Args:
        state: the model, or its tensors by name, on any device; it must not change until this returns.
            Devices other than the CPU are copied chunk by chunk. Tensors that are not contiguous are copied
            as a whole.
        base: a folder, one .safetensors file, a Hub id or a URL.
        out: the folder to write; new or empty.
        files: a folder or Hub id whose other files (tokenizer, license, model card, custom code) belong to
            the target too: all but .safetensors files and their index. A config made from the model counts
            more.
        max_shard_size: bytes, or a text like ``"5GB"``; None: the default of the library above.
        rename, base_repo, base_revision, base_license, target_repo, target_license, exclude, chunk_bytes,
            effort, force, threads, progress: as for :func:`deltaweights.make_delta`.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: the base cannot be read, or a tensor cannot be saved.
        OutputError: the folder cannot be used, or its disk is full.
    """
    layout = lay_out(state, max_shard_size)
    with ExitStack() as opened:
        others = None if files is None else opened.enter_context(open_source(files))
        source = MemorySource(layout.shards, layout.files, others)
        return make_delta(
            base,
            source,
            out,
            rename=rename,
            base_repo=base_repo,
            base_revision=base_revision,
            base_license=base_license,
            target_repo=target_repo,
            target_license=target_license,
            exclude=exclude,
            chunk_bytes=chunk_bytes,
            effort=effort,
            force=force,
            threads=threads,
            progress=progress,
        )
