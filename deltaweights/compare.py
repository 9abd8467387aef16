"""Which of several models another one descends from, by a sample of their weights.

Headers are read, then ranges: about 1% of the bytes of models, at most some 30 MB of each, and about a
megabyte of small ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from .checkpoint import Checkpoint
from .errors import CheckpointError, DeltaWeightsError
from .lineage.choosing import SampledTensor, choose
from .lineage.documents import (
    Difference,
    Documents,
    TokenizerMatch,
    compare_tokenizers,
    config_differences,
    read_documents,
)
from .lineage.geometry import Geometry
from .lineage.measures import SampledProducts, TensorMeasures, measure, products_of
from .lineage.pairs import Agreement, PairMeasures, by_kind, by_layer, summarize_pair
from .lineage.sampling import Candidate, counterparts_of, read_samples, without_pruned
from .lineage.structure import ResizedTensor, compare_structures
from .lineage.verdicts import Basis, Evidence, Judgement, Verdict, judge
from .manifest import MANIFEST_NAME
from .match.names import Glance, glance_at_matches
from .metrics import timed_operation
from .storage import Readable, is_clutter, open_source
from .workers import ProgressCallback

_log = logging.getLogger(__name__)

#: Most candidates: each takes memory and connections of its own.
MOST_CANDIDATES = 32

#: What the search for parts of fused tensors may cost, in small reads, for each byte of the model, and at
#: least.
_COST_PER_BYTE, _LEAST_COST = 2e-6, 4000


@dataclass(frozen=True, slots=True)
class ComparedCandidate:
    """What a model is to a candidate, and what tells so.

    Attributes:
        name: the candidate as it was given.
        repo_id, revision: on the Hub, its repository and commit; else None.
        verdict: "fine-tune": the model was made from the candidate. "sibling": both were made from a model
            that is neither, as far as can be told. "merge": the model is a combination of this candidate and
            others. "unrelated": their weights have nothing in common. "cannot tell": none of these is
            beyond doubt.
        is_related: whether their weights are of one origin, whatever the verdict; None if that is not known.
        basis: what decided between the verdicts for related models: the "weights" of the two, those of other
            "candidates", "documents" (cards and configs), "structure" (what was added, pruned or quantized),
            or hardly anything: "assumed", since its config is older and nothing speaks against it.
        reasons: sentences that say why.
        weight: the candidate's weight in a merge.
        measures: what the sample says; None if nothing could be compared.
        layers: agreement by the layers' numbers; an empty name is for tensors outside of layers.
        kinds: agreement by kinds of tensors.
        resized: tensors with another number of rows, such as embeddings of another vocabulary.
        config: fields in which the configs differ.
        tokenizer: whether the tokenizers are the same.
    """

    name: str
    repo_id: str | None
    revision: str | None
    verdict: Verdict
    is_related: bool | None
    basis: Basis | None
    reasons: tuple[str, ...]
    weight: float | None
    measures: PairMeasures | None
    layers: tuple[Agreement, ...]
    kinds: tuple[Agreement, ...]
    resized: tuple[ResizedTensor, ...]
    config: tuple[Difference, ...]
    tokenizer: TokenizerMatch


@dataclass(frozen=True, slots=True)
class UnavailableCandidate:
    """A model that card or config names, and that cannot be read: its name, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside its candidates.

    Attributes:
        model: the model as it was given.
        candidates: what it is to each candidate, the closest first.
        unavailable: models that its card or config names and that cannot be read.
        sampled_bytes: bytes of the model's weights that were compared.
        model_bytes: the size of the model.
    """

    model: str
    candidates: tuple[ComparedCandidate, ...]
    unavailable: tuple[UnavailableCandidate, ...]
    sampled_bytes: int
    model_bytes: int

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON."""
        return asdict(self)


