"""mlx-gptoss pull: download a model into the hub's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .options import ModelName
from .progress import byte_bar

if TYPE_CHECKING:
    from mlx_gptoss.loading.cache import Download


@click.command()
@click.argument("repo", type=ModelName())
@click.option("--dry-run", is_flag=True, help="Only say what would be downloaded.")
def pull(repo: str, dry_run: bool) -> None:
    """Download the model REPO (org/name or org/name@revision) from the Hugging Face hub, and check every file's digest.

    Only the files that loading needs. After an interruption, even kill -9, the same command continues where it stopped.
    """
    from mlx_gptoss.loading import cache
    from mlx_gptoss.loading.hub import NANO_ALIAS, NANO_NAME

    if repo in (NANO_ALIAS, NANO_NAME):
        return click.echo("nano comes with mlx-gptoss: there is nothing to download")
    download = cache.plan_download(repo)
    click.echo(_plan(download), err=True)
    if dry_run:
        return
    cache.require_space(download)
    try:
        with byte_bar("Downloading") as update:
            folder = cache.fetch(download, lambda done, total, name: update(done, total, f"Downloading {name}"))
        with byte_bar("Checking") as update:
            cache.verify(download, lambda done, total, name: update(done, total, f"Checking {name}"))
    except KeyboardInterrupt:
        click.echo("interrupted; the same command continues where it stopped", err=True)
        raise SystemExit(130) from None
    click.echo(folder)


def _plan(download: Download) -> str:
    from mlx_gptoss.loading.memory import gigabytes

    missing, total = download.missing, gigabytes(download.total_bytes)
    if not missing:
        return f"{download.repo}: all {len(download.files)} files, {total}, are here; checking them"
    here = download.total_bytes - download.missing_bytes
    return (
        f"{download.repo}: {gigabytes(download.missing_bytes)} to download"
        f"{f' of {total}, {gigabytes(here)} are here' if here else ''}, "
        f"{len(missing)} of {len(download.files)} files; {gigabytes(download.free_bytes)} are free in "
        f"{download.folder.parent}"
    )
