"""The demonstration, examples/demo.py: a small one from beginning to end, and its training checked."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from .checkpoints import contents


def load_example(name: str) -> ModuleType:
    """Examples are programs, not a package: Python finds them by their path."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_example("demo")

SMALL = demo.CONFIG | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 12,
}  # fmt: skip


def test_demo_trains_a_pair_and_rebuilds_the_fine_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"CONFIG": SMALL, "BASE_STEPS": 40, "TUNE_STEPS": 20}.items():
        monkeypatch.setattr(demo, name, value)
    folder = tmp_path / "new" / "demo"
    demo.main(["--keep", str(folder)])
    shown = capfd.readouterr().out
    verbs = re.findall(r"^\$ deltaweights (\w+) ", shown, re.MULTILINE)
    assert verbs == ["diff", "inspect", "apply", "verify"]
    losses = re.findall(r"loss on unseen text ([\d.]+) -> ([\d.]+)", shown)
    assert len(losses) == 2
    assert all(float(after) < float(before) for before, after in losses)
    assert re.search(r"^. delta .*%", shown, re.MULTILINE)
    assert shown.endswith("7 of 7 files identical\n")
    assert contents(folder / "rebuilt") == contents(folder / "fine-tune")
    assert len(list(folder.glob("base/*.safetensors"))) == 3
    assert len(list(folder.glob("fine-tune/*.safetensors"))) == 2


def test_demo_leaves_a_folder_with_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(SystemExit):
        demo.main(["--keep", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.txt": b"x"}


def test_demo_fails_where_a_command_fails_or_a_file_differs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="failed with exit code 1"):
        demo.run("deltaweights inspect no-such-delta", tmp_path)
    for name, text in {"target": "a", "rebuilt": "b"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    with pytest.raises(SystemExit, match="differ"):
        demo.compare_files(tmp_path / "target", tmp_path / "rebuilt")


def test_gradients_are_those_of_finite_differences() -> None:
    """For every tensor, along a random direction, in float64."""
    rng = np.random.default_rng(1)
    weights = {
        name: weight.astype(np.float64) + rng.normal(0, 0.3, weight.shape)
        for name, weight in demo.initial_weights(SMALL, rng).items()
    }
    tokens = rng.integers(0, 4, (2, 7))  # some of them more than once
    model = demo.Model(SMALL, weights)
    model.loss(tokens, learn=True)
    assert model.gradients.keys() == weights.keys()
    for name, gradient in model.gradients.items():
        assert gradient.dtype == np.float64
        direction = rng.normal(0, 1, gradient.shape)
        moved = [
            demo.Model(SMALL, weights | {name: weights[name] + step * direction}).loss(tokens)
            for step in (1e-6, -1e-6)
        ]
        assert np.vdot(gradient, direction) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-4, abs=1e-8)
