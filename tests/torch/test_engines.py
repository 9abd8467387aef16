"""The recipes of docs/serve.md with the real programs, where those are: engines on the folder of apply.

vLLM runs in a process of its own, on the CPU. For llama.cpp's converter, LLAMA_CPP names a folder that has
convert_hf_to_gguf.py, and its requirements are installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaweights import apply_delta, make_delta

from ..checkpoints import contents
from .tiny_models import nudge

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fine-tune, ``tuned``, and what ``apply`` makes of its delta, ``model``."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    for side in ("base", "tuned"):
        model.save_pretrained(folder / side)
        _tokenizer().save_pretrained(folder / side)
        nudge(model, std=1e-2)
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "base" / "LICENSE").write_text("MIT License\n\nPermission is granted.\n")
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    apply_delta(folder / "delta", folder / "model", base=folder / "base")
    assert (folder / "model" / ".deltaweights").is_dir(), "engines see the license texts, too"
    return folder


@pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")
def test_vllm_says_the_same_from_the_rebuilt_folder(rebuilt: Path) -> None:
    (recipe,) = re.findall(r"```py\n(from vllm.*?)```", (ROOT / "docs" / "serve.md").read_text(), re.DOTALL)
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    said = []
    for name in ("model", "tuned", "base"):
        code = recipe.replace('model="model"', f'model="{name}"')
        said += re.findall(r"^said: .*", _run([sys.executable, "-c", code], rebuilt, cpu), re.MULTILINE)
    model, tuned, base = said
    assert model == tuned != base


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs llama.cpp's converter")
def test_llama_cpp_converts_the_rebuilt_folder_to_the_same_file(rebuilt: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    for name in ("model", "tuned"):
        (rebuilt / name / "tokenizer.json").unlink()  # the converter knows no tokenizer of its kind
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "README.md").read_text().splitlines()),
        model_prefix=str(rebuilt / "tokenizer"), vocab_size=400, byte_fallback=True,
        model_type="bpe", character_coverage=0.99,
    )  # fmt: skip
    converter = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
    for name in ("model", "tuned"):
        (rebuilt / name / "tokenizer.model").write_bytes((rebuilt / "tokenizer.model").read_bytes())
        command = [sys.executable, str(converter), name, "--outfile", f"{name}.gguf", "--model-name", "x"]
        _run(command, rebuilt, {})
    files = contents(rebuilt)
    assert files["model.gguf"] == files["tuned.gguf"]
    assert files["model.gguf"].startswith(b"GGUF")


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: k for k, text in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)  # type: ignore[no-untyped-call]