@timed_operation("compare")
def compare_models(
    model: Readable,
    candidates: Sequence[Readable] = (),
    *,
    suggest_base: bool = False,
    sample_bytes: int | None = None,
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Tell from which of the candidates a model descends, by a sample of the weights of all.

    Args:
        model: a folder, one .safetensors file, a Hub id, or a URL of a store.
        candidates: the models that it may come from, likewise; at most 32.
        suggest_base: also compare with the models that the model's card and config name.
        sample_bytes: about how many bytes of the model's weights to compare; if None, 0.6% of them, but at
            most 24 MiB, and at least 512 KiB (1 MiB of models up to 32 MiB).
        progress: called with a phase ("compare"), bytes done and total bytes.

    Raises:
        CheckpointError: the model or a candidate cannot be found or read, or is no whole model.
        DeltaWeightsError: there is nothing to compare with.
        ValueError: there are too many candidates.
    """
    if len(candidates) > MOST_CANDIDATES:
        raise ValueError(f"{len(candidates)} candidates are more than {MOST_CANDIDATES}")
    with ExitStack() as opened:
        target = opened.enter_context(open_model(model))
        documents = read_documents(target)
        others = {_name(one): opened.enter_context(open_model(one)) for one in candidates}
        unavailable: list[UnavailableCandidate] = []
        if suggest_base:
            suggested = _suggested(documents, others.values(), unavailable)
            others |= {name: opened.enter_context(one) for name, one in suggested}
            _require_some(others, documents, unavailable, target)
        if not others:
            raise DeltaWeightsError(
                "There is nothing to compare with", "", "Name a model that it may come from."
            )
        reader = _Reader(target, choose(target.tensors, sample_bytes), progress)
        found = reader.compare(documents, others)
        _log.info("compared %d bytes of %s", reader.sampled_bytes, target.source.where)
        return Comparison(
            _name(model),
            tuple(sorted(found, key=_rank)),
            tuple(unavailable),
            reader.sampled_bytes,
            sum(tensor.nbytes for tensor in target.tensors),
        )


def open_model(location: Readable) -> Checkpoint:
    """Open a model to be compared.

    Raises:
        CheckpointError: it cannot be found or read, or is a delta or an adapter.
    """
    source = open_source(location)
    if MANIFEST_NAME in source.sizes:
        source.close()
        raise CheckpointError(
            f"{source.where} is a delta, not a model", "", "Apply it first, and compare the result."
        )
    source.leave_out(is_clutter)
    model = Checkpoint(source, may_lack=True)
    if all(path.rpartition("/")[2].startswith("adapter_model") for path in model.shards):
        source.close()
        raise CheckpointError(
            f"{source.where} is a PEFT adapter, not a whole model",
            "Its weights are an update of a model.",
            "Merge it into its base, and compare the result.",
        )
    return model


def _name(location: Readable) -> str:
    from .storage.source import Source

    return location.where if isinstance(location, Source) else str(location)


def _suggested(
    documents: Documents, there: Iterable[Checkpoint], unavailable: list[UnavailableCandidate]
) -> Iterator[tuple[str, Checkpoint]]:
    """The models that card and config name, opened, but for those that are candidates already."""
    known = {(one.source.hub_id.repo_id or "").casefold() for one in there}
    for base in documents.bases[:MOST_CANDIDATES]:
        if base.casefold() in known:
            continue
        try:
            yield base, open_model(f"hf://{base}")
        except CheckpointError as error:
            unavailable.append(UnavailableCandidate(base, ": ".join(filter(None, (error.what, error.why)))))


def _require_some(
    others: dict[str, Checkpoint],
    documents: Documents,
    unavailable: Sequence[UnavailableCandidate],
    target: Checkpoint,
) -> None:
    """Raise where a suggestion was asked for and there is nothing to compare with."""
    if others:
        return
    if unavailable:
        raise CheckpointError(
            f"No model that {target.source.where} names can be read",
            f"{unavailable[0].name}: {unavailable[0].why}",
            "Name a copy of it on this machine.",
        )
    raise DeltaWeightsError(
        f"{target.source.where} names no model that it was made from",
        "Neither its card (base_model) nor its config (_name_or_path) has the Hub id of another model.",
        "Name a model that it may come from.",
    )


def _rank(candidate: ComparedCandidate) -> tuple[int, int, float]:
    """The closest first: related ones by distance, those that are nothing to the model last."""
    place = {True: 0, None: 1, False: 2}[candidate.is_related]
    verdicts = ("fine-tune", "merge", "sibling", "cannot tell", "unrelated")
    is_far = verdicts.index(candidate.verdict) > 1
    return place, is_far, candidate.measures.distance if candidate.measures else 0.0


class _Reader:
    """Reads the samples of a model and its candidates."""

    def __init__(
        self, model: Checkpoint, chosen: Sequence[SampledTensor], progress: ProgressCallback | None
    ) -> None:
        self.sampled_bytes = 0
        self._model = model
        self._chosen = chosen
        self._progress = progress

    def compare(self, documents: Documents, others: dict[str, Checkpoint]) -> list[ComparedCandidate]:
        """What the model is to each of the others, in their order."""
        candidates = [self._candidate(checkpoint) for checkpoint in others.values()]
        measured: list[list[TensorMeasures]] = [[] for _ in candidates]
        products: list[SampledProducts] = []
        total = sum(one.nbytes for one in self._chosen)
        for read in read_samples(self._model, self._chosen, candidates):
            self.sampled_bytes += read.model.data.size
            sample = without_pruned(read)
            for found, one in zip(measured, measure(sample), strict=True):
                if one:
                    found.append(one)
            products.append(products_of(sample))
            if self._progress:
                self._progress("compare", self.sampled_bytes, total)
        evidence = [
            _evidence(self._model, candidate, found)
            for candidate, found in zip(candidates, measured, strict=True)
        ]
        judgements = judge(documents, evidence, Geometry(products))
        rows = zip(others, candidates, evidence, measured, judgements, strict=True)
        return [self._compared(documents, *row) for row in rows]

    def _candidate(self, checkpoint: Checkpoint) -> Candidate:
        sampled = [one.tensor for one in self._chosen]
        nbytes = sum(tensor.nbytes for tensor in self._model.tensors)
        glance = Glance(sampled, max(_LEAST_COST, _COST_PER_BYTE * nbytes))
        return Candidate(checkpoint, counterparts_of(glance_at_matches(checkpoint, self._model, glance)))

    def _compared(
        self,
        documents: Documents,
        name: str,
        candidate: Candidate,
        evidence: Evidence,
        measured: Sequence[TensorMeasures],
        judgement: Judgement,
    ) -> ComparedCandidate:
        source = candidate.checkpoint.source
        return ComparedCandidate(
            name=name,
            repo_id=source.hub_id.repo_id,
            revision=source.hub_id.revision,
            verdict=judgement.verdict,
            is_related=judgement.is_related,
            basis=judgement.basis,
            reasons=judgement.reasons,
            weight=judgement.weight,
            measures=evidence.measures,
            layers=by_layer(measured),
            kinds=by_kind(measured),
            resized=evidence.structure.resized,
            config=config_differences(documents, evidence.documents),
            tokenizer=compare_tokenizers(self._model.source, source),
        )


def _evidence(model: Checkpoint, candidate: Candidate, measured: Sequence[TensorMeasures]) -> Evidence:
    structure = compare_structures(model, candidate.checkpoint, candidate.counterparts)
    measures = summarize_pair(measured, structure.coverage)
    return Evidence(measures, structure, read_documents(candidate.checkpoint))
