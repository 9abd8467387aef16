"""The documents are true: examples run, the commands of README and docs/ print what is shown, links lead
somewhere, every option and public name is there, and another reader, written from docs/format.md alone,
rebuilds the target."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer.main
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from typer.core import TyperGroup

import deltaweights
import deltaweights.engines
import deltaweights.torch
from deltaweights import make_delta
from deltaweights.cli.commands import app
from deltaweights.codec import Method, convert
from deltaweights.delta.chain import open_recipe
from deltaweights.delta.shards import usual_header
from deltaweights.entries import TensorEntry
from deltaweights.manifest import FORMAT_VERSION

from . import independent_reader
from .checkpoints import Array, contents, digests, random_array, weights, write_pair, write_safetensors
from .codec.pairs import decayed, fine_tune
from .conftest import MISSING, Trio

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
#: Read in this order: later ones go on with what earlier ones made.
GUIDES = ("publish", "report", "use", "platform", "trust", "reference/command-line")
GUIDES_FOR_TORCH = ("train", "serve", "disk-updates")
#: All except those that tests/test_demo.py (with a smaller model) and tests/engines run.
EXAMPLES = sorted(p for p in ROOT.glob("examples/*.py") if p.stem not in ("demo", "rl_with_vllm"))

#: What comes on stderr besides: progress in a log, and the wait for the kernels on a new machine.
PROGRESS = re.compile(r"\d{4}-\d\d-\d\d [\d:]{8} [a-z ]+: .*|compiling the codec .*")


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code, and stdout with stderr in the order of their writing, progress left out."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if not PROGRESS.fullmatch(line)]
    return done.returncode, "\n".join(lines)


def blocks(document: str) -> list[tuple[str, str]]:
    """The fenced blocks of a document: language, text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def normal(output: str) -> list[str]:
    """Output without what may differ from one machine to the next: numbers, digests and white space."""
    output = re.sub(r"\b[0-9a-f]{12,64}\b|[\d.,]*\d", "0", output)
    output = re.sub(r"\b0 (bytes|KB|MB|GB)\b", "0 KB", output)
    return [" ".join(line.split()) for line in output.splitlines() if line.strip()]


def check_blocks(document: str, folder: Path) -> None:
    """Run the python and console blocks of a document in order, and compare what the latter print.

    Other blocks (``sh``, ``json``, …) are not run. Where ``…`` stands in shown output, anything may stand.
    """
    for language, text in blocks(document):
        if language == "python":
            code, output = run([sys.executable, "-c", text], folder)
            assert code == 0, output
        elif language == "console":
            for command, _, shown in (
                part.partition("\n") for part in re.split(r"^\$ ", text, flags=re.M)[1:]
            ):
                code, output = run(["bash", "-c", command], folder)
                pattern = "\n".join(map(re.escape, normal(shown))).replace("…", ".*")
                assert re.fullmatch(pattern, "\n".join(normal(output)), re.DOTALL), f"$ {command}\n{output}"
                failed = re.search(r"^error: |: (missing|extra|different): ", shown, re.M)
                refused = "license was not accepted" in shown
                assert code == (3 if refused else 1 if failed else 0), f"$ {command}\n{output}"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    for library in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE):
        if not importlib.util.find_spec(library):
            pytest.skip(f"needs {library}")
    code, output = run([sys.executable, str(path)], tmp_path)
    assert code == 0, output
    assert output


def test_readme_shows_what_happens(tmp_path: Path) -> None:
    check_blocks("README.md", tmp_path)


