"""Tests of deltaweights.engines, which need torch; `make engines` runs those with vLLM."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, as in tests/torch
