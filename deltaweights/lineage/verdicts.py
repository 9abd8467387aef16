"""Decides what a model is to each candidate, from all evidence. In doubt it says so: a false answer is worse
than none.

Whether two models are related at all, their weights say beyond doubt. Which one came first is another
question: other candidates tell it by where they lie (:mod:`.geometry`), cards and configs by what they name,
structure by what was added, and the weights themselves by their growth (:mod:`.directions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..match.candidates import layer_of
from .directions import PRIORS, Growth, Order, prior_odds
from .documents import Documents
from .geometry import Combination, Geometry
from .pairs import PairMeasures
from .structure import Structure

#: What the model is to a candidate: a fine-tune of it; another fine-tune of what it was made from; a merge
#: of it and other candidates; neither; or that is not known.
Verdict = Literal["fine-tune", "sibling", "merge", "unrelated", "cannot tell"]

#: What decided: the weights of the two, those of other candidates, cards and configs, what was added or
#: pruned; or hardly anything, where the candidate's config is older and nothing speaks against it.
Basis = Literal["weights", "candidates", "documents", "structure", "assumed"]

#: The part of the model that has to have counterparts, and the part of these that has to be alike.
_COVERED, _RELATED = 0.3, 0.6

#: The mean cosine of unrelated models, at most, with its error bar.
_UNRELATED = 0.1

#: A weight below this is no error: the candidate is taken away from the others.
_NEGATIVE = -0.05

#: Where the other candidates' places are known: by how much it is more likely that a candidate between the
#: model and another one is the base, and that one beside both is a sibling; how likely each order of a
#: candidate and the one behind it is; and how likely an answer has to be, to be given.
_BETWEEN, _BESIDE, _LIKELY = 6.0, 6.0, 0.75
_BEHIND: dict[Order, float] = {"after": 0.3, "before": 0.5, "apart": 0.2}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a candidate; no measures, where no sample could be compared."""

    measures: PairMeasures | None
    structure: Structure
    documents: Documents


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, and why.

    Attributes:
        verdict: what the model is to the candidate.
        is_related: whether both have weights of one origin; None if that is not known.
        basis: what decided between the verdicts for related models; None for others.
        reasons: sentences for people.
        weight: the candidate's weight in a merge.
    """

    verdict: Verdict
    is_related: bool | None
    basis: Basis | None
    reasons: tuple[str, ...]
    weight: float | None = None


def judge(model: Documents, evidence: Sequence[Evidence], geometry: Geometry) -> list[Judgement]:
    """The judgement on each candidate, in their order.

    Args:
        model: what the model says of itself.
        geometry: of the model and the candidates, in the same order.
    """
    relations = [_relation(one) for one in evidence]
    related = [number for number, (is_related, _) in enumerate(relations, 1) if is_related]
    groups = geometry.distinct(related)
    family = _Family(model, evidence, geometry, groups, geometry.combination([one[0] for one in groups]))
    found = [
        family.judge(number, why)
        if is_related
        else Judgement("cannot tell" if is_related is None else "unrelated", is_related, None, (why,))
        for number, (is_related, why) in enumerate(relations, 1)
    ]
    return [family.reconciled(number, found) for number in range(1, len(found) + 1)]


def _relation(evidence: Evidence) -> tuple[bool | None, str]:
    """Whether model and candidate have weights of one origin, and why."""
    measures, covered = evidence.measures, evidence.structure.coverage
    if measures is None:
        return None, (
            "There is nothing to compare: no matrix of both has the same shape and numbers that can be read."
            if not covered
            else "There is nothing to compare: what both have in common looks the same in any model."
        )
    if covered < _COVERED:
        return None, f"Only {covered:.0%} of the model's weights have a counterpart of the same shape."
    mean = f"{measures.cosine:.3f} ({measures.cosine_low:.3f} to {measures.cosine_high:.3f})"
    if measures.alike >= _RELATED:
        return True, f"The weights are of one origin: their cosine is {mean}, that of unrelated models 0."
    is_low = measures.cosine_low > -_UNRELATED and measures.cosine_high < _UNRELATED
    if is_low and not measures.alike and not measures.reordered:
        return False, f"The weights have nothing in common: their cosine is {mean}."
    if measures.reordered:
        why = f"{measures.reordered:.0%} of the tensors have the same weights in another order."
    elif measures.alike:
        why = f"Only {measures.alike:.0%} of the tensors are of one origin; the others differ."
    else:
        why = f"The weights are a little alike, which may have other reasons: their cosine is {mean}."
    return None, why


#: A verdict, what decided, and why.
_Placed: TypeAlias = tuple[Verdict, Basis | None, str]


class _Family:
    """A model and the candidates that are related to it.

    Args:
        groups: the related candidates, those that are the same model together.
        combination: of candidates, the first of each group, that the model is a merge of.
    """

    def __init__(
        self,
        model: Documents,
        evidence: Sequence[Evidence],
        geometry: Geometry,
        groups: Sequence[Sequence[int]],
        combination: Combination | None,
    ) -> None:
        self._model = model
        self._evidence = evidence
        self._geometry = geometry
        self._groups = groups
        self._combination = combination
        self._merged = dict(combination.weights) if combination else {}
        self._is_merge = all(
            weight >= _NEGATIVE or self._is_base(one) for one, weight in self._merged.items()
        )

    def judge(self, number: int, why: str) -> Judgement:
        """The judgement on a related candidate; ``why`` it is related."""
        group = self._group(number)
        if self._combination and group[0] in self._merged and not self._is_merge:
            text = "It, the model and others lie on one line: which of them is a mix of the others is open."
            return Judgement("cannot tell", True, None, (why, text))
        if self._combination and group[0] in self._merged:
            weight = self._merged[group[0]]
            text = (
                f"A combination of {len(self._merged)} candidates explains all but "
                f"{self._combination.unexplained:.1%} of the distance; this one's weight is {weight:.2f}."
            )
            return Judgement("merge", True, "candidates", (why, text), weight)
        verdict, basis, text = self._placed(number)
        return Judgement(verdict, True, basis, (why, text))

    def reconciled(self, number: int, found: Sequence[Judgement]) -> Judgement:
        """A judgement beside the others: of two that are taken for the base by the weights alone, one has to
        lie between the other and the model."""
        own = found[number - 1]
        if own.verdict != "fine-tune" or own.basis not in ("weights", "assumed") or self._is_copy(number):
            return own
        between = self._geometry.is_between
        for other in self._others(number):
            is_rival = found[other - 1].verdict == "fine-tune"
            if is_rival and not between(number, 0, other) and not between(other, 0, number):
                text = (
                    "Another candidate is as likely the base, and the two do not lie on one way to the model."
                )
                return Judgement("cannot tell", True, None, (own.reasons[0], text))
        return own

    def _is_base(self, number: int) -> bool:
        """Whether a candidate is the base of two others that were merged: of sums of updates, it is taken
        away."""
        added = [one for one, weight in self._merged.items() if weight > 0]
        grown = [growth for one in added if (growth := self._geometry.growth(number, one))]
        return not any(growth.order() == "after" for growth in grown) and any(
            self._geometry.is_between(number, one, other) for one in added for other in added if one < other
        )

    def _group(self, number: int) -> Sequence[int]:
        return next(one for one in self._groups if number in one)

    def _others(self, number: int) -> list[int]:
        """The other related candidates, each model once, without copies of the model and what was merged."""
        own = self._group(number)
        firsts = (one[0] for one in self._groups if one is not own)
        return [one for one in firsts if not self._is_copy(one) and one not in self._merged]

    def _is_copy(self, number: int) -> bool:
        measures = self._evidence[number - 1].measures
        return measures is not None and measures.is_copy

    def _growth(self, number: int) -> Growth | None:
        measures = self._evidence[number - 1].measures
        return measures.growth if measures else None

    def _is_newer(self, number: int) -> bool | None:
        return self._model.is_newer_than(self._evidence[number - 1].documents)

    def _odds(self, number: int) -> dict[Order, float]:
        """How likely each order is, by growth and configs."""
        growth, is_newer = self._growth(number), self._is_newer(number)
        return growth.odds(is_newer) if growth else prior_odds(is_newer)

    def _order(self, number: int) -> Order | None:
        growth = self._growth(number)
        return growth.order(self._is_newer(number)) if growth else None

    def _placed(self, number: int) -> _Placed:
        """The verdict on a related candidate that is no part of a merge: the first one that is given."""
        rules = (
            self._as_copy,
            self._by_documents,
            self._behind,
            self._under_merge,
            self._mixed,
            self._by_structure,
            self._between,
            self._beside,
        )
        return next(filter(None, (rule(number) for rule in rules)), None) or self._alone(number)

    def _as_copy(self, number: int) -> _Placed | None:
        measures, structure = self._evidence[number - 1].measures, self._evidence[number - 1].structure
        if not measures or not measures.is_copy:
            return None
        if before := structure.comes_before():
            text = (
                f"What both have is the same, but for rounding; the candidate may be made from it: {before}."
            )
            return "cannot tell", "structure", text
        if any(one.rows < one.candidate_rows for one in structure.resized if not layer_of(one.name)):
            text = (
                "What both have is the same; the candidate's vocabulary has more rows, or the model's fewer."
            )
            return "cannot tell", "structure", text
        if measures.candidate_zeroed:
            text = "It is a copy of the model, but for weights that are zero: it was pruned."
            return "cannot tell", "weights", text
        if measures.zeroed:
            return "fine-tune", "weights", "The model is a copy of it, but for weights that were set to zero."
        return "fine-tune", "weights", "All of the sample is the same, but for rounding: it is a copy."

    def _by_documents(self, number: int) -> _Placed | None:
        candidate = self._evidence[number - 1].documents
        ours, theirs = self._model.names_as_base(candidate), candidate.names_as_base(self._model)
        if ours and not theirs:
            return "fine-tune", "documents", "The model's card or config names it as the base."
        if theirs and not ours:
            text = "Its card or config names the model as its base: it was made from the model."
            return "cannot tell", "documents", text
        if self._model.shares_base(candidate):
            return "sibling", "documents", "The cards or configs of both name the same base."
        return None

    def _by_structure(self, number: int) -> _Placed | None:
        """Where the model has what the candidate lacks, or the other way round: it is not the candidate's
        base, but may be a sibling."""
        odds, structure = self._odds(number), self._evidence[number - 1].structure
        measures = self._evidence[number - 1].measures
        before = structure.comes_before()
        if measures and measures.candidate_zeroed:
            before = "its weights were pruned"
        if before and self._order(number) != "apart":
            return "cannot tell", "structure", f"It is hardly the model's base: {before}."
        added = structure.comes_after()
        if not added:
            return None
        likely = {order: odds[order] / (odds["after"] + odds["apart"]) for order in odds}
        if likely["after"] > _LIKELY:
            return "fine-tune", "structure", f"The model came after it: {added}."
        if likely["apart"] > _LIKELY:
            return "sibling", "weights", "Neither has grown beyond the other, as two fine-tunes of one base."
        return None

    def _behind(self, number: int) -> _Placed | None:
        """Where another candidate hides it from the model: a sibling, unless the other one came after it."""
        others = (other for other in self._others(number) if self._geometry.is_between(other, 0, number))
        hiding = next(others, None)
        if hiding is None:
            return None
        growth = self._geometry.growth(hiding, number)
        odds = growth.odds() if growth else PRIORS
        after, before, apart = (
            _BEHIND[order] * odds[order] / PRIORS[order] for order in ("after", "before", "apart")
        )
        own = self._odds(hiding)
        if own["before"] > own["after"]:
            text = "Another candidate, which lies between it and the model, rather came from the model."
            return "cannot tell", None, text
        ancestor = after / (after + before + apart)
        if ancestor > _LIKELY:
            text = "Another candidate lies between it and the model, and has grown beyond it."
            return "fine-tune", "candidates", text
        if 1 - ancestor > _LIKELY:
            text = "Another candidate lies between it and the model, as a base between its fine-tunes."
            return "sibling", "candidates", text
        text = "Another candidate lies between it and the model: it is a sibling, or the base's own base."
        return "cannot tell", None, text

    def _under_merge(self, number: int) -> _Placed | None:
        """Where the model is a merge of others: the base of these."""
        pairs = [(one, other) for one in self._merged for other in self._merged if one < other]
        if not any(self._geometry.is_between(number, *pair) for pair in pairs):
            return None
        text = "The models that were merged have it in their middle: they are fine-tunes of it."
        return "fine-tune", "candidates", text

    def _mixed(self, number: int) -> _Placed | None:
        """Where the model lies between it and another candidate, as a merge does."""
        if self._order(number) == "after":
            return None
        if not any(
            self._geometry.is_between(0, number, other) is not False for other in self._others(number)
        ):
            return None
        text = "The model lies between it and another candidate, as the base of both or a kind of merge does."
        return "cannot tell", None, text

    def _between(self, number: int) -> _Placed | None:
        """Where it lies between the model and another candidate."""
        others, between = self._others(number), self._geometry.is_between
        if not any(between(number, 0, other) for other in others):
            return None
        # Of two that seem to lie there and do not lie on one way, only one that is far nearer to it does.
        own = self._detour(number)
        for other in others:
            if (
                not between(number, 0, other)
                and not between(other, 0, number)
                and self._detour(other) < 2 * own
            ):
                return None
        odds = self._odds(number)
        after = _BETWEEN * odds["after"]
        if after / (after + odds["apart"] + odds["before"]) < _LIKELY:
            return None
        text = "It lies between the model and another candidate, as a base between its fine-tunes."
        return "fine-tune", "candidates", text

    def _detour(self, number: int) -> float:
        """How far a candidate lies off the way from the model to any other candidate, at least."""
        found = (self._geometry.detour(number, 0, other) for other in self._others(number))
        return min((one for one in found if one is not None), default=1.0)

    def _beside(self, number: int) -> _Placed | None:
        """Where neither it nor the model nor another candidate lies between the others."""
        between, odds = self._geometry.is_between, self._odds(number)
        apart = _BESIDE * odds["apart"]
        if apart / (apart + odds["after"] + odds["before"]) < _LIKELY:
            return None
        for other in self._others(number):
            ways = ((0, number, other), (number, 0, other), (other, 0, number))
            if all(between(*way) is False for way in ways):
                text = "It, the model and another candidate lie as far from a base that is not among them."
                return "sibling", "candidates", text
        return None

    def _alone(self, number: int) -> _Placed:
        """By the two models alone."""
        growth, order = self._growth(number), self._order(number)
        if order == "after":
            text = "Its weights have grown beyond the candidate's, as those of a fine-tune do."
            return "fine-tune", "weights", text
        if order == "apart":
            text = "Neither has grown beyond the other, as two fine-tunes of one base."
            return "sibling", "weights", text
        if order == "before":
            text = "It rather came from the model, which is smaller, as a base is beside its fine-tune."
            return "cannot tell", "weights", text
        if self._may_assume(number) and (growth is None or growth.is_silent):
            text = (
                "The weights of two models alone do not tell which came first. The model's config is newer, "
                "so it is taken for a fine-tune; but a fine-tune of a common base would look the same: name "
                "that base, too, if there may be one."
            )
            return "fine-tune", "assumed", text
        text = "They are related; which one came first, or whether both come from a third one, is not clear."
        return "cannot tell", None, text

    def _may_assume(self, number: int) -> bool:
        """Whether a fine-tune is the best guess: where the model's config is the newer one. Not where the
        model names its base, and this is none of those named; nor where it lies between candidates, is a copy
        of one, or a merge of some."""
        if not self._is_newer(number):
            return False
        others, between = self._others(number), self._geometry.is_between
        has_copy = any(self._is_copy(one) for group in self._groups for one in group)
        is_middle = any(
            between(one, 0, number) is not False or between(number, 0, one) is not False for one in others
        )
        is_middle = is_middle or any(between(0, number, one) is not False for one in others)
        return not (self._model.bases or self._merged or has_copy or is_middle)
