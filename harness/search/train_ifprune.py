"""Training IF-Prune's small model (CVPR 2026; its supplement, section on training, and the project page).

The small model reads the question and then the image; its last states at the visual tokens, V', go through the
bottleneck (`pruneval.methods.bottleneck`). What the bottleneck lets through, Z, takes the image's place in a second
pass, from which the answer must come: loss = cross-entropy of the answer + beta x mean divergence. Low-rank weights on
all linear layers of its decoder (PEFT) and the bottleneck learn, everything else is frozen; the large model has no part
in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruneval.harness.chat import chat
from pruneval.harness.helper_prompt import Prompts
from pruneval.harness.models import LoadedModel
from pruneval.harness.search.data import Calibration
from pruneval.harness.search.settings import Settings
from pruneval.methods.bottleneck import beta, divergence, drawn, fresh, posterior

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One sample: prompt ids with the question first, which of them are visual, and the answer's ids with its end."""

    ids: Tensor
    visual: Tensor
    answer: Tensor
    image: Any


class Trainer:
    """One training.

    Args:
        loaded: the small model; it is changed.
        data: questions with answers.
        settings: hyper-parameters.
    """

    def __init__(self, loaded: LoadedModel, data: Calibration, settings: Settings) -> None:
        self.loaded, self.settings, self.data = loaded, settings, data
        self.model, self.adapter = loaded.model, loaded.adapter
        self.text = self.adapter.text_model
        self.examples = [self._example(sample) for sample in data.samples]
        self.total = settings.steps(len(self.examples))
        self.step = 0
        self.model.requires_grad_(False)
        torch.manual_seed(settings.seed)
        self.lora = _low_rank(self.text, settings)
        width = self.model.get_input_embeddings().embedding_dim
        generator = torch.Generator().manual_seed(settings.seed)
        device = loaded.device
        self.tensors = {name: one.to(device).requires_grad_() for name, one in fresh(width, generator).items()}
        self.optimizer = torch.optim.AdamW(
            [*self.lora.values(), *self.tensors.values()], lr=settings.rate, weight_decay=settings.weight_decay
        )

    def run(
        self, state: Path, on_step: Callable[[int, dict[str, float]], None] = lambda step, seen: None, every: int = 20
    ) -> None:
        """Trains to the end, from where `state` left off; the state is written every so many steps."""
        if state.exists():
            self._resume(torch.load(state, weights_only=True, map_location=self.loaded.device))
        while self.step < self.total:
            seen = self._step()
            self.step += 1
            if self.step % every == 0 or self.step == self.total:
                self._save(state)
            on_step(self.step, seen)

    def weights(self) -> dict[str, Tensor]:
        """What `ifprune` loads: the bottleneck, and low-rank weights with their scale in ".up"."""
        scale = self.settings.alpha / self.settings.rank
        found = {name: one.detach().float().cpu().contiguous() for name, one in self.tensors.items()}
        for name, weight in self.lora.items():
            layer, end = name.removesuffix(".default.weight").rsplit(".lora_", 1)
            down = end == "A"
            value = weight.detach().float() if down else weight.detach().float().T * scale
            found[f"lora.{layer}.{'down' if down else 'up'}"] = value.cpu().contiguous()
        return found

    def describe(self) -> dict[str, str]:
        """What the file says of itself."""
        of = {"helper": self.loaded.entry.name, "revision": self.loaded.revision, "data": self.data.name}
        of |= {"data_hash": self.data.digest, "samples": str(len(self.examples)), "steps": str(self.total)}
        return of | {name: str(value) for name, value in asdict(self.settings).items()}

    # One step

    def _step(self) -> dict[str, float]:
        settings, sums = self.settings, {"answer": 0.0, "divergence": 0.0}
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate * _schedule(self.step, self.total, settings.warmup)
        weight = beta(self.step, max(1.0, settings.beta_decline * self.total), settings.beta_first, settings.beta_last)
        for batch in self._batches():
            answer, information = self.loss(batch)
            ((answer + weight * information) / settings.accumulate).backward()
            sums["answer"] += float(answer.detach()) / settings.accumulate
            sums["divergence"] += float(information.detach()) / settings.accumulate
        nn.utils.clip_grad_norm_([*self.lora.values(), *self.tensors.values()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    def _batches(self) -> Iterator[list[Example]]:
        """The batches of this step; which samples are in them depends on the seed and the step alone."""
        size = self.settings.batch_size
        for part in range(self.settings.accumulate):
            first = (self.step * self.settings.accumulate + part) * size
            chosen = []
            for place in range(first, first + size):
                epoch, index = divmod(place, len(self.examples))
                order = torch.Generator().manual_seed(self.settings.seed * 1000003 + epoch)
                chosen.append(int(torch.randperm(len(self.examples), generator=order)[index]))
            yield [self.examples[index] for index in chosen]

    def loss(self, batch: list[Example]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers, and the mean divergence of the visual tokens."""
        with torch.no_grad():
            features = self._features(batch)
        prompt, mask = self._prompts(batch, features)
        visual = self._places(batch, prompt.shape[1])
        states = self.text(inputs_embeds=prompt, attention_mask=mask).last_hidden_state[visual].float()
        mean, logvar = posterior(self.tensors, states)
        information = divergence(mean, logvar, self.tensors["prior.mean"], self.tensors["prior.logvar"]).mean()
        noise = torch.Generator(device=mean.device).manual_seed(self.settings.seed * 7919 + self.step)
        through = drawn(mean, logvar, noise)
        return self._answer(batch, through), information

    def _answer(self, batch: list[Example], through: Tensor) -> Tensor:
        embed, device = self.model.get_input_embeddings(), self.loaded.device
        ids = _padded([torch.cat([one.ids, one.answer]) for one in batch], 0).to(device)
        mask = _padded([torch.ones(len(one.ids) + len(one.answer), dtype=torch.long) for one in batch], 0).to(device)
        labels = _padded([torch.cat([torch.full_like(one.ids, IGNORED), one.answer]) for one in batch], IGNORED)
        hidden = embed(ids)
        hidden = hidden.masked_scatter(self._places(batch, ids.shape[1])[..., None], through.to(hidden.dtype))
        states = self.text(inputs_embeds=hidden, attention_mask=mask).last_hidden_state[:, :-1]
        wanted = labels[:, 1:].to(device)
        logits = self.model.get_output_embeddings()(states[wanted != IGNORED])
        return F.cross_entropy(logits.float(), wanted[wanted != IGNORED])

    # What goes in

    def _example(self, sample: Any) -> Example:
        processor = self.loaded.processor
        text = chat(processor, sample.prompt)
        ids = processor(images=[sample.image], text=[text], return_tensors="pt")["input_ids"][0]
        ids = Prompts(self.adapter, self.adapter).of(ids, self.adapter.visual_mask(ids), question_first=True)
        tokenizer = processor.tokenizer
        answer = tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
        return Example(
            ids, self.adapter.visual_mask(ids), torch.tensor([*answer, tokenizer.eos_token_id]), sample.image
        )

    def _features(self, batch: list[Example]) -> Tensor:
        """(visual tokens of the batch, d) what the image's placeholders stand for."""
        processor = self.loaded.processor.image_processor
        inputs = processor([one.image for one in batch], return_tensors="pt")
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "num_patches"}
        given = {name: value.to(self.loaded.device) for name, value in given.items()}
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        parts = self.model.model.get_image_features(**given).pooler_output
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    def _prompts(self, batch: list[Example], features: Tensor) -> tuple[Tensor, Tensor]:
        ids = _padded([one.ids for one in batch], 0).to(self.loaded.device)
        mask = _padded([torch.ones_like(one.ids) for one in batch], 0).to(self.loaded.device)
        hidden = self.model.get_input_embeddings()(ids)
        return hidden.masked_scatter(self._places(batch, ids.shape[1])[..., None], features.to(hidden.dtype)), mask

    def _places(self, batch: list[Example], width: int) -> Tensor:
        """(B, width) which places hold visual tokens."""
        rows = [F.pad(one.visual, (0, width - len(one.visual))) for one in batch]
        return torch.stack(rows).to(self.loaded.device)

    # Going on

    def _save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "settings": asdict(self.settings),
            "data": self.data.digest,
            "lora": {name: one.detach() for name, one in self.lora.items()},
            "tensors": {name: one.detach() for name, one in self.tensors.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        draft = path.with_suffix(".draft")
        torch.save(state, draft)
        draft.replace(path)

    def _resume(self, state: dict[str, Any]) -> None:
        from pruneval.harness.errors import UserError

        if state["settings"] != asdict(self.settings) or state["data"] != self.data.digest:
            raise UserError("the unfinished training has other settings or data; give another --out, or delete it")
        with torch.no_grad():
            for mine, theirs in ((self.lora, state["lora"]), (self.tensors, state["tensors"])):
                for name, one in mine.items():
                    one.copy_(theirs[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _low_rank(decoder: nn.Module, settings: Settings) -> dict[str, nn.Parameter]:
    """Puts low-rank weights beside every linear layer of the decoder; gives them by name."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=linear, lora_dropout=0.0)
    inject_adapter_in_model(config, decoder)
    return {name: weight for name, weight in decoder.named_parameters() if ".lora_" in name}


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then a cosine down to 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
