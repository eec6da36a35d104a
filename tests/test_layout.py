"""The tree keeps its promises: see docs/design.md, 'Why tokenizers/ is no package'."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

COMMAND_FOLDERS = ("tokenizers", "train", "eval")


def scripts(root):
    return [path for folder in COMMAND_FOLDERS for path in (root / folder).glob("*.py")]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_command_folders_are_no_packages(root):
    for folder in COMMAND_FOLDERS:
        assert not (root / folder / "__init__.py").exists(), (
            f"{folder}/ with an __init__.py becomes a package, and tokenizers/ would hide Hugging Face's of that name"
        )


def test_no_command_hides_a_module(root):
    """A running script's folder comes first on sys.path, so train/random.py would replace the standard library's."""
    for path in scripts(root):
        assert path.stem not in sys.stdlib_module_names, path
        assert importlib.util.find_spec(path.stem) is None, path


def test_the_package_imports_no_command(root):
    for path in (root / "mutor_vision").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & set(COMMAND_FOLDERS), path


def test_types_are_complete_where_others_call(root):
    listed = re.findall(r"automodule:: (\S+)", (root / "docs" / "api.md").read_text())
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["mypy"]
    (strict,) = [each["module"] for each in settings["overrides"] if each.get("disallow_untyped_defs")]
    assert sorted(strict) == sorted(listed)


# Room -> rooms that it may import, in the order of the pipeline: every arrow points up in this table, so there is no
# circle.
# The modules beside the rooms (settings, errors, runtime, ...) are there for all, and import no room.
ROOMS = {
    "storage": set(),
    "data": {"storage"},
    "tokenizer": {"storage", "data"},
    "model": {"storage"},
    "objectives": {"model"},
    "sampling": {"storage", "data", "tokenizer", "model", "objectives"},
    "features": {"storage", "data", "sampling"},
    "metrics": {"storage", "data", "features"},
    "training": {"storage", "data", "tokenizer", "model", "objectives", "sampling", "features", "metrics"},
    "interop": {"storage", "data", "tokenizer", "model", "sampling"},
    "commands": {"storage", "data", "tokenizer", "model", "sampling", "features", "metrics", "training", "interop"},
}
LONGEST = 350  # lines of a module


def rooms_imported(path, package):
    """(room or '' for a module beside the rooms, line) of each import of ours, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mutor_vision":
            parts = node.module.split(".")[1:]
            names = [parts[0]] if parts else [alias.name for alias in node.names]
            yield from ((name if (package / name).is_dir() else "", node.lineno) for name in names)


def test_every_import_points_down(root):
    package, order = root / "mutor_vision", list(ROOMS)
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(ROOMS)
    for room, allowed in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in allowed), "the table itself has a circle"
        for path in (package / room).glob("*.py"):
            for other, line in rooms_imported(path, package):
                assert other in allowed | {room, ""}, f"{path}:{line}: {room} may not import {other}"
    for path in package.glob("*.py"):
        for other, line in rooms_imported(path, package):
            assert not other, f"{path}:{line}: a module beside the rooms is there for all of them, and imports none"


def test_no_two_modules_of_a_room_import_each_other(root):
    """At import time: what a function imports when it is called makes no circle."""
    for room in ROOMS:
        folder = root / "mutor_vision" / room
        known = {path.stem: set() for path in folder.glob("*.py")}
        for path in folder.glob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"mutor_vision.{room}"):
                    tail = node.module.split(".")[2:]
                    known[path.stem] |= {tail[0]} if tail else {alias.name for alias in node.names}
        done = set()
        while ready := {
            name for name, needs in known.items() if name not in done and not (needs & known.keys()) - done
        }:
            done |= ready
        assert done == known.keys(), f"{room}: a circle among {', '.join(sorted(known.keys() - done))}"


def test_what_programs_in_strings_import_exists(root):
    """Tests start programs of their own, some of them on a GPU only, where a name that is gone would be found late."""
    pattern = re.compile(r"^[ \"']*from (mutor_vision[\w.]*) import ([\w, ]+)", re.MULTILINE)
    found = 0
    for folder in ("tests", "benchmarks", "experiments"):
        for path in (root / folder).glob("*.py"):
            for module, names in pattern.findall(path.read_text()):
                for name in re.sub(r" as \w+", "", names).split(","):
                    if name.strip() and not hasattr(importlib.import_module(module), name.strip()):
                        importlib.import_module(f"{module}.{name.strip()}")
                    found += 1
    assert found > 200


def test_modules_are_short(root):
    for path in (root / "mutor_vision").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= LONGEST, path


def test_the_transformer_and_the_registers_do_not_know_each_other(root):
    package = root / "mutor_vision"
    assert "mutor_vision.objectives.registers" not in set(imports_of(package / "model" / "transformer.py"))
    assert "mutor_vision.model.transformer" not in set(imports_of(package / "objectives" / "registers.py"))


def test_importing_the_package_imports_nothing_heavy(root):
    code = ("import mutor_vision, sys; "
            "print(*(m for m in ('torch', 'timm', 'diffusers', 'torch_fidelity') if m in sys.modules))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


def test_training_needs_neither_diffusers_nor_torch_fidelity():
    code = ("import mutor_vision.training.loop, sys; "
            "print(*(m for m in ('diffusers', 'torch_fidelity', 'transformers') if m in sys.modules))")  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip() == "", result.stdout


def test_hugging_faces_tokenizers_is_importable_at_the_root(root):
    found = subprocess.run([sys.executable, "-c", "import tokenizers; print(tokenizers.__file__)"], cwd="/",
                           capture_output=True, text=True)  # fmt: skip
    if found.returncode:
        pytest.skip("Hugging Face's tokenizers is not installed")
    result = subprocess.run([sys.executable, "-c", "from tokenizers import Tokenizer"], cwd=root, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()


def test_a_wheel_holds_the_package_alone(root, tmp_path):
    # Built by the setuptools that is here (torch requires it): no download, and half the interpreters.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
               "--wheel-dir", str(tmp_path), str(root)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mutor_vision/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert "mutor_vision" in tops and all(top == "mutor_vision" or top.endswith(".dist-info") for top in tops)


# Tests of files, processes and doors, whose numbers are tested elsewhere: they are not run again without fast paths.
OF_FILES = set(
    """catalogue catalogue_checkpoints catalogue_images catalogue_scores catalogue_settings commands crash_points damage
    doors fuzz gpu hostile killed_jobs layout lock lost_process meeting multi_node preemption skip_bad""".split()
)


def test_the_pass_without_fast_paths_has_every_test_that_may_take_one(root):
    """Makefile's PLAIN: what imports the transformer or what uses it, or takes a run of it."""
    uses = re.compile(r"mutor_vision\.(model|sampling|training|objectives)|trained_run")
    listed = re.search(r"^PLAIN := .*?\.py,(.*?)\)\)$", (root / "Makefile").read_text(), re.M | re.S)[1]
    listed = set(listed.replace("\\", " ").split())
    found = {path.stem.removeprefix("test_") for path in (root / "tests").glob("test_*.py")
             if uses.search(path.read_text())}  # fmt: skip
    assert listed == found - OF_FILES, "edit PLAIN in the Makefile"
