"""Many jobs, each of which makes, applies or verifies a delta: ``deltaweights batch``."""

from .jobs import ApplyJob, DiffJob, Job, VerifyJob
from .results import JobError, JobResult
from .running import CACHE_BYTES, run_batch

__all__ = ["CACHE_BYTES", "ApplyJob", "DiffJob", "Job", "JobError", "JobResult", "VerifyJob", "run_batch"]
