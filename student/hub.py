"""Push a finished student to the Hugging Face Hub: the model folder, without the run's checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shards.errors import TideError, UsageError

LEFT_HERE = ("checkpoint-*", "best/*", "best.part/*", "runs/*", "*.bin", "*.yaml")
"""What stays on this machine: states to resume from, the other student, logs, options with their paths."""


def check_push(repo: str) -> None:
    """Ask, before training, whether the push afterwards can work.

    Raises:
        UsageError: not OWNER/NAME, or nobody is logged in. TideError: the hub does not answer.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"--push-to must be OWNER/NAME, got {repo!r}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    unreachable: Any = (OSError, RuntimeError, *HfHubHTTPError.__bases__)  # the HTTP library's own last
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as e:
        raise UsageError(
            f"--push-to {repo}: not logged in; run hf auth login, or set HF_TOKEN to a token that may write"
        ) from e
    except HfHubHTTPError as e:
        raise UsageError(f"--push-to {repo}: the hub refused the token ({_reason(e)}); log in again") from e
    except unreachable as e:
        raise TideError(f"--push-to {repo}: the hub cannot be reached ({_reason(e)}); leave it out") from e


def push_student(folder: Path, repo: str) -> str:
    """Upload a run's student; returns where it is. The repository is made, private, if it does not exist.

    Raises:
        TideError: the hub refuses or cannot be reached; the folder is complete and can be pushed later.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    failures: Any = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=list(LEFT_HERE),
            commit_message="Student trained by tide",
        )
    except failures as e:
        raise TideError(
            f"--push-to {repo}: the upload failed ({_reason(e)}); the student is complete in {folder}: the "
            "same command with --resume pushes it again"
        ) from e
    return str(commit)


def _reason(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