@pytest.mark.slow
def test_guides_show_what_happens(tmp_path: Path) -> None:
    write_pair(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    shard = tmp_path / "other" / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    for guide in GUIDES:
        if guide == "trust" and not importlib.util.find_spec("model_signing"):
            continue
        check_blocks(f"docs/{guide}.md", tmp_path)


def test_the_guide_to_lineage_shows_what_happens(tmp_path: Path) -> None:
    check_blocks("docs/lineage.md", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason="needs torch and transformers")
def test_guides_for_torch_run(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_small_model(tmp_path)
    found = [block for guide in GUIDES_FOR_TORCH for block in blocks(f"docs/{guide}.md")]
    texts = [text for language, text in found if language == "python"]
    # One process for all: each would take seconds to import transformers.
    code, output = run([sys.executable, "-c", "".join(f"exec({text!r}, {{}})\n" for text in texts)], tmp_path)
    assert code == 0, output


def write_small_model(folder: Path) -> None:
    """The model, fine-tune and delta of docs/train.md."""
    from .torch.tiny_models import nudge, tiny_qwen2

    model = tiny_qwen2()
    model.save_pretrained(folder / "small-base")
    nudge(model)
    model.save_pretrained(folder / "small-tuned")
    make_delta(folder / "small-base", folder / "small-tuned", folder / "small-delta")


def test_the_manifest_for_kuberay_has_fields_of_its_api() -> None:
    """Those of ray.io/v1, as KubeRay's API reference lists them; and the command takes its options."""
    ((_, text),) = [block for block in blocks("docs/platform.md") if block[0] == "yaml"]
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    job, cluster = manifest["spec"], manifest["spec"]["rayClusterSpec"]
    deadlines = {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"}
    assert set(job) <= {"entrypoint", "backoffLimit", "rayClusterSpec", "runtimeEnvYAML"} | deadlines
    assert set(cluster) <= {"rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
    assert set(cluster["headGroupSpec"]) <= {"rayStartParams", "template", "serviceType"}
    for group in cluster["workerGroupSpecs"]:
        counts = {"replicas", "minReplicas", "maxReplicas", "numOfHosts"}
        assert set(group) <= {"groupName", "rayStartParams", "template"} | counts
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    name, verb, *arguments = job["entrypoint"].split()
    assert (name, verb) == ("deltaweights", "batch")
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    command.commands["batch"].make_context("batch", arguments)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), link
        if anchor:
            assert anchor in anchors(linked), link


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown document's headings make."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_option_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    assert len(group.commands) >= 5
    nested = [
        command
        for one in group.commands.values()
        if isinstance(one, TyperGroup)
        for command in one.commands.values()
    ]
    for command in [group, *group.commands.values(), *nested]:
        options = [option for parameter in command.params for option in parameter.opts]
        for option in ["--help", *options]:
            if option.startswith("-"):
                assert f"`{option}" in reference, f"{command.name} {option}"
    for name, one in group.commands.items():
        for path in [f"{name} {inner}" for inner in getattr(one, "commands", ())] or [name]:
            assert f"deltaweights {path}" in reference


@pytest.mark.parametrize(
    "module", [deltaweights, deltaweights.engines, deltaweights.torch], ids=lambda module: module.__name__
)
def test_every_public_name_is_in_the_reference(module: ModuleType) -> None:
    """And no name that is not public. `make docs` fails where one has no docstring."""
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    names = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", pages, re.MULTILINE)
    assert sorted(names) == sorted(module.__all__)


def test_test_modules_named_in_documents_exist() -> None:
    for path in DOCUMENTS:
        for module in re.findall(r"tests/[\w/]+\.py", path.read_text()):
            assert (ROOT / module).exists(), f"{path.name}: {module}"


def test_format_document_describes_this_version() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    versions = re.search(r"^## Versions\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert versions
    assert re.search(rf"^\| {FORMAT_VERSION} \|", versions[1], re.MULTILINE)


def test_independent_reader_rebuilds_the_target(trio: Trio, tmp_path: Path) -> None:
    independent_reader.rebuild(trio.delta, trio.base, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(trio.target)


def test_independent_reader_agrees_on_odd_checkpoints(tmp_path: Path) -> None:
    """Every conversion of the base (NaNs, infinities, subnormals), every dtype, cut rows, reshaped and
    repeated tensors, headers with white space, names with every kind of character."""
    base, target = tmp_path / "base", tmp_path / "target"
    floats = ("BF16", "F16", "F32", "F64")
    old, new = {}, {}
    for dtype in sorted(independent_reader.BITS):
        old[f"in.{dtype}"] = array = random_array(dtype, (24, 700), seed=1)
        data = np.frombuffer(array.data, np.uint8).copy()
        data[::1000] ^= 1
        new[f"in.{dtype}"] = Array(dtype, (24, 700), data.tobytes())
        new[f"rows.{dtype}"] = random_array(dtype, (32, 8), seed=2)
        old[f"rows.{dtype}"] = Array(
            dtype, (16, 8), new[f"rows.{dtype}"].data[: -(-len(new[f"rows.{dtype}"].data) // 2)]
        )
    for source in floats:
        for dtype in floats:
            name = f'{source}\t"{dtype}\\\u007f é😀'
            old[name] = random_array(source, (5000,), seed=3)
            reference = convert(np.frombuffer(old[name].data, np.uint8), source, dtype)
            new[name] = Array(dtype, (50, 100), reference.tobytes())
    twin = Array("F32", (300, 100), weights((300, 100), 4).tobytes())
    old["twin"] = new["twin"] = twin
    write_safetensors(base / "a.safetensors", old)
    write_safetensors(base / "v" / "b.safetensors", {"twin": new["rows.F32"]})
    write_safetensors(target / "a.safetensors", new, indent=2, padding="   ", metadata={"é": '"'})
    write_safetensors(target / "v" / "b.safetensors", {"twin": new["rows.F32"]})
    write_safetensors(target / "none.safetensors", {})
    manifest = make_delta(base, target, tmp_path / "delta", chunk_bytes=4096)
    conversions = [entry for entry in manifest.tensors if "é" in entry.name]
    assert len(conversions) == 16
    assert all(entry.shared_bytes and not entry.changed for entry in conversions)
    independent_reader.rebuild(tmp_path / "delta", base, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(target)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(["BF16", "F4", "F6_E2M3", "U8", "F64", "F2_SOON", 'a"b']),
            st.lists(st.integers(0, 1 << 40), max_size=4),
        ),
        max_size=4,
    )
)
def test_both_readers_expect_the_same_header(tensors: dict[str, tuple[str, list[int]]]) -> None:
    entries = [
        TensorEntry(name, "a", dtype, tuple(shape), "added", None, 0, 0, 0)
        for name, (dtype, shape) in tensors.items()
    ]
    fields = [{"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape)} for entry in entries]
    assert usual_header(entries, 1 << 200) == independent_reader.usual_header(fields, 1 << 200)


def test_independent_reader_decodes_every_method(tmp_path: Path) -> None:
    """Floats of every dtype that moved much, little, here and there, decayed or are new; integers; bytes."""
    base, target = tmp_path / "base", tmp_path / "target"
    rng = np.random.default_rng(6)
    old, new = {}, {}
    for dtype, form in independent_reader.FLOATS.items():
        count = 20_001 * (2 if dtype == "C64" else 1)
        shape = (20_001,)
        for update in (1e-6, 1e-4, 1e-2, 1.0):
            before, after = fine_tune(dtype, count, update, seed=7)
            old[f"{dtype}.{update}"] = Array(dtype, shape, before.tobytes())
            new[f"{dtype}.{update}"] = Array(dtype, shape, after.tobytes())
        new[f"{dtype}.new"] = Array(dtype, shape, after.tobytes())
        rare = before.copy().view(f"<u{form.width}")
        rare[rng.choice(count, count // 1000, replace=False)] ^= rare.dtype.type(3)
        rows = np.where(np.arange(count) // 5000 % 2, after.view(rare.dtype), before.view(rare.dtype))
        for name, data in (("rare", rare), ("rows", rows)):
            old[f"{dtype}.{name}"] = Array(dtype, shape, before.tobytes())
            new[f"{dtype}.{name}"] = Array(dtype, shape, data.tobytes())
    for dtype, width in independent_reader.WORDS.items():
        integers = rng.integers(0, 1 << 14, 5000).astype(f"<u{width}")
        steps = rng.integers(-2, 3, 5000).astype(integers.dtype)
        bits = rng.integers(0, 2, 5000).astype(integers.dtype) << integers.dtype.type(8 * width - 1)
        for name, data in (("step", integers + steps), ("bits", integers ^ bits), ("else", steps)):
            old[f"{dtype}.{name}"] = Array(dtype, (5000,), integers.tobytes())
            new[f"{dtype}.{name}"] = Array(dtype, (5000,), data.tobytes())
    for name, text in (("text", b"the same again and again; " * 500), ("noise", rng.bytes(5000))):
        old[f"U8.{name}"] = new[f"added.{name}"] = Array("U8", (len(text),), text)
        new[f"U8.{name}"] = Array("U8", (len(text),), text[::-1])
    for dtype, moved in (("F32", 0.0), ("F32", 0.01), ("C64", 0.2)):
        name, shape = f"{dtype}.decayed.{moved}", (20_000 // (2 if dtype == "C64" else 1),)
        before, after = decayed(20_000, 2e-7, 50, moved)
        old[name], new[name] = (Array(dtype, shape, side.tobytes()) for side in (before, after))
    new["BF16.repeated"] = Array("BF16", (8000,), rng.bytes(1000) * 16)
    write_safetensors(base / "model.safetensors", old)
    write_safetensors(target / "model.safetensors", new)
    make_delta(base, target, tmp_path / "delta")
    methods: set[int] = set()
    with open_recipe(tmp_path / "delta", base) as opened:
        for recipe in opened.shard("model.safetensors").tensors.values():
            methods |= set(recipe.table[0]["method"].tolist())
    assert methods == set(Method)
    independent_reader.rebuild(tmp_path / "delta", base, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(target)


def test_independent_reader_reads_the_frozen_fixtures(tmp_path: Path) -> None:
    folder = ROOT / "tests" / "fixtures" / f"v{FORMAT_VERSION}"
    independent_reader.rebuild(folder / "delta", folder / "base", tmp_path / "out")
    assert digests(tmp_path / "out") == json.loads((folder / "target.json").read_text())


def test_the_family_is_the_document_s() -> None:
    numbers = np.array([independent_reader.family(member)[:100] for member in range(48)], "<u4")
    text = (ROOT / "docs" / "format.md").read_text()
    assert hashlib.sha256(numbers.tobytes()).hexdigest() in text
    assert re.sub(r"\D+", ", ", f"{numbers[10, :5].tolist()}").strip(", ") in " ".join(text.split())


def test_independent_reader_is_independent() -> None:
    tree = ast.parse(Path(independent_reader.__file__).read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f"{'.' * node.level}{node.module}"] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.startswith((".", "deltaweights"))]


@pytest.mark.parametrize("name", ["deltaweights.json", "delta-00001-of-00003.safetensors"])
def test_independent_reader_finds_damage(trio: Trio, tmp_path: Path, name: str) -> None:
    shutil.copytree(trio.delta, tmp_path / "delta")
    data = bytearray((trio.delta / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "delta" / name).write_bytes(data)
    with pytest.raises((independent_reader.BadDeltaError, ValueError)):
        independent_reader.rebuild(tmp_path / "delta", trio.base, tmp_path / "out")
