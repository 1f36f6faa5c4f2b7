"""``sgl-vlm convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Checkpoint of an InternVLChatModel: a directory or a hub id.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to write; a stopped run is taken up.")
    ],
    image_token_id: Annotated[
        int | None, typer.Option(help="The id of <IMG_CONTEXT>, where IN has no tokenizer.")
    ] = None,
) -> None:
    """Write InternVL2, 2.5 or 3 in their research code's format as a transformers checkpoint: the same
    weights, no remote code."""
    from sgl_runtime import convert as conversion

    conversion.convert(source, out, image_token_id=image_token_id)
    typer.echo(f"Wrote {out}.")
