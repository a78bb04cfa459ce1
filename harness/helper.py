"""A helper: a second, small model that reads a batch's images and questions for a method (`pruneval.methods.helper`).

It gets the very pixels the pruned model got, so both must cut and number images alike: `reason` compares what decides
that before anything runs, and at each prompt the helper's placeholders must be as many as the features it makes. The
text is the prompt's, id by id, where both have one tokenizer and one chat template, else decoded and put into the
helper's own (`pruneval.harness.helper_prompt`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruneval.harness.attention import Call, HeadAttention, Recorder, watching
from pruneval.harness.errors import UserError
from pruneval.harness.helper_prompt import Prompts
from pruneval.methods.base import MethodError
from pruneval.methods.helper import Reading

if TYPE_CHECKING:
    from pruneval.harness.adapters.base import Adapter, Encoding

_GRID = (
    "model_type", "vision_feature_select_strategy", "image_grid_pinpoints", "downsample_ratio", "image_seq_length",
    "vision_aspect_ratio",
)  # fmt: skip
_TOWER = ("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size", "spatial_patch_size")
_PIXELS = (
    "image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "do_resize", "size", "do_center_crop",
    "crop_size", "resample", "image_grid_pinpoints", "crop_to_patches", "min_patches", "max_patches", "patch_size",
    "merge_size", "temporal_patch_size", "use_thumbnail",
)  # fmt: skip


def reason(target: Adapter, helper: Adapter) -> str:
    """Why this model can't help that one; empty when it can."""
    if helper.model is target.model:
        return "the helper must be another model (or another copy) than the one that is pruned"
    found = [_differs(target.config, helper.config, _GRID)]
    found.append(_differs(target.config.vision_config, helper.config.vision_config, _TOWER))
    mine, theirs = (getattr(adapter.processor, "image_processor", None) for adapter in (target, helper))
    if mine is not None and theirs is not None:
        found.append(_differs(mine, theirs, _PIXELS))
    differs = next((text for text in found if text), "")
    return f"the helper's visual tokens are not those of this model: {differs}" if differs else ""


def _differs(one: Any, other: Any, names: Sequence[str]) -> str:
    for name in names:
        mine, theirs = (_plain(getattr(each, name, None)) for each in (one, other))
        if mine != theirs:
            return f"its {name} is {theirs}, not {mine}"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return {k: v for k, v in dict(value).items() if v is not None} if isinstance(value, Mapping) else value


