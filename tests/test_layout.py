"""The tree keeps its promises: see docs/design.md, 'Why tokenizers/ is no package'."""

import ast
import importlib.util
import subprocess
import sys
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


def test_the_transformer_and_the_registers_do_not_know_each_other(root):
    package = root / "mutor_vision"
    assert "mutor_vision.objectives.registers" not in set(imports_of(package / "transformer.py"))
    assert "mutor_vision.model.transformer" not in set(imports_of(package / "registers.py"))


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
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert "mutor_vision" in tops and all(top == "mutor_vision" or top.endswith(".dist-info") for top in tops)
