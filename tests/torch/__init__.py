"""Tests of deltaweights.torch, which need torch and transformers."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before conftest.py imports transformers, and so Triton, which reads it
    )
