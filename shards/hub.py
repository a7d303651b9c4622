"""Dataset repos of the Hugging Face Hub: files are uploaded ahead, one commit on top of the known one
publishes all of them, so readers see one dataset or the other; who pins a commit keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shards.errors import ShardError
from shards.location import HubRepo, Location, failing, locate, read_manifest
from shards.parallel import Work
from shards.stores import AGAIN, Upload, bytes_of, lost_race

BATCH = 32
"""Files asked about and uploaded together."""
_KIND = "dataset"


def pinned(repo: HubRepo) -> HubRepo:
    """The repo at the commit its revision stands for now. Raises: ShardError: no such repo or revision."""
    with failing(f"cannot reach {repo.url}", _or_folder(repo)), _known(repo):
        info = HfApi().repo_info(repo.name, repo_type=_KIND, revision=repo.revision)
    return HubRepo(repo.name, str(info.sha))


def _or_folder(repo: HubRepo) -> str:
    """OWNER/NAME may have been meant as a path whose folder is not there."""
    return f"try again later; if a folder was meant, write ./{repo.name}"


class HubStore:
    """A dataset repo, made if it is missing.

    Args:
        private: whether a repo made here can be seen by its owner alone.
    """

    def __init__(self, location: Location, *, private: bool) -> None:
        if location.hub is None:
            raise ValueError("not a dataset repo")
        self.location, self.repo = location, location.hub
        self._private = private
        self._api = HfApi()
        self._head: str | None = None
        self._there: dict[str, Any] = {}
        self._adds: list[CommitOperationAdd] = []

    def close(self) -> None:
        """Nothing is held."""

    def published(self) -> bytes | None:
        try:
            with failing(f"cannot reach {self.repo.url}", _or_folder(self.repo)):
                self._look()
        except ShardError as e:
            # Whether it is missing or hidden is not told; making it decides.
            if not isinstance(e.__cause__, RepositoryNotFoundError) or isinstance(
                e.__cause__, GatedRepoError
            ):
                raise
            with failing(f"cannot make {self.repo.url}", "log in (hf auth login) as one who may"):
                self._api.create_repo(self.repo.name, repo_type=_KIND, private=self._private, exist_ok=True)
                self._look()
        return read_manifest(locate(HubRepo(self.repo.name, self._head).url))

    def send(self, files: Sequence[Upload], work: Work) -> Iterator[int]:
        batches = [files[i : i + BATCH] for i in range(0, len(files), BATCH)]
        with failing(f"cannot upload to {self.repo.url}", AGAIN):
            # One batch after the other: inside, the hub's client works in parallel.
            for _, sent in work.each(lambda batch: self._send(batch, work), batches, 1):
                yield from sent

    def publish(
        self, manifest: Upload, records: Sequence[Upload], card: Upload, dropped: Sequence[str]
    ) -> str | None:
        texts = [CommitOperationAdd(f.name, bytes_of(f)) for f in (*records, card, manifest)]
        gone = [CommitOperationDelete(name) for name in dropped if name in self._there]
        with failing(f"cannot publish {self.repo.url}", AGAIN):
            try:
                commit = self._api.create_commit(
                    self.repo.name,
                    [*self._adds, *texts, *gone],
                    commit_message=f"tide push: {len(self._adds)} new shards",
                    repo_type=_KIND,
                    revision=self.repo.revision,
                    parent_commit=self._head,
                )
            except HfHubHTTPError as e:
                if e.response is not None and e.response.status_code in (409, 412):
                    raise lost_race(self.location) from e
                raise
        return str(commit.oid)

    def _look(self) -> None:
        """Note the commit readers see now, and its files."""
        with _known(self.repo):
            info = self._api.repo_info(self.repo.name, repo_type=_KIND, revision=self.repo.revision)
            self._head = info.sha
            tree = self._api.list_repo_tree(
                self.repo.name, recursive=True, repo_type=_KIND, revision=info.sha
            )
            self._there = {entry.path: entry for entry in tree}

    def _send(self, files: Sequence[Upload], work: Work) -> list[int]:
        missing = [f for f in files if not self._holds(f)]
        adds = [CommitOperationAdd(f.name, str(f.content)) for f in missing]
        for add, file in zip(adds, missing):
            add.upload_info.sha256 = bytes.fromhex(file.sha256)
        if adds:
            self._api.preupload_lfs_files(
                self.repo.name, adds, repo_type=_KIND, revision=self.repo.revision, num_threads=4
            )
            self._adds += adds
        work.add(sum(f.size for f in files))
        return [f.size if f in missing else 0 for f in files]

    def _holds(self, file: Upload) -> bool:
        lfs = getattr(self._there.get(file.name), "lfs", None)
        return lfs is not None and lfs.size == file.size and lfs.sha256 == file.sha256


@contextmanager
def _known(repo: HubRepo) -> Iterator[None]:
    """Say what the hub's refusals mean."""
    try:
        yield
    except GatedRepoError as e:
        raise ShardError(
            f"{repo.url} is gated: accept its terms on the page of {repo.name}, then log in (hf auth login)"
        ) from e
    except RepositoryNotFoundError as e:
        raise ShardError(
            f"{repo.url}: no dataset repo that you may see: check the name, or log in (hf auth login)"
        ) from e
    except RevisionNotFoundError as e:
        raise ShardError(f"{repo.url}: no such branch, tag or commit in {repo.name}") from e
