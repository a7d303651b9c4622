"""S3 buckets: every object is uploaded with its sha256, which the store checks and tells afterwards, and the
manifest on the condition that it is still the one that was looked at."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

from shards.errors import ShardError
from shards.location import Location, failing, read_manifest
from shards.manifest import MANIFEST
from shards.parallel import Work
from shards.stores import AGAIN, Upload, lost_race


class S3Store:
    """A bucket, or a folder in one, of S3 or what speaks its language."""

    workers = 8

    def __init__(self, location: Location) -> None:
        self.location = location
        self._bucket, _, prefix = location.root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._before: tuple[bytes, str] | None = None

    def close(self) -> None:
        """Nothing is held."""

    def published(self) -> bytes | None:
        with failing(f"cannot read {self.location.url}"):
            try:
                tag = self._call("head_object", MANIFEST)["ETag"]
            except FileNotFoundError:
                self._before = None
                return None
            data = read_manifest(self.location)
        if data is None:
            raise lost_race(self.location)
        self._before = data, tag
        return data

    def send(self, files: Sequence[Upload], work: Work) -> Iterator[int]:
        with failing(f"cannot write to {self.location.url}", AGAIN):
            for _, sent in work.each(lambda file: self._send(file, work), files, self.workers):
                yield sent

    def publish(
        self, manifest: Upload, records: Sequence[Upload], card: Upload, dropped: Sequence[str]
    ) -> str | None:
        quiet = Work(0)
        for _ in self.send(records, quiet):
            pass
        condition = {"IfMatch": self._before[1]} if self._before else {"IfNoneMatch": "*"}
        with failing(f"cannot publish {self.location.url}", AGAIN):
            try:
                tag = self._put(manifest, **condition)
            except OSError as e:
                if not _refused(e):
                    raise
                # A request that was answered too late is repeated by the library, and then meets itself.
                self.location.fs.invalidate_cache()
                if read_manifest(self.location) != manifest.content:
                    raise lost_race(self.location) from e
                tag = self._call("head_object", MANIFEST)["ETag"]
        for _ in self.send([card], quiet):
            pass
        return str(tag).strip('"')

    def _send(self, file: Upload, work: Work) -> int:
        missing = not self._holds(file)
        if missing:
            self._put(file)
            if not self._holds(file, trust_size=True):
                raise ShardError(
                    f"{self.location.url}/{file.name} is not what was sent: another size or checksum is "
                    "there; run the same push again"
                )
        work.add(file.size)
        return file.size if missing else 0

    def _holds(self, file: Upload, *, trust_size: bool = False) -> bool:
        """Whether the object is there. Without a stored checksum, `trust_size` decides."""
        try:
            head = self._call("head_object", file.name, ChecksumMode="ENABLED")
        except FileNotFoundError:
            return False
        found = head.get("ChecksumSHA256")
        return head["ContentLength"] == file.size and (
            trust_size if found is None else found == _base64(file)
        )

    def _put(self, file: Upload, **condition: str) -> str:
        arguments = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _base64(file), **condition}
        if isinstance(file.content, bytes):
            return str(self._call("put_object", file.name, Body=file.content, **arguments)["ETag"])
        with open(file.content, "rb") as body:
            return str(self._call("put_object", file.name, Body=body, **arguments)["ETag"])

    def _call(self, method: str, name: str, **arguments: Any) -> Any:
        return self.location.fs.call_s3(method, Bucket=self._bucket, Key=self._prefix + name, **arguments)


def _base64(file: Upload) -> str:
    return base64.b64encode(bytes.fromhex(file.sha256)).decode()


def _refused(e: OSError) -> bool:
    """Whether S3 refused a write because its condition does not hold."""
    response = getattr(e.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return isinstance(e, FileExistsError) or code in (
        "PreconditionFailed",
        "ConditionalRequestConflict",
        "412",
    )
