"""No pickle, no shell, nothing outside its directory, no secret written down."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.project import ROOT, Project

PACKAGES = ("surgeon", "tasks", "flows", "benchmarks")
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUN_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
SAFE_LOADER = "_Loader"
LOAD_PICKLES = {"torch.load", "torch.save", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def dotted(node: ast.AST) -> str:
    """The name of what is called, such as "torch.load"; methods of things other than modules end up as ".load"."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            loaders = [dotted(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"]
            if name in RUN_TEXT | LOAD_PICKLES and loaders != [SAFE_LOADER]:
                yield name
            for keyword in node.keywords:
                is_true = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                if keyword.arg in ("shell", "allow_pickle") and is_true:
                    yield f"{name}({keyword.arg})"


def test_no_pickle_no_shell_no_code_from_text() -> None:
    files = sources()
    assert len(files) > 100
    assert {str(f.relative_to(ROOT)): found for f in files if (found := list(dangers(f.read_text())))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load('x')",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=wanted)",
        "eval('1')",
        "yaml.load(text)",
    ],
)
def test_the_scan_finds(line: str) -> None:
    assert list(dangers(line))


def test_the_scan_leaves_alone() -> None:
    harmless = "np.load('x', allow_pickle=False)\nmodel.eval()\nre.compile('x')\nstore.load()\nyaml.safe_load(text)\n"
    assert list(dangers(harmless)) == []


def test_code_of_models_is_off_unless_asked_for() -> None:
    from flows.params import Params

    assert Params().model.trust_remote_code is False
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not isinstance(node.value, ast.Constant) or node.value.value is False, path


SECRETS = {
    "HF_TOKEN": "hf_kept5secretA",
    "HUGGING_FACE_HUB_TOKEN": "hf_kept5secretB",
    "AWS_ACCESS_KEY_ID": "AKIAkept5secretC",
    "AWS_SECRET_ACCESS_KEY": "kept5secretD",
    "AWS_SESSION_TOKEN": "kept5secretE",
    "PREFECT_API_KEY": "kept5secretF",
}


@pytest.fixture(scope="module")
def with_secrets(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after a run with secrets in the environment."""
    project = Project(tmp_path_factory.mktemp("secrets") / "project", params)
    done = project.surgeon("run", **SECRETS).ok()
    failed = project.surgeon("run", "-S", "model.source=nobody/nothing", **SECRETS)
    assert failed.status == 2
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr):
        assert "kept5secret" not in text
    return project


def files_of(project: Project) -> list[Path]:
    files = [path for path in project.root.rglob("*") if path.is_file()]
    assert len(files) > 200
    return files


def test_secrets_are_nowhere(with_secrets: Project) -> None:
    """Not in keys, records, manifests, metrics, the model card or the report."""
    assert [path for path in files_of(with_secrets) if b"kept5secret" in path.read_bytes()] == []


def test_nothing_written_is_a_pickle(with_secrets: Project) -> None:
    """Neither by name nor by its first bytes, protocols 2 to 5."""
    for path in files_of(with_secrets):
        if path.name.isdecimal():
            continue  # a chunk of numbers may begin with any bytes, and is only ever read as numbers
        start = path.read_bytes()[:2]
        assert not (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")), path
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"), path


@pytest.mark.parametrize("name", ["../../outside", "/etc", "shot-01/../../outside"])
def test_a_manifest_cannot_name_what_is_outside(again: Project, name: str) -> None:
    """It may come from a remote; what it names is taken from the view or not at all."""
    manifest = again.data / "manifest.json"
    names = json.loads(manifest.read_text())
    names[name] = names.pop("shot-01/mask")
    manifest.write_text(json.dumps(names))
    done = again.surgeon("restore")
    assert done.status == 2
    assert "Traceback" not in done.stderr
    assert name in done.stderr


def test_parameter_files_are_data() -> None:
    import yaml

    from flows import params_yaml

    assert issubclass(getattr(params_yaml, SAFE_LOADER), yaml.SafeLoader)