class HelperView:
    """One sample as the helper has read it: see `pruneval.methods.helper.Helper`."""

    def __init__(
        self,
        helper: Adapter,
        row: int,
        start: int,
        visual: Tensor,
        hidden: Tensor,
        calls: Mapping[int, Call],
        entered: tuple[Tensor, Tensor],
    ) -> None:
        """
        Args:
            helper: the helper's adapter.
            row: of the helper's batch.
            start: padding of the row.
            visual: (N,) places of its visual tokens, behind the padding.
            hidden: (S, d) the row's last states, padded.
            calls: attention calls of the prompt, by layer.
            entered: (n, d) what entered its decoder, and (..., n) at which positions.
        """
        self._helper, self._row, self._start, self._calls, self._entered = helper, row, start, calls, entered
        self.visual, self.length, self.layers = visual, hidden.shape[0] - start, len(helper.decoder_layers)
        self.hidden = hidden[start:].to(torch.promote_types(torch.float32, hidden.dtype))
        self.answered = self.hidden.new_zeros(0, len(visual))
        self.answer, self.confidence = visual.new_zeros(0), self.hidden.new_zeros(0)

    def attention(self, layer: int) -> HeadAttention:
        """The attention of a decoder layer over the helper's prompt."""
        return self._calls[layer].sample(self._row, self._start)

    def newest(self, calls: Mapping[int, Call]) -> Tensor:
        """(N,) what the newest token of the answer gives to the visual tokens, summed over layers and heads."""
        total = self.hidden.new_zeros(len(self.visual))
        for call in calls.values():
            key, value = (part[self._row, :, self._start :] for part in (call.key, call.value))
            rows = HeadAttention(call.query[self._row], key, value, call.scaling, True).rows(-1)
            total += rows.sum((0, 1))[self.visual]
        return total

    @torch.no_grad()
    def agreement(self, chosen: Tensor) -> Tensor:
        """(t + 1,) the probability of each token of its answer when it sees only these visual tokens."""
        decoder, (hidden, position) = self._helper.text_model, self._entered
        if "visual_pos_masks" in inspect.signature(decoder.forward).parameters:
            raise MethodError("the helper adds visual features inside its decoder, so it can't read its answer again")
        stays = torch.ones(self.length, dtype=torch.bool, device=hidden.device)
        stays[self.visual] = False
        stays[self.visual[chosen.to(self.visual.device)]] = True
        said = self._helper.model.get_input_embeddings()(self.answer[:-1]).to(hidden)
        after = position.amax() + 1 + torch.arange(len(said), device=position.device)
        position = torch.cat([position[..., stays], after.expand(*position.shape[:-1], -1)], dim=-1)
        stream = torch.cat([hidden[stays], said])[None]
        whole = torch.ones(stream.shape[:2], dtype=torch.long, device=stream.device)  # else gaps in positions split it
        out = decoder(inputs_embeds=stream, attention_mask=whole, position_ids=position.unsqueeze(-2), use_cache=False)
        states = out.last_hidden_state[0, -len(self.answer) :]
        logits = self._helper.model.get_output_embeddings()(states).to(self.hidden.dtype)
        return logits.softmax(-1).gather(1, self.answer[:, None]).squeeze(1)


