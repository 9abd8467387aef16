"""Make a delta, rebuild the target from it, check everything, and watch the progress.

Run it: python examples/publish_and_rebuild.py
It works in a temporary folder and needs no network.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaweights import BaseMismatchError, apply_delta, make_delta, verify_delta


def save_bf16(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Write a safetensors file by hand; a real checkpoint comes from save_pretrained or save_file."""
    header: dict[str, object] = {}
    data = b""
    for name, values in tensors.items():
        bits = values.view(np.uint32)
        stored = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()  # to nearest even
        offsets = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": offsets}
        data += stored
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def show(phase: str, done: int, total: int) -> None:
    """A progress callback. It may be called from any thread, but only from one at a time."""
    if done == total:
        print(f"  {phase}: {done:,} of {total:,}")


def main() -> None:
    rng = np.random.default_rng(0)

    def noise(std: float) -> NDArray[np.float32]:
        return rng.normal(0, std, (512, 512)).astype(np.float32)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = {f"model.layers.{k}.weight": noise(0.02) for k in range(4)}
        new = {name: values + noise(1e-5) for name, values in old.items()}
        save_bf16(folder / "base" / "model.safetensors", old)
        save_bf16(folder / "tuned" / "model.safetensors", new)
        (folder / "tuned" / "config.json").write_text('{"model_type": "qwen2"}\n')

        print("publisher: make_delta")
        manifest = make_delta(
            folder / "base",
            folder / "tuned",
            folder / "delta",
            base_repo="example/base",
            base_license="apache-2.0",
            target_license="mit",
            progress=show,
        )
        print(f"  the delta is {manifest.delta_bytes / manifest.target_bytes:.0%} of the target")

        print("user: apply_delta")
        report = apply_delta(folder / "delta", folder / "model", base=folder / "base", progress=show)
        print(f"  rebuilt {', '.join(report.rebuilt)}")

        print("anybody: verify_delta")
        check = verify_delta(folder / "delta", base=folder / "base", target=folder / "model")
        print(f"  {check.checked} files checked, {len(check.problems)} problems")

        print("a wrong base (here the fine-tune itself) is refused before anything is written")
        try:
            apply_delta(folder / "delta", folder / "never", base=folder / "tuned")
        except BaseMismatchError as error:
            print(f"  {error.why}")
        print(f"  the output folder exists: {(folder / 'never').exists()}")


if __name__ == "__main__":
    main()
