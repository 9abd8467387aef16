"""Fine-tune a small language model with checkpoints as deltas, go on from one of them, publish, and load.

Run it: python examples/finetune_and_publish.py
It needs `pip install '.[torch]' transformers accelerate` in a clone, works in a temporary folder, and needs
no network: the base is a byte-level model that is made here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from deltaweights import verify_delta
from deltaweights.torch import (
    DeltaCallback,
    DeltaCheckpointer,
    list_checkpoints,
    load_into,
    save_delta,
    write_files,
)

STEPS, EVERY, CONTEXT = 20, 5, 32


def make_base(folder: Path) -> None:
    """A base as the Hub would hold it: a model in BF16 with tied embeddings, and a license."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")


def open_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = Qwen2ForCausalLM.from_pretrained(folder)
    return model


def train(model: PreTrainedModel, steps: int, callback: DeltaCallback, folder: Path) -> None:
    """Fine-tune on this script's own text. The Trainer keeps no checkpoints of its own."""
    text = torch.tensor(list(Path(__file__).read_bytes())).unfold(0, CONTEXT, CONTEXT)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-5,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in text]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=callback.restore(trainer))


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def check(is_right: bool, what: str) -> None:
    if not is_right:
        raise SystemExit(f"{what} should be exactly as saved")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    torch.set_num_threads(1)  # so small a model trains faster without threads waiting for one another
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, checkpoints = folder / "base", folder / "checkpoints"
        make_base(base)

        # Train. Every checkpoint is a delta: one of three against the base, the others against the last.
        model = open_model(base)
        with DeltaCheckpointer(checkpoints, base, anchor_every=3) as checkpointer:
            train(model, STEPS, DeltaCallback(checkpointer, EVERY), folder)
        count = len(list_checkpoints(checkpoints))
        weights = sum(map(size_of, checkpoints.glob("step-*")))  # without the optimizer's states
        print(f"weights of {count} checkpoints: {weights / (count * size_of(base)):.1%} of full ones")

        # Later, in another process: go on from the last one. Its weights are those that were saved, and so is
        # the optimizer's state.
        resumed = open_model(base)
        with DeltaCheckpointer(checkpoints, base, anchor_every=3) as checkpointer:
            step = checkpointer.load_into(resumed)
            check(same_weights(resumed, model), "the weights of the last checkpoint")
            train(resumed, STEPS + EVERY, DeltaCallback(checkpointer, EVERY), folder)
            print(f"resumed at step {step}; checkpoints now: {checkpointer.steps}")

        # Publish: the delta comes straight from the model's memory. `deltaweights push` puts it on the Hub.
        manifest = save_delta(resumed, base, folder / "delta", base_repo="example/base")
        print(f"delta: {manifest.delta_bytes / manifest.target_bytes:.1%} of the fine-tune")
        check(verify_delta(folder / "delta", base=base).ok, "the delta")

        # Use: config first, then a model without memory for its weights, then the weights, decoded into it.
        write_files(folder / "delta", folder / "files", base)
        with init_empty_weights():
            config = AutoConfig.from_pretrained(folder / "files")
            loaded = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        loaded.tie_weights()
        loaded.train(False)
        load_into(loaded, folder / "delta", base)
        tokens = torch.tensor([list(b"from deltaweights import")])
        resumed.train(False)
        with torch.no_grad():
            check(torch.equal(loaded(tokens).logits, resumed(tokens).logits), "the logits")
        print("the loaded model gives the same logits, bit for bit")


if __name__ == "__main__":
    main()
