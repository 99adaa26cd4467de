"""The house rules that a tool does not hold already: sizes, public names, commands, configs.

Not for the import rule (import-linter) nor for style (ruff).
"""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import m2encoder
from m2encoder.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("m2encoder", "eval", "data_pipeline", "tests", "benchmarks")
# A link such as m2encoder/eval is not followed, so each file is here once.
PYTHON_FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LONG_FUNCTIONS_ALLOWED = {("m2encoder/train.py", "pretrain")}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text("utf-8").splitlines()) for p in PYTHON_FILES}
    assert lengths
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    too_long = []
    for path in PYTHON_FILES:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60 and (name, node.name) not in LONG_FUNCTIONS_ALLOWED:
                    too_long.append(f"{name}:{node.lineno} {node.name} has {lines} lines")
    assert too_long == []


def test_every_package_has_an_init_file() -> None:
    """Import-linter does not see a folder without one, and so could not hold the import rule."""
    folders = {path.parent for path in PYTHON_FILES} - {ROOT / "benchmarks"}
    packages = {folder for folder in folders if ROOT / "tests" not in (folder, *folder.parents)}
    assert {folder for folder in packages if not (folder / "__init__.py").is_file()} == set()


def test_model_folder_files_import_each_other_relatively() -> None:
    """They must open in transformers where m2encoder is not installed."""
    strangers = []
    for path in sorted((ROOT / "m2encoder/model").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level < 2:
                names = [] if node.level else [node.module or ""]
            elif isinstance(node, ast.ImportFrom):
                names = ["m2encoder"]
            else:
                continue
            ours = [name for name in names if name.split(".")[0] == "m2encoder"]
            strangers += [f"{path.name}:{node.lineno}" for _ in ours]
    assert strangers == []


def test_public_names_are_frozen() -> None:
    assert m2encoder.__all__ == [
        "load_model",
        "list_models",
        "Encoder",
        "BadItem",
        "ModelInfo",
        "M2Encoder",
        "M2EncoderConfig",
        "Pair",
        "ShardReader",
        "write_shards",
        "M2EncoderError",
        "ConfigError",
        "DataError",
        "CheckpointError",
        "__version__",
    ]


@pytest.mark.parametrize("name", m2encoder.__all__)
def test_public_name_loads_and_is_listed(name: str) -> None:
    assert getattr(m2encoder, name) is not None
    assert name in dir(m2encoder)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = m2encoder.load_modle


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, m2encoder; print(sorted({'torch', 'numpy', 'faiss'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_commands_are_frozen() -> None:
    assert list(COMMANDS) == [
        "demo",
        "pretrain",
        "report",
        "data demo",
        "data index",
        "data verify",
        "tokenizer train",
        "eval retrieval",
        "eval zero-shot",
        "eval suite",
        "eval bilingual",
        "eval fine-grained",
        "eval prompts",
        "eval calibrate",
        "eval probe",
        "eval contamination",
        "eval protocols",
        "eval table",
        "eval compare",
        "eval report",
        "embed",
        "index",
        "index info",
        "index update",
        "index add",
        "index remove",
        "search",
        "convert",
        "models ls",
        "models info",
        "models interpolate",
        "models verify",
        "doctor loss",
        "config list",
        "config cp",
    ]


def test_every_shipped_config_is_a_mapping() -> None:
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    loaded = {path.relative_to(ROOT): yaml.safe_load(path.read_text("utf-8")) for path in paths}
    assert {path for path, config in loaded.items() if not isinstance(config, dict)} == set()


def test_configs_holds_data_and_no_code() -> None:
    assert {p.suffix for p in (ROOT / "configs").rglob("*") if p.is_file()} <= {".yaml", ".sbatch"}


def test_version_is_the_one_to_cite() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == m2encoder.__version__


@pytest.mark.skipif(find_spec("open_clip") is not None, reason="this environment holds the peers")
def test_missing_peer_names_the_extra_to_install() -> None:
    from m2encoder.compat import import_open_clip
    from m2encoder.errors import MissingExtraError

    with pytest.raises(
        MissingExtraError, match=r"open_clip_torch .*pip install 'm2encoder\[towers\]'"
    ):
        import_open_clip()
