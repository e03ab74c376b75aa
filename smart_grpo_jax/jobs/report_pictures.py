"""Pictures of the report: data URIs for the page, and the before/after sheet for a README."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs.report_folder import Stored, Story, Walk

PIXEL_ART = 96
"""Pictures up to this side are enlarged without smoothing, and stored as they are."""
LARGEST = 288
"""Side to which larger pictures are shrunk before they are put into the page."""
RIGHT = 0.5
"""Strict scores are 0 or 1."""

TILE, GAP, MARGIN, CAPTION, COLUMNS = 128, 8, 84, 62, 8
GREEN, ORANGE, INK = (0, 120, 90), (191, 74, 0), (30, 37, 48)


def uri(picture: np.ndarray) -> str:
    """A picture [H,W,3] as a data URI: PNG, or JPEG where it had to be shrunk."""
    image = Image.fromarray(np.asarray(picture, np.uint8))
    buffer = io.BytesIO()
    if max(image.size) <= PIXEL_ART:
        image.save(buffer, format="PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def img(picture: np.ndarray, alt: str) -> str:
    """The `<img>` of a picture."""
    kind = ' class="pixels"' if max(picture.shape[:2]) <= PIXEL_ART else ""
    height, width = picture.shape[:2]
    said = html.escape(alt, quote=True)
    return f'<img{kind} width="{width}" height="{height}" src="{uri(picture)}" alt="{said}">'


def is_right(stored: Stored, index: int) -> bool | None:
    """Whether the shown picture of a prompt is right; None where nothing says so."""
    name = stored.strict()
    value = stored.scores[name][index, 0] if name else np.nan
    return bool(value > RIGHT) if np.isfinite(value) else None


MARKS = {
    True: '<span class="right" role="img" aria-label="right">✓</span>',
    False: '<span class="wrong" role="img" aria-label="wrong">✗</span>',
    None: "",
}


def shot(stored: Stored, index: int, label: str) -> str:
    """One picture with its label and its mark."""
    picture = img(stored.images[index], f"{label}: {stored.prompts[index]}")
    mark = MARKS[is_right(stored, index)]
    return f"<figure>{picture}<figcaption><span>{label}</span>{mark}</figcaption></figure>"


def pair(base: Stored, tuned: Stored | None, index: int, score: str = "") -> str:
    """A list item: the prompt, under its picture before and after where both are stored."""
    shown = index < len(base.images) and (tuned is None or index < len(tuned.images))
    shots = ""
    if shown:
        after = shot(tuned, index, "after") if tuned is not None else ""
        shots = f'<div class="shots">{shot(base, index, "before")}{after}</div>'
    line = f'<p class="score">{html.escape(score)}</p>' if score else ""
    return f'<li>{shots}<p class="prompt">{html.escape(base.prompts[index])}</p>{line}</li>'


def walk_table(walk: Walk) -> str:
    """The one-step decodes as a table: a column per time, two rows per prompt."""
    head = "".join(f'<th scope="col">t = {float(t):.2f}</th>' for t in walk.times)
    body = []
    for p, prompt in enumerate(walk.prompts):
        said = html.escape(prompt)
        body.append(f'<tr><th scope="rowgroup" colspan="{len(walk.times) + 1}"><span>{said}</span></th></tr>')
        for label, pictures in (("plain", walk.plain), ("searched", walk.searched)):
            cells = "".join(
                f"<td>{img(pictures[j, p], f'{prompt}, {label}, t = {float(t):.2f}')}</td>"
                for j, t in enumerate(walk.times)
            )
            body.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="One-step decodes along the rollout">'
        f'<table class="walk"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def before_after(story: Story) -> Image.Image:
    """The first prompts on equal noise: 2 rows (base, tuned) × 8 columns, with prompts and marks.

    The first, not the best: evaluation prompts are in random order, so these are a fair sample.
    """
    found = story.pair()
    if found is None:
        raise UserError(
            f"{story.name}: got {len(story.evaluations)} evaluation, wanted epoch 0 and a later one"
        )
    base, tuned = found
    columns = min(COLUMNS, len(base.images), len(tuned.images))
    width = MARGIN + columns * (TILE + GAP)
    sheet = Image.new("RGB", (width, CAPTION + 2 * (TILE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i in range(columns):
        x = MARGIN + i * (TILE + GAP)
        words = "\n".join(textwrap.wrap(_short(base.prompts[i]), 20, max_lines=3, placeholder=" …"))
        draw.multiline_text((x, CAPTION - 8), words, INK, font, anchor="ld", spacing=3)
        for row, stored in enumerate((base, tuned)):
            y = CAPTION + row * (TILE + GAP)
            sheet.paste(_tile(stored.images[i]), (x, y))
            _draw_mark(draw, x + TILE - 24, y + TILE - 24, is_right(stored, i))
    for row, label in enumerate(("before", f"after {tuned.epoch}\nepochs")):
        y = CAPTION + row * (TILE + GAP) + TILE // 2
        draw.multiline_text((GAP, y), label, INK, ImageFont.load_default(15), anchor="lm", spacing=3)
    return sheet


def _short(prompt: str) -> str:
    return prompt.removeprefix("a photo of ")


def _tile(picture: np.ndarray) -> Image.Image:
    method = Image.Resampling.NEAREST if max(picture.shape[:2]) <= PIXEL_ART else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize((TILE, TILE), method)


def _draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool | None) -> None:
    """A tick or a cross on a disc; drawn, because fonts differ."""
    if right is None:
        return
    strokes: Sequence[Sequence[tuple[int, int]]] = (
        [[(x + 5, y + 11), (x + 9, y + 15), (x + 16, y + 6)]]
        if right
        else [[(x + 6, y + 6), (x + 14, y + 14)], [(x + 14, y + 6), (x + 6, y + 14)]]
    )
    draw.ellipse((x, y, x + 20, y + 20), fill=GREEN if right else ORANGE, outline="white")
    for stroke in strokes:
        draw.line(stroke, fill="white", width=3, joint="curve")
