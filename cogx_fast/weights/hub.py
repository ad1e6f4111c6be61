"""The Hugging Face hub: the files of one transformer, through huggingface_hub's own cache."""

from __future__ import annotations

import os
from pathlib import Path

from cogx_fast.weights.errors import CheckpointError, CheckpointNotFoundError


def download(
    hub_id: str,
    patterns: list[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local: bool = False,
) -> Path:
    """The cached copy of a hub repository; files of it that the cache lacks are downloaded.

    Args:
        hub_id: ``owner/name``.
        patterns: the files to ask for.
        revision: branch, tag or commit.
        cache_dir: another cache than huggingface_hub's own.
        local: look in the cache only.

    Raises:
        CheckpointNotFoundError: there is no such repository, or it cannot be reached and is not in the cache.
        CheckpointError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{hub_id}: no such file or directory, and to look for it on the hub huggingface_hub is needed: "
            "pip install 'cogx-fast[hub]'"
        ) from None
    transport = errors.HfHubHTTPError.__bases__  # the HTTP library's errors, whichever one the version uses
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, cache_dir=cache_dir, local_files_only=local, allow_patterns=patterns
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointNotFoundError(
            f"{hub_id}: access must be granted on the hub first; then log in with `hf auth login` ({_line(error)})"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointNotFoundError(
            f"{hub_id}: no such directory here, and no such repository or revision ({revision or 'main'}) on the hub: "
            f"check the spelling, or log in if it is private ({_line(error)})"
        ) from None
    except (*transport, errors.HFValidationError, OSError) as error:
        state = "local_files_only=True" if local else "the hub cannot be reached"
        raise CheckpointNotFoundError(
            f"{hub_id}: no such directory here, not in the hub's cache, and {state}: go online once to download it "
            f"(`hf download {hub_id} --include 'transformer/*'`), set cache_dir to where it is, or give a directory "
            f"({_line(error)})"
        ) from None


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


__all__ = ["download"]
