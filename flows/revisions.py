"""Versions of a workspace that git and DVC know: branches, tags and experiments, and the JSON files of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import StoreError

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Revision:
    """One version.

    Attributes:
        name: of the branch, tag or experiment, or several.
        files: text of every JSON file below `data` that DVC tracks in it, by path, as far as it is in the local cache.
        missing: what is not there, in words; empty if nothing is missing.
    """

    name: str
    files: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def revisions(home: Path) -> Iterator[Revision]:
    """All branches, tags and experiments of the workspace's repository; none if DVC does not know it.

    Nothing is fetched from a remote.
    """
    with _repository(home) as repo:
        if repo is None or not _has_git(repo):
            return
        data = f"{home.relative_to(Path(repo.root_dir).resolve()).as_posix()}/data/".removeprefix("./")
        experiments = _experiment_names(repo)
        names = repo.brancher(all_branches=True, all_tags=True, all_experiments=True, workspace=False)
        texts: dict[str, str] = {}
        for name in names:
            yield _read_revision(repo, experiments.get(name, name), data, texts)


def experiment_folders(home: Path) -> list[Path]:
    """Where experiments of this workspace are at work in directories of their own, or were left by a killed one."""
    with _repository(home) as repo:
        if repo is None or repo.tmp_dir is None:
            return []
        folder, inside = Path(repo.tmp_dir) / "exps", home.relative_to(Path(repo.root_dir).resolve())
        inner = [*folder.glob("*/.dvc"), *folder.glob("standalone/*/.dvc")]
        return sorted(path.parent / inside for path in inner)


@contextmanager
def _repository(home: Path) -> Iterator["Repo | None"]:
    if not any((folder / ".dvc").is_dir() for folder in (home, *home.parents)):
        yield None  # without importing DVC, which takes a second
        return
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    try:
        with Repo(str(home)) as repo:
            yield repo
    except NotDvcRepoError:
        yield None
    except DvcException as error:
        raise StoreError(f"DVC cannot say which versions of {home} there are: {error}") from error


def _has_git(repo: "Repo") -> bool:
    from dvc.scm import NoSCM

    return not isinstance(repo.scm, NoSCM)


def _experiment_names(repo: "Repo") -> dict[str, str]:
    """Commit of each experiment → its name."""
    from dvc.repo.experiments.utils import exp_refs

    return {str(repo.scm.get_ref(str(ref))): f"experiment {ref.name}" for ref in exp_refs(repo.scm)}


def _read_revision(repo: "Repo", name: str, data: str, texts: dict[str, str]) -> Revision:
    """Reads the JSON files of the version that the repository is switched to; texts are kept by their hash."""
    from dvc.exceptions import DvcException

    files, missing = {}, []
    try:
        outs: list[Any] = list(repo.index.outs)
    except DvcException as error:
        return Revision(name, {}, f"its pipeline cannot be read: {error}")
    for out in outs:
        path = repo.fs.relpath(out.fs_path, repo.root_dir).replace("\\", "/")
        oid = out.hash_info.value
        if not (path.startswith(data) and path.endswith(".json") and out.use_cache and oid):
            continue
        if oid not in texts and (text := _cached(out.cache, oid)) is not None:
            texts[oid] = text
        if oid in texts:
            files[path] = texts[oid]
        else:
            missing.append(path)
    return Revision(name, files, f"{', '.join(missing)} not in DVC's cache" if missing else "")


def _cached(cache: Any, oid: str) -> str | None:
    """A file of DVC's local cache; None if it is not there."""
    path = cache.oid_to_path(oid)
    if not cache.fs.exists(path):
        return None
    with cache.fs.open(path, encoding="utf-8") as file:
        return str(file.read())