class Helping:
    """The helper of a running block."""

    def __init__(self, target: Adapter, helper: Adapter) -> None:
        self.target, self.helper, self.prompts = target, helper, Prompts(target, helper)

    @torch.no_grad()
    def read(self, how: Reading, rows: list[tuple[Tensor, Tensor]], encoded: list[Encoding]) -> list[HelperView | None]:
        """The helper's view of each sample; None of those without visual tokens.

        Args:
            how: what it is asked for.
            rows: (n,) ids of each sample's prompt and which of them are visual.
            encoded: what the pruned model's vision tower was given for the batch.

        Raises:
            UserError: when its visual tokens are not those of the pruned model.
        """
        shown = [index for index, (_, visual) in enumerate(rows) if bool(visual.any())]
        prompts = [self.prompts.of(*rows[index], how.question_first) for index in shown]
        inputs = self._inputs(prompts, encoded)
        try:
            views = self._run(how, inputs, prompts)
        except ValueError as error:
            raise UserError(f"the helper can't read the prompt: {' '.join(str(error).split())[:200]}") from error
        found: list[HelperView | None] = [None] * len(rows)
        for index, view in zip(shown, views, strict=True):
            found[index] = view
        return found

    def _inputs(self, prompts: list[Tensor], encoded: list[Encoding]) -> dict[str, Any]:
        model, width = self.helper.model, max(map(len, prompts))
        fill = model.config.get_text_config().pad_token_id or 0
        pad = torch.nn.functional.pad
        ids = torch.stack([pad(each, (width - len(each), 0), value=fill) for each in prompts])
        mask = torch.stack([pad(torch.ones_like(each), (width - len(each), 0)) for each in prompts])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        known = inspect.signature(model.forward).parameters
        if "mm_token_type_ids" in known:
            video = (ids == getattr(model.config, "video_token_id", -1)) & mask.bool()
            inputs["mm_token_type_ids"] = (self.helper.visual_mask(ids) & mask.bool()).long() + video.long()
        for encoding in encoded:
            given = {name: value for name, value in encoding.arguments.items() if isinstance(value, Tensor)}
            inputs |= {name: value for name, value in given.items() if name in known}
        for name, value in inputs.items():
            value = value.to(model.device)
            inputs[name] = value.to(model.dtype) if value.is_floating_point() else value
        return inputs

    def _run(self, how: Reading, inputs: dict[str, Any], prompts: list[Tensor]) -> list[HelperView]:
        adapter, model = self.helper, self.helper.model
        views: list[HelperView] = []
        steps: list[list[Tensor]] = []
        entered: dict[str, Tensor] = {}
        watched = {layer: adapter.attention(layer) for layer in range(len(adapter.decoder_layers))}

        def read(module: nn.Module, args: tuple, output: Any) -> None:
            calls = {layer: made[-1] for layer, made in recorder.calls.items()}
            recorder.calls.clear()
            if views:
                steps.append([view.newest(calls) for view in views])
                return
            for row, ids in enumerate(prompts):
                visual = adapter.visual_mask(ids).nonzero().squeeze(-1).to(output[0].device)
                start, position = output[0].shape[1] - len(ids), entered["position"]
                position = position.expand(*position.shape[:-2], len(prompts), -1)[..., row, start:]
                stream = (entered["hidden"][row, start:], position)
                views.append(HelperView(adapter, row, start, visual, output[0][row], calls, stream))

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not views:
                entered["hidden"] = args[0] if args else kwargs["x"]
                entered["position"] = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

        with ExitStack() as stack:
            stack.callback(adapter.rotary.register_forward_pre_hook(enter, with_kwargs=True).remove)
            recorder: Recorder = stack.enter_context(watching(watched if how.attention else {}))
            recorder.on = how.attention
            stack.enter_context(adapted(adapter.text_model, how.lora or {}))
            stack.callback(adapter.text_model.register_forward_hook(read).remove)
            if not how.answer:
                model.model(**inputs, use_cache=False)
                return views
            out = self._answer(inputs, how.answer)
        ends = torch.as_tensor(_ends(self.helper) or [-1], device=out.sequences.device)
        made = out.sequences[:, inputs["input_ids"].shape[1] :]
        for row, view in enumerate(views):
            over = torch.isin(made[row], ends).nonzero()
            size = int(over[0]) + 1 if len(over) else made.shape[1]
            logits = torch.stack([step[row] for step in out.logits[:size]]).to(view.hidden.dtype)
            view.answer = made[row, :size]
            view.confidence = logits.softmax(-1).gather(1, view.answer[:, None]).squeeze(1)
            if size > 1 and how.attention:
                view.answered = torch.stack([step[row] for step in steps[: size - 1]])
        return views

    def _answer(self, inputs: dict[str, Any], limit: int) -> Any:
        ends = _ends(self.helper)
        pad = self.helper.model.config.get_text_config().pad_token_id
        return self.helper.model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            eos_token_id=ends or None, pad_token_id=pad if pad is not None else (ends or [0])[0],
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip


def _ends(helper: Adapter) -> list[int]:
    """The ids that end the helper's answers."""
    ends = helper.model.generation_config.eos_token_id
    if ends is None:
        tokenizer = getattr(helper.processor, "tokenizer", helper.processor)
        ends = getattr(tokenizer, "eos_token_id", None)
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


@contextmanager
def adapted(decoder: nn.Module, lora: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Adds low-rank weights to linear layers of a decoder within the block: see `Reading.lora`.

    Raises: UserError for a layer the decoder does not have, or of another size.
    """
    with ExitStack() as stack:
        for name, (down, up) in lora.items():
            try:
                layer = decoder.get_submodule(name)
            except AttributeError:
                raise UserError(f"the low-rank weights are for another helper: it has no layer {name}") from None
            size = (down.shape[1], up.shape[1])
            if size != (layer.in_features, layer.out_features):
                raise UserError(f"the low-rank weights are for another helper: {name} has another size than {size}")

            def add(module: nn.Linear, args: tuple, output: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
                return output + args[0] @ down.to(args[0]).T @ up.to(args[0])

            stack.callback(layer.register_forward_hook(add).remove)
        yield
