"""The command that tells where a model comes from, and its lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..words import counted, listed, plain, size
from .layout import Screen, screen_of, table
from .options import Debug, Json, Quiet, Verbose
from .rendering import elapsed
from .session import working
from .usage import UsageError

if TYPE_CHECKING:
    from ..compare import ComparedCandidate, Comparison
    from ..lineage.pairs import Agreement

#: Most fields of configs, and most layers, that are named.
_MOST_FIELDS, _MOST_LAYERS = 6, 8

#: Layers whose agreement is so much below the mean are worth a word.
_FAR_BELOW = 0.1


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model in question.")],
    candidates: Annotated[
        list[str] | None, typer.Argument(metavar="[CANDIDATE]...", help="Models that it may come from.")
    ] = None,
    suggest_base: Annotated[
        bool,
        typer.Option(
            "--suggest-base", help="Also compare with the models that MODEL's card and config name."
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Tell which CANDIDATE a model is a fine-tune of, if any, by a sample of the weights.

    deltaweights compare ./model org/base org/other
    deltaweights compare org/model --suggest-base
    """
    if not candidates and not suggest_base:
        raise UsageError("Missing argument 'CANDIDATE' (or --suggest-base).")
    with working(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug) as work:
        from ..compare import compare_models

        with work.progress() as shown:
            found = compare_models(model, candidates or (), suggest_base=suggest_base, progress=shown)
    lines = comparison_lines(found, work.seconds, screen_of(sys.stdout))
    work.report(found.to_dict(), lines, with_costs=True)


def comparison_lines(found: Comparison, seconds: float, screen: Screen) -> Iterator[str]:
    """A table of the candidates, the closest first, and what there is to say of each."""
    headings = ("candidate", "verdict", "cosine", "equal", "exponents", "bits", "distance")
    rows = [_row(one) for one in found.candidates]
    yield from table(headings, rows, screen, right=headings[2:], names=headings[:1])
    for one in found.candidates:
        yield ""
        yield plain(f"{one.name}: {one.verdict}")
        yield from (plain(f"- {text}") for text in (*one.reasons, *_remarks(one)))
    for lost in found.unavailable:
        yield ""
        yield plain(f"{lost.name}: cannot be read")
        yield plain(f"- {lost.why}")
    yield ""
    models = counted(len(found.candidates), "candidate")
    sampled = f"{size(found.sampled_bytes)} of {size(found.model_bytes)}"
    yield plain(f"Compared {sampled} with {models} in {elapsed(seconds)}")


def _row(one: ComparedCandidate) -> tuple[str, ...]:
    measures = one.measures
    verdict = one.verdict if one.weight is None else f"{one.verdict}, {one.weight:.0%}"
    if measures is None:
        return plain(one.name), verdict, "", "", "", "", ""
    half = (measures.cosine_high - measures.cosine_low) / 2
    bits = measures.bits_per_weight
    return (
        plain(one.name),
        verdict,
        f"{measures.cosine:.3f} ±{half:.3f}",
        f"{measures.equal:.1%}",
        f"{measures.exponents:.1%}",
        "" if bits is None else f"{bits:.2f} of {measures.bits_alone:.2f}",
        f"{measures.distance:.2%}",
    )


def _remarks(one: ComparedCandidate) -> Iterator[str]:
    """What is worth a word beside the reasons."""
    if one.measures and one.is_related is not False:
        if low := _low(one.layers, one.measures.cosine):
            yield f"Least alike: {low}."
        yield f"{one.measures.coverage:.0%} of the model's matrices have a counterpart."
    for tensor in one.resized[:1]:
        yield f"{tensor.name} has {tensor.rows:,} rows; the candidate's, {tensor.candidate_rows:,}."
    if one.tokenizer != "absent":
        yield f"The tokenizers are {'the same' if one.tokenizer == 'same' else 'different'}."
    if one.config:
        fields = [f"{it.field} ({it.model or 'none'}, not {it.candidate or 'none'})" for it in one.config]
        yield f"The configs differ in {listed(fields, _MOST_FIELDS)}."


def _low(layers: Sequence[Agreement], mean: float) -> str:
    """The layers that agree far less than the others."""
    few = [layer for layer in layers if layer.cosine < mean - _FAR_BELOW]
    few.sort(key=lambda layer: layer.cosine)
    names = [f"{f'layer {one.name}' if one.name else 'outside of layers'} ({one.cosine:.3f})" for one in few]
    return listed(names, _MOST_LAYERS) if names else ""
