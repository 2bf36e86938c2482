"""mlx-gptoss rm: remove a downloaded model."""

from __future__ import annotations

import sys

import click

from .options import ModelName


@click.command()
@click.argument("repo", type=ModelName())
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def rm(repo: str, yes: bool) -> None:
    """Remove the model REPO (org/name), all its revisions, from the hub's cache. Other programs use that cache, too.

    Folders outside the cache, such as converted models, are never touched.
    """
    from pathlib import Path

    from mlx_gptoss.errors import GptOssError
    from mlx_gptoss.loading import cache, hub
    from mlx_gptoss.loading.memory import gigabytes

    if repo in (hub.NANO_ALIAS, hub.NANO_NAME):
        raise GptOssError("nano is a part of mlx-gptoss and cannot be removed")
    if "/" not in repo or Path(repo).expanduser().is_absolute() or repo.startswith("."):
        raise GptOssError(f"{repo} is not a hub id such as openai/gpt-oss-20b; remove a folder yourself")
    removal = cache.plan_removal(repo)
    revisions = f", {len(removal.revisions)} revisions" if len(removal.revisions) > 1 else ""
    what = f"{repo}, {gigabytes(removal.size_bytes)}{revisions}, from {removal.folder.parent}"
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("there is no terminal to ask on; give --yes to remove it")
        if not click.confirm(f"Remove {what}?", err=True):
            click.echo("nothing was removed", err=True)
            raise SystemExit(1)
    removal.execute()
    click.echo(f"Removed {what}")
