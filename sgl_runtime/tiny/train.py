"""Train one VLM of the tiny pair from scratch: its vision tower first, then its language model on top.

    python -m sgl_runtime.tiny.train large vision
    python -m sgl_runtime.tiny.train large language

The vision tower learns from throwaway heads that name the shape under the patches near each label's centre,
in crowded scenes. The language model then learns to continue questions and answers, with the tower frozen;
attention is never supervised. A second loss pulls the projection of a patch near a label towards the
embeddings of the four words that describe it. Training starts with few visual tokens, those near labels among
them (``--visual-tokens``), and ends with all. Every step's scenes follow from the step number, so a stopped
run goes on where it was.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration

from sgl_runtime.files import whole_file

from . import recipe
from .scenes import COLORS, DIGITS, LETTERS, SHAPES, SIZE, Scene, ask, make_scene

# What one training row asks about one image. The kinds have fixed lengths, so one mask serves every batch.
SLOTS = ("read",) * 6 + ("read two",) * 3 + ("describe",) * 3 + ("count",) * 3
QUESTION_LENGTH = {"read": 4, "read two": 8, "describe": 6, "count": 4}
ANSWER_LENGTH = {"read": 2, "read two": 4, "describe": 2, "count": 1}
VISION_CROWD, VISION_RADIUS = (9, 14), 13  # items a scene; pixels within which a patch is near a label
LANGUAGE_OFFSET = 10_000_000  # the language stage sees scenes that the vision stage did not
IGNORE = -100
SAVE_EVERY = 200  # steps


def pixels(scenes: list[Scene]) -> Tensor:
    """(batch, 3, SIZE, SIZE), normalised as the saved image processor does."""
    stack = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes]))
    return (stack.permute(0, 3, 1, 2).float() / 255 - recipe.MEAN) / recipe.STD


class VisionTask(nn.Module):
    """Names colour, shape, letter and digit under the patches near a label; class 0 is "nothing"."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.classes = [len(COLORS) + 1, len(SHAPES) + 1, len(LETTERS) + 1, len(DIGITS) + 1]
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(self.classes))

    def forward(self, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        device = self.heads.weight.device
        hidden = self.tower(pixel_values=pixels(scenes).to(device)).last_hidden_state[:, 1:]
        logits = self.heads(self.norm(hidden)).float()  # (batch, patches, classes)
        labels = self.labels(scenes).to(device)  # (batch, patches, 4)
        found = labels[..., 0] > 0
        background = F.cross_entropy(logits[~found][:, : self.classes[0]], labels[~found][:, 0])
        parts = logits[found].split(self.classes, dim=-1)
        truth = labels[found].unbind(-1)
        losses = [F.cross_entropy(part, label) for part, label in zip(parts, truth, strict=True)]
        right = [
            (part.argmax(-1) == label).float().mean().item() for part, label in zip(parts, truth, strict=True)
        ]
        names = ("color", "shape", "letter", "digit")
        return sum(losses, background), dict(zip(names, right, strict=True))

    @staticmethod
    def labels(scenes: list[Scene]) -> Tensor:
        centre = torch.arange(recipe.PATCH // 2, SIZE, recipe.PATCH)  # of each row or column of patches
        labels = torch.zeros(len(scenes), len(centre) ** 2, 4, dtype=torch.long)
        for row, scene in enumerate(scenes):
            for item in scene.items:
                near = (centre[:, None] - item.y) ** 2 + (centre[None] - item.x) ** 2 < VISION_RADIUS**2
                labels[row, near.flatten()] = 1 + torch.tensor(
                    [
                        list(COLORS).index(item.color),
                        SHAPES.index(item.shape),
                        LETTERS.index(item.label[0]),
                        DIGITS.index(item.label[1]),
                    ]
                )
        return labels


class LanguageTask(nn.Module):
    """Answers SLOTS questions about each image in one packed row; each question sees the image and itself."""

    model: InternVLForConditionalGeneration
    words: Tensor
    mask: Tensor
    positions: Tensor

    def __init__(
        self, model: InternVLForConditionalGeneration, visual_tokens: int = recipe.VISUAL_TOKENS
    ) -> None:
        super().__init__()
        self.model = model
        self.visual_tokens = visual_tokens
        self.prefix = [recipe.START, _words()("user").input_ids[0], recipe.IMAGE_START]
        self.prefix += [recipe.IMAGE] * visual_tokens + [recipe.IMAGE_END]
        # Each slot: question, <|im_end|> <|im_start|> assistant, answer, <|im_end|>.
        lengths = [QUESTION_LENGTH[kind] + 3 + ANSWER_LENGTH[kind] + 1 for kind in SLOTS]
        owner = torch.cat(
            [torch.zeros(len(self.prefix)), *(torch.full((n,), i + 1.0) for i, n in enumerate(lengths))]
        )
        causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
        visible = (owner[:, None] == owner[None]) | (owner[None] == 0)
        dropped = recipe.VISUAL_TOKENS - visual_tokens
        start = len(self.prefix) + dropped
        positions = [torch.arange(len(self.prefix)), *(torch.arange(start, start + n) for n in lengths)]
        positions[0][-1] += dropped
        mask = torch.zeros(causal.shape).masked_fill(~(causal & visible), -1e9)
        self.register_buffer("words", _words_of_classes(), persistent=False)
        self.register_buffer("mask", mask[None, None], persistent=False)
        self.register_buffer("positions", torch.cat(positions)[None], persistent=False)

    def forward(self, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        device = self.mask.device
        inner = self.model.model
        ids, targets = (t.to(device) for t in self.rows(scenes, rng))
        with torch.no_grad():
            tower = inner.vision_tower(pixel_values=pixels(scenes).to(device)).last_hidden_state[:, 1:]
        labels = VisionTask.labels(scenes)  # (batch, VISUAL_TOKENS, 4)
        shown = self.shown(labels, rng)  # (batch, visual tokens)
        labels = labels.gather(1, shown[..., None].expand(-1, -1, 4)).to(device)
        shown = shown.to(device)
        visual = inner.multi_modal_projector(tower.gather(1, shown[..., None].expand(-1, -1, tower.shape[2])))
        embeddings = inner.language_model.embed_tokens(ids)
        near = labels[..., 0] > 0
        words = self.words[labels[near], torch.arange(4, device=device)]  # (patches near labels, 4)
        meant = inner.language_model.embed_tokens.weight.detach()[words].sum(1) / 2
        align = F.mse_loss(visual[near].float(), meant)
        first = self.prefix.index(recipe.IMAGE)
        tail = embeddings[:, first + self.visual_tokens :]
        positions = self.positions.repeat(len(scenes), 1)
        positions[:, first : first + self.visual_tokens] = first + shown
        embeddings = torch.cat([embeddings[:, :first], visual.to(embeddings.dtype), tail], dim=1)
        hidden = inner.language_model(
            inputs_embeds=embeddings, attention_mask=self.mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        counted = targets != IGNORE
        logits = self.model.lm_head(hidden[counted]).float()
        loss = F.cross_entropy(logits, targets[counted]) + align
        right = torch.ones_like(targets, dtype=torch.bool)
        right[counted] = logits.argmax(-1) == targets[counted]
        return loss, self._accuracy(right, counted)

    def shown(self, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """Which visual tokens are shown, (batch, visual_tokens) ascending: near labels first, then random."""
        order = (labels[..., 0] > 0) + torch.from_numpy(rng.random(labels.shape[:2]))
        return order.topk(self.visual_tokens).indices.sort(1).values

    def rows(self, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and next-token targets, both (batch, row length).

        Questions have targets too. That a letter is followed by the digit it has in the picture is a simpler
        lesson in looking things up than any answer is, and learned first.
        """
        ids, targets = [], []
        for scene in scenes:
            row, goal = list(self.prefix), [IGNORE] * len(self.prefix)
            for kind in SLOTS:
                question = ask(kind, scene.items, rng)
                n, m = QUESTION_LENGTH[kind] + 3, ANSWER_LENGTH[kind]
                if question is None:
                    row += [recipe.PAD] * (n + m + 1)
                    goal += [IGNORE] * (n + m + 1)
                    continue
                slot = [*_words()(question.text).input_ids, recipe.END, recipe.START]
                slot += [*_words()("assistant").input_ids, *_words()(question.answer).input_ids, recipe.END]
                row += slot
                goal += [*slot[1:], IGNORE]
            ids.append(row)
            targets.append(goal)
        return torch.tensor(ids), torch.tensor(targets)

    def _accuracy(self, right: Tensor, counted: Tensor) -> dict[str, float]:
        """Share of questions with every answer token right, by kind (teacher-forced, so an upper bound)."""
        out: dict[str, list[float]] = {}
        place = len(self.prefix)
        for kind in SLOTS:
            answer = place + QUESTION_LENGTH[kind] + 2
            end = answer + ANSWER_LENGTH[kind] + 2
            asked = counted[:, answer]
            out.setdefault(kind, []).extend(right[asked, answer:end].all(1).float().tolist())
            place = end
        return {kind: sum(values) / max(1, len(values)) for kind, values in out.items()}


def _words_of_classes() -> Tensor:
    """Token id of each class of each head of `VisionTask`, (classes + 1, 4); class 0 has none."""
    names = (COLORS, SHAPES, LETTERS, DIGITS)
    table = torch.zeros(len(LETTERS) + 1, 4, dtype=torch.long)
    for column, words in enumerate(names):
        for row, word in enumerate(words, start=1):
            # A digit follows its letter without a space: its token is the second of a label.
            table[row, column] = _words()(f"A{word}" if column == 3 else word).input_ids[-1]
    return table


@functools.cache
def _words() -> Callable:
    tokenizer = recipe.build_tokenizer()
    return functools.cache(lambda text: tokenizer(text))


def fit(task: nn.Module, path: Path, *, steps: int, lr: float, scenes: Callable[[int], list[Scene]]) -> None:
    """AdamW, warm-up, linear decay over the last quarter; a run resumes from its state in ``path``."""
    named = {name: p for name, p in task.named_parameters() if p.requires_grad}
    decay = [p for p in named.values() if p.ndim > 1]
    rest = [p for p in named.values() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    first = _restore(task, optimizer, named, path)
    device = next(iter(named.values())).device.type
    running: dict[str, float] = {}
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=path.stem, mininterval=10)
    for step in bar:
        rate = lr * min(1.0, (step + 1) / 200, 4 * (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, torch.bfloat16):
            loss, metrics = task(scenes(step), np.random.default_rng(step))
        loss.backward()
        nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {"loss": loss.item(), **metrics}.items():
            running[name] = 0.95 * running.get(name, value) + 0.05 * value
        bar.set_postfix({k: f"{v:.3f}" for k, v in running.items()}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(task, optimizer, named, path, step + 1)


def _save(
    task: nn.Module, optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], path: Path, step: int
) -> None:
    state = {f"model.{k}": v.detach().contiguous() for k, v in task.state_dict().items()}
    for name, parameter in named.items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{key}.{name}"] = optimizer.state[parameter][key].contiguous()
    state["step"] = torch.tensor(step)
    with whole_file(path) as partial:
        save_file(state, partial)


def _restore(
    task: nn.Module, optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], path: Path
) -> int:
    if not path.exists():
        return 0
    state = load_file(path)
    step = int(state["step"])
    task.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device),
        }
    return step


def main(
    size: Annotated[Literal["small", "large"], typer.Argument(help="Which of the two VLMs.")],
    stage: Annotated[Literal["vision", "language"], typer.Argument(help="Vision first.")],
    out: Annotated[Path, typer.Option(help="Training states; the finished checkpoint is OUT/SIZE.")] = Path(
        "runs/tiny"
    ),
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    batch: Annotated[int, typer.Option(help="Images a step.", min=1)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    visual_tokens: Annotated[
        int, typer.Option(help="How many the language model is shown.", min=1, max=recipe.VISUAL_TOKENS)
    ] = recipe.VISUAL_TOKENS,
    seed: int = 0,
    compile: Annotated[bool, typer.Option(help="torch.compile the language model.")] = False,
) -> None:
    """Train one stage of one VLM. A stopped run goes on from its last 200th step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    model = recipe.build_model(recipe.SIZES[size])
    model.set_attn_implementation("eager")  # trains faster than SDPA on a CPU at these sizes
    vision = VisionTask(model.model.vision_tower, recipe.SIZES[size].vision_width)
    vision_state = out / f"{size}-vision.safetensors"
    if stage == "vision":

        def crowded(step: int) -> list[Scene]:
            return [make_scene("train", step * batch + i, 0, VISION_CROWD) for i in range(batch)]

        fit(vision.to(device), vision_state, steps=steps, lr=lr, scenes=crowded)
        return
    if not vision_state.exists():
        raise typer.BadParameter(
            f"{vision_state} is missing: run `python -m sgl_runtime.tiny.train {size} vision` first"
        )
    state = load_file(vision_state)
    vision.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    model.model.vision_tower.requires_grad_(False)
    task = LanguageTask(model, visual_tokens).to(device)
    if compile:
        model.model.language_model.compile()

    def fresh(step: int) -> list[Scene]:
        return [make_scene("train", LANGUAGE_OFFSET + step * batch + i, 0) for i in range(batch)]

    fit(task, out / f"{size}-language.safetensors", steps=steps, lr=lr, scenes=fresh)
    export(model, out / size)


def export(model: InternVLForConditionalGeneration, path: Path) -> None:
    """Write a Hugging Face checkpoint in fp16 with its tokenizer and image processor beside it."""
    model.generation_config.eos_token_id = recipe.END
    model.generation_config.pad_token_id = recipe.PAD
    model.generation_config.bos_token_id = None
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.half().save_pretrained(partial)
    recipe.save_processing(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


if __name__ == "__main__":
    typer.run(main)
