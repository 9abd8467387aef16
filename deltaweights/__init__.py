"""Publish a fine-tune as what it adds to its base, and get it back byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _exports

if TYPE_CHECKING:
    from ._version import __version__ as __version__
    from .attest import AttestReport as AttestReport
    from .attest import attest_delta as attest_delta
    from .attest import statement_of as statement_of
    from .batch.jobs import ApplyJob as ApplyJob
    from .batch.jobs import DiffJob as DiffJob
    from .batch.jobs import VerifyJob as VerifyJob
    from .batch.results import JobError as JobError
    from .batch.results import JobResult as JobResult
    from .batch.running import run_batch as run_batch
    from .bom import bom_of as bom_of
    from .compact import compact_deltas as compact_deltas
    from .compare import ComparedCandidate as ComparedCandidate
    from .compare import Comparison as Comparison
    from .compare import UnavailableCandidate as UnavailableCandidate
    from .compare import compare_models as compare_models
    from .delta.target import Target as Target
    from .delta.target import TensorSlice as TensorSlice
    from .delta.target import TensorView as TensorView
    from .delta.target import open_target as open_target
    from .diff import make_delta as make_delta
    from .errors import BaseMismatchError as BaseMismatchError
    from .errors import CheckpointError as CheckpointError
    from .errors import DeltaError as DeltaError
    from .errors import DeltaWeightsError as DeltaWeightsError
    from .errors import DiskSpaceError as DiskSpaceError
    from .errors import ExecutorError as ExecutorError
    from .errors import FormatVersionError as FormatVersionError
    from .errors import HeaderError as HeaderError
    from .errors import HubError as HubError
    from .errors import LicenseNotAcceptedError as LicenseNotAcceptedError
    from .errors import ManifestError as ManifestError
    from .errors import NotPublishedError as NotPublishedError
    from .errors import OutputError as OutputError
    from .errors import PayloadError as PayloadError
    from .errors import SignatureError as SignatureError
    from .errors import SigningError as SigningError
    from .estimate import DeltaEstimate as DeltaEstimate
    from .estimate import EstimatedTensors as EstimatedTensors
    from .estimate import estimate_delta as estimate_delta
    from .executors.executor import Executor as Executor
    from .executors.ray_executor import RayExecutor as RayExecutor
    from .inspect import DeltaSummary as DeltaSummary
    from .inspect import inspect_delta as inspect_delta
    from .inspect import license_of as license_of
    from .license.rules import LicenseReport as LicenseReport
    from .lineage.directions import Growth as Growth
    from .lineage.pairs import Agreement as Agreement
    from .lineage.pairs import PairMeasures as PairMeasures
    from .manifest import Manifest as Manifest
    from .match.names import RenameRule as RenameRule
    from .patch import ApplyReport as ApplyReport
    from .patch import apply_delta as apply_delta
    from .plan import Plan as Plan
    from .plan import plan_apply as plan_apply
    from .push import PushReport as PushReport
    from .push import push_delta as push_delta
    from .report.making import report_delta as report_delta
    from .report.results import DeltaReport as DeltaReport
    from .report.results import MovedRow as MovedRow
    from .report.results import MovedTable as MovedTable
    from .report.side_by_side import ComparisonReport as ComparisonReport
    from .report.side_by_side import PairReport as PairReport
    from .report.side_by_side import report_side_by_side as report_side_by_side
    from .sign import SignReport as SignReport
    from .sign import sign_delta as sign_delta
    from .signing.signers import CertificateSigner as CertificateSigner
    from .signing.signers import KeySigner as KeySigner
    from .signing.signers import Pkcs11Signer as Pkcs11Signer
    from .signing.signers import SigstoreSigner as SigstoreSigner
    from .signing.trust import TrustedCertificates as TrustedCertificates
    from .signing.trust import TrustedIdentity as TrustedIdentity
    from .signing.trust import TrustedKey as TrustedKey
    from .storage.location import Location as Location
    from .verify import Problem as Problem
    from .verify import VerifyReport as VerifyReport
    from .verify import verify_delta as verify_delta
    from .workers import ProgressCallback as ProgressCallback
else:
    __getattr__, __dir__, __all__ = _exports.exports(__name__)
